"""The registry task: edits are decided at once, committed in batches, and published in order.

``stage`` applies edits to the *decided* state synchronously, so that the next decision sees them; one
task commits what has been staged (rows AND events in one transaction) and then applies it to the
*committed* state, which answers every read. A decision never waits for the commit in flight.

Rules, checked where they could break:
1. An event's sequence is given when its batch is formed: last + 1, no gap; a failed batch gives its
   numbers back, since nobody has seen them.
2. Nothing is published, acknowledged or readable before its commit.
3. When a commit fails, everything *staged* is undone and its callers are told. What was *recorded*
   happened (to an instance, to an operation that runs): it stands, and is logged with the next commit.
"""

import asyncio
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import structlog

from modelhostd.core.errors import ModelhostError
from modelhostd.core.resources import Event
from modelhostd.core.state import Edit, State
from modelhostd.host import staged as batches
from modelhostd.host.history import Compaction, History
from modelhostd.host.journal import Journal
from modelhostd.host.requests import Request, Requests
from modelhostd.host.staged import Staged
from modelhostd.ports import Batch, Change, Clock, Database, Stored

log = structlog.get_logger(__name__)

BATCH_EDITS_MAX = 512
PENDING_MAX = 20_000


class Registry:
    """Decided and committed state, the journal, and the task that carries one into the other."""

    def __init__(self, database: Database, clock: Clock, history: History | None = None) -> None:
        self.database = database
        self.clock = clock
        self.history = history or History()
        self.decided = State()
        self.committed = State()
        self.store_id = ""
        self.commit_count = 0
        self.journal = Journal(self.database, 1, 0, self.history.ring)
        self._pending: list[Staged] = []
        self._newest: asyncio.Future[int] | None = None
        self._wake = asyncio.Event()
        self._requests = Requests()
        self._listeners: list[Callable[[Sequence[Event]], None]] = []
        self._task: asyncio.Task[None] | None = None
        self._closing = False
        self._ended = False
        self._compaction = Compaction(self.history, 0)

    async def open(self) -> Stored:
        """Read the database and start committing."""
        stored = await self.database.open()
        self.decided = State(stored.resources)
        self.committed = State(stored.resources)
        self.store_id = stored.store_id
        self.journal = Journal(
            self.database, stored.first_sequence, stored.last_sequence, self.history.ring
        )
        self._compaction = Compaction(self.history, stored.last_sequence)
        self._requests = Requests(stored.requests)
        self._task = asyncio.create_task(self._run(), name="registry")
        return stored

    @property
    def closing(self) -> bool:
        """Whether no more changes are taken."""
        return self._closing

    def subscribe(self, listener: Callable[[Sequence[Event]], None]) -> None:
        """Call ``listener`` with each published batch, after the committed state shows it."""
        self._listeners.append(listener)

    def stage(
        self,
        edits: Iterable[Edit],
        principal: str = "",
        request: Request | None = None,
        answer: str = "",
        *,
        stored: Callable[[], None] | None = None,
        undone: Callable[[], None] | None = None,
    ) -> "asyncio.Future[int]":
        """Apply edits to the decided state now; the future has the last sequence once committed.

        Without edits it is done when everything before it is durable. One of ``stored`` and ``undone``
        is called, whether or not anybody still waits for the future; its failure is logged here.
        Raises STORAGE_ERROR when commits have been failing for so long that the queue is full.
        """
        if self._closing or len(self._pending) >= PENDING_MAX:
            raise batches.refused()
        record = None
        if request is not None and request.id:
            record = self._requests.remember(request, answer, self.clock.time())
        staged = self._put(tuple(edits), principal)
        staged.request, staged.stored, staged.undone = record, stored, undone
        return batches.shielded(staged.done)

    def record(self, edits: Iterable[Edit], principal: str = "") -> "asyncio.Future[int]":
        """Note what has happened already: never refused, never undone.

        The future tells how its first commit went; a failure of it changes nothing.
        """
        staged = self._put(tuple(edits), principal)
        staged.happened = True
        return batches.shielded(staged.done)

    def _put(self, edits: Sequence[Edit], principal: str) -> Staged:
        for edit in edits:
            self.decided.apply(edit)
        staged = Staged(edits, principal, self.clock.time(), batches.future())
        if self._ended:
            staged.fail(batches.refused())
            return staged
        self._pending.append(staged)
        self._newest = staged.done
        self._wake.set()
        return staged

    async def answered(self, request: Request | None) -> str | None:
        """Return the answer already given to this request id, once it is durable, else None.

        Raises REQUEST_ID_REUSED when the id came with other content before.
        """
        if request is None or not request.id:
            return None
        if self._requests.find(request, self.clock.time()) is None:
            return None
        await self.flush()
        found = self._requests.find(request, self.clock.time())
        return found.answer if found is not None else None

    async def flush(self) -> None:
        """Wait until everything staged so far is committed or has failed."""
        if self._newest is not None:
            await asyncio.wait([self._newest])

    async def close(self) -> None:
        """Commit what is staged, then stop and close the database."""
        self._closing = True
        self._wake.set()
        if self._task is not None:
            await self._task
        await self.database.close()

    # --- the task -------------------------------------------------------------------------------

    async def _run(self) -> None:
        carried: list[Staged] = []
        try:
            while True:
                if not self._pending and not self._closing:
                    await self._wait(batches.RETRY_S if carried else None)
                taken = carried + self._take()
                carried = []
                if taken:
                    error = await self._commit(taken)
                    if error is not None:
                        carried = self._undo(taken)
                        if error.metadata.get("cause") == "encoding":
                            carried = await self._storable(carried)
                if self._closing and not self._pending:
                    return
        finally:
            self._ended = True
            for staged in self._pending:
                staged.fail(batches.refused())

    async def _wait(self, timeout_s: float | None) -> None:
        self._wake.clear()
        if timeout_s is None:
            await self._wake.wait()
            return
        sleep = asyncio.ensure_future(self.clock.sleep(timeout_s))
        wake = asyncio.ensure_future(self._wake.wait())
        try:
            await asyncio.wait({sleep, wake}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            sleep.cancel()
            wake.cancel()

    def _take(self) -> list[Staged]:
        count = edits = 0
        for staged in self._pending:
            if count and edits + len(staged.edits) > BATCH_EDITS_MAX:
                break
            count += 1
            edits += len(staged.edits)
        taken, self._pending = self._pending[:count], self._pending[count:]
        return taken

    async def _commit(self, taken: Sequence[Staged]) -> ModelhostError | None:
        events = batches.events_of(taken, self.committed, self.journal.last_sequence)
        requests = tuple(s.request for s in taken if s.request is not None)
        compact = 0
        try:
            if events or requests:
                compact = await self._compaction.before(
                    self.database,
                    self.journal.first_sequence,
                    self.journal.last_sequence + len(events),
                    self.clock.time(),
                )
                newest = {(e.kind, e.key): e.resource for e in events}
                changes = tuple(Change(kind, key, value) for (kind, key), value in newest.items())
                await self.database.commit(Batch(changes, tuple(events), requests, compact))
                self.commit_count += 1
        except Exception as caught:
            if isinstance(caught, ModelhostError):
                error = caught
            else:
                log.exception("commit failed unexpectedly")
                error = batches.unexpected(caught)
            log.error("commit failed", reason=error.reason, message=error.message)
            for staged in taken:
                staged.fail(error)
            return error
        self._publish(taken, events, compact)
        return None

    def _publish(self, taken: Sequence[Staged], events: Sequence[Event], compact: int) -> None:
        for event in events:
            self.committed.put(event.kind, event.key, event.resource)
        if events:
            self.journal.append(events, compact)
            for listener in self._listeners:
                _guarded(partial(listener, events))
        for staged in taken:
            _guarded(staged.stored)
            if not staged.done.done():
                staged.done.set_result(self.journal.last_sequence)

    def _undo(self, taken: Sequence[Staged]) -> list[Staged]:
        """Undo what was staged; return what was recorded, which is carried over to the next commit."""
        later, self._pending = self._pending, []
        everything = (*taken, *later)
        carried = batches.undo(everything, self.decided, self.committed)
        for staged in everything:
            if staged.request is not None:
                self._requests.forget(staged.request)
            staged.fail(batches.undone())
            _guarded(staged.undone)
        return carried

    async def _storable(self, carried: Sequence[Staged]) -> list[Staged]:
        """Commit what is carried piece by piece, without what can never be stored: that is a bug of
        ours, and it must not keep everything behind it from the disk.
        """
        kept: list[Staged] = []
        for staged in carried:
            error = await self._commit([staged])
            if error is not None and error.metadata.get("cause") == "encoding":
                log.error("a change is lost: it cannot be stored", edits=repr(staged.edits)[:2000])
            elif error is not None:
                kept.append(staged)
        return kept


def _guarded(call: Callable[[], None] | None) -> None:
    """Call what others asked to be called: its failure must not end the task that serves everybody."""
    if call is None:
        return
    try:
        call()
    except Exception:
        log.exception("a listener of the registry failed")


__all__ = ["History", "Registry", "Request"]
