"""The database port in memory: what is committed survives in a :class:`FakeDisk`, as on a real one.

Faults on demand: commits can be held (nothing is stored until they are released) and made to fail, and
``crash`` ends a database as ``kill -9`` would.
"""

import asyncio
import uuid
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from modelhostd.adapters.codec import (
    CodecError,
    decode_details,
    decode_resource,
    encode_details,
    encode_resource,
)
from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.resources import Event, Kind, Resource
from modelhostd.ports import Batch, RequestRecord, Stored
from tests.support import DEADLINE_S

EVENTS_PER_READ = 256


@dataclass
class FakeDisk:
    """What survives a crash. Give the same disk to a second FakeDatabase to restart."""

    store_id: str = field(default_factory=lambda: str(uuid.uuid4()))
    rows: dict[tuple[Kind, str], str] = field(default_factory=dict)
    events: dict[int, tuple[Event, str | None, str]] = field(default_factory=dict)
    requests: dict[str, RequestRecord] = field(default_factory=dict)
    last_sequence: int = 0

    def write(self, batch: Batch) -> None:
        """Store a batch; everything is encoded before anything is changed."""
        expected = self.last_sequence + 1
        for number, event in enumerate(batch.events, start=expected):
            if event.sequence != number:
                raise ModelhostError(
                    Reason.STORAGE_ERROR,
                    f"an event with sequence {event.sequence} does not follow {number - 1}",
                    {"path": "memory", "cause": "sequence"},
                )
        rows = {
            (change.kind, change.key): _text(change.kind, change.resource)
            for change in batch.changes
        }
        events = {
            event.sequence: (
                event,
                _text(event.kind, event.resource),
                encode_details(event.details),
            )
            for event in batch.events
        }
        for row, text in rows.items():
            if text is None:
                self.rows.pop(row, None)
            else:
                self.rows[row] = text
        self.events.update(events)
        if batch.events:
            self.last_sequence = batch.events[-1].sequence
        for record in batch.requests:
            self.requests.pop(record.request_id, None)
            self.requests[record.request_id] = record
        for sequence in [s for s in self.events if s < batch.compact_before]:
            del self.events[sequence]


class FakeDatabase:
    """A :class:`modelhostd.ports.Database` in memory, with faults."""

    def __init__(self, disk: FakeDisk | None = None) -> None:
        self.disk = disk or FakeDisk()
        self.committed: list[Batch] = []
        """Every batch that was stored, in order."""
        self.waiting = 0
        """Commits that were asked for and are neither stored nor refused."""
        self.reads = 0
        """Calls of read_events so far."""
        self._open = False
        self._order = asyncio.Lock()
        self._permits: int | None = None
        self._changed = asyncio.Condition()
        self._failures: deque[ModelhostError] = deque()
        self._tasks: set[asyncio.Task[None]] = set()

    # faults

    def hold_commits(self) -> None:
        """From now on commits wait, in order, until they are released."""
        self._permits = 0

    async def release_commits(self, count: int | None = None) -> None:
        """Let ``count`` held commits go on, or (None) all of them and those to come."""
        async with self._changed:
            self._permits = None if count is None else (self._permits or 0) + count
            self._changed.notify_all()

    def fail_commits(self, *errors: ModelhostError) -> None:
        """Make the next commits fail, one with each of ``errors``; then they work again."""
        self._failures.extend(errors or (disk_full(),))

    async def wait_for_waiting(self, count: int, timeout_s: float = DEADLINE_S) -> None:
        """Return when at least ``count`` commits are waiting."""
        async with asyncio.timeout(timeout_s), self._changed:
            await self._changed.wait_for(lambda: self.waiting >= count)

    async def crash(self) -> None:
        """End as ``kill -9`` would: what was not stored yet never will be."""
        self._open = False
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # the port

    async def open(self) -> Stored:
        """Return what the disk holds."""
        self._open = True
        resources: dict[Kind, dict[str, Resource]] = {kind: {} for kind in Kind}
        for (kind, key), text in self.disk.rows.items():
            resources[kind][key] = decode_resource(kind, text)
        return Stored(
            store_id=self.disk.store_id,
            resources=resources,
            requests=tuple(self.disk.requests.values()),
            first_sequence=min(self.disk.events, default=self.disk.last_sequence + 1),
            last_sequence=self.disk.last_sequence,
        )

    async def commit(self, batch: Batch) -> None:
        """Store one batch, after those asked for before it."""
        self._require_open()
        task = asyncio.create_task(self._commit(batch))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        await asyncio.shield(task)

    async def read_events(self, start_sequence: int, limit: int) -> Sequence[Event]:
        """Return events of the disk, at most 256."""
        self._require_open()
        self.reads += 1
        await asyncio.sleep(0)
        found: list[Event] = []
        for sequence in sorted(s for s in self.disk.events if s >= start_sequence):
            if len(found) >= min(limit, EVENTS_PER_READ):
                break
            event, text, details = self.disk.events[sequence]
            resource = None if text is None else decode_resource(event.kind, text)
            found.append(replace(event, resource=resource, details=decode_details(details)))
        return found

    async def close(self) -> None:
        """Wait for the commits asked for, then end."""
        self._open = False
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _require_open(self) -> None:
        if not self._open:
            raise ModelhostError(
                Reason.STORAGE_ERROR,
                "the database is not open",
                {"path": "memory", "cause": "closed"},
            )

    async def _commit(self, batch: Batch) -> None:
        async with self._changed:
            self.waiting += 1
            self._changed.notify_all()
        try:
            async with self._order, self._changed:
                await self._changed.wait_for(lambda: self._permits is None or self._permits > 0)
                if self._permits is not None:
                    self._permits -= 1
                if self._failures:
                    raise self._failures.popleft()
                try:
                    self.disk.write(batch)
                except CodecError as error:
                    raise ModelhostError(
                        Reason.STORAGE_ERROR,
                        f"a change cannot be stored: {error}",
                        {"path": "memory", "cause": "encoding"},
                    ) from error
                self.committed.append(batch)
        finally:
            self.waiting -= 1


def _text(kind: Kind, resource: Resource | None) -> str | None:
    return None if resource is None else encode_resource(kind, resource)


def disk_full() -> ModelhostError:
    """Return the error of a commit for which the disk has no room."""
    return ModelhostError(
        Reason.INSUFFICIENT_DISK_SPACE,
        "the disk is full",
        {"path": "memory", "neededBytes": "4096", "freeBytes": "0"},
    )
