"""Reading events: a cursor on the shared ring, with the database behind it."""

import asyncio
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.journal import Ring, check_start
from modelhostd.core.resources import Event
from modelhostd.ports import Database

PAGE = 256
PAGES_CACHED = 16


class Signal:
    """Tells any number of waiters that something changed, without a queue for any of them."""

    def __init__(self) -> None:
        self._events: set[asyncio.Event] = set()

    def notify(self) -> None:
        """Wake every waiter."""
        for event in self._events:
            event.set()

    @contextmanager
    def subscribed(self, event: asyncio.Event) -> Iterator[None]:
        """Set ``event`` at each ``notify`` inside the block."""
        self._events.add(event)
        try:
            yield
        finally:
            self._events.discard(event)

    @property
    def waiter_count(self) -> int:
        """How many waiters there are."""
        return len(self._events)


class Journal:
    """The event log as subscribers see it. Publishing never waits for any of them."""

    def __init__(self, database: Database, first: int, last: int, ring: int) -> None:
        self._database = database
        self._ring = Ring(last, ring)
        self._pages: OrderedDict[int, asyncio.Task[Sequence[Event]]] = OrderedDict()
        self.first_sequence = first
        self.changed = Signal()

    @property
    def last_sequence(self) -> int:
        """The sequence of the newest committed event; 0 before the first."""
        return self._ring.last

    def append(self, events: Sequence[Event], compact_before: int = 0) -> None:
        """Publish committed events."""
        for event in events:
            self._ring.append(event)
        self.first_sequence = max(self.first_sequence, compact_before)
        self.changed.notify()

    def check(self, start: int) -> None:
        """Raise OUT_OF_RANGE unless a watch may start here."""
        check_start(start, self.first_sequence, self.last_sequence)

    async def read(self, start: int, limit: int = PAGE) -> Sequence[Event]:
        """Return up to ``limit`` (at most 256) events from ``start``; empty at the end.

        Raises SEQUENCE_COMPACTED when ``start`` has been compacted meanwhile, and STORAGE_ERROR when
        the database does not have what it should.
        """
        self.check(start)
        recent = self._ring.read(start, min(limit, PAGE))
        if recent is not None:
            return recent
        page = await self._page(start)
        self.check(start)
        # The database may be ahead: what is committed there and not published here yet is left out.
        found = [e for e in page[:limit] if e.sequence <= self.last_sequence]
        if not found:
            raise ModelhostError(
                Reason.STORAGE_ERROR,
                f"the events from sequence {start} on cannot be read; take a snapshot "
                f"(include_snapshot) and run `modelhostd fsck`",
                {"path": "modelhost.db", "cause": "missing events"},
            )
        # Compacted there already, and here in a moment.
        check_start(start, found[0].sequence, self.last_sequence)
        return found

    async def _page(self, start: int) -> Sequence[Event]:
        """Read history in aligned pages, so that readers who lag together share one read."""
        base = (start - 1) // PAGE * PAGE + 1
        whole = base + PAGE - 1 < self._ring.first
        task = self._pages.get(base) if whole else None
        if task is None:
            first = max(base, self.first_sequence)
            task = asyncio.ensure_future(self._load(first, base + PAGE - first))
            if whole:
                self._pages[base] = task
                while len(self._pages) > PAGES_CACHED:
                    self._pages.popitem(last=False)
            task.add_done_callback(partial(self._read, base))
        page = await asyncio.shield(task)
        return [e for e in page if e.sequence >= start]

    def _read(self, base: int, task: "asyncio.Task[Sequence[Event]]") -> None:
        """Keep no failure: its readers may all have gone, and the next one asks again."""
        if (task.cancelled() or task.exception() is not None) and self._pages.get(base) is task:
            del self._pages[base]

    async def _load(self, start: int, limit: int) -> Sequence[Event]:
        return await self._database.read_events(start, limit)
