"""The registry task: edits are decided at once, committed in batches, and published in order.

``stage`` applies edits to the *decided* state synchronously, so that the next decision sees them; one
task commits what has been staged (rows AND events in one transaction) and then applies it to the
*committed* state, which answers every read. A decision never waits for the commit in flight.

Rules, checked where they could break:
1. An event's sequence is given when its batch is formed: last + 1, no gap; a failed batch gives its
   numbers back, since nobody has seen them.
2. Nothing is published, acknowledged or readable before its commit.
3. When a commit fails, everything staged is undone and its callers are told, except edits of volatile
   kinds: what happened to an instance happened. Those are logged with the next commit that succeeds.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import structlog

from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.resources import Event, Kind
from modelhostd.core.state import VOLATILE, Edit, State
from modelhostd.host.journal import Journal
from modelhostd.ports import Batch, Change, Clock, Database, RequestRecord, Stored

log = structlog.get_logger(__name__)

BATCH_EDITS_MAX = 512
PENDING_MAX = 20_000
RETRY_S = 1.0
REQUESTS_MAX = 10_000
REQUEST_AGE_S = 3600.0


@dataclass(frozen=True, slots=True)
class Request:
    """A caller's request id and a fingerprint of what it asked (method and content)."""

    id: str
    fingerprint: str


@dataclass(slots=True)
class _Staged:
    edits: Sequence[Edit]
    principal: str
    done: asyncio.Future[int]
    request: RequestRecord | None = None
    time: float = 0.0


@dataclass(slots=True)
class History:
    """Bounds of the event log."""

    count: int = 100_000
    age_s: float = 7 * 86_400.0
    ring: int = 4096


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
        self._pending: list[_Staged] = []
        self._wake = asyncio.Event()
        self._requests: OrderedDict[str, RequestRecord] = OrderedDict()
        self._listeners: list[Callable[[Sequence[Event]], None]] = []
        self._task: asyncio.Task[None] | None = None
        self._idle = asyncio.Event()
        self._idle.set()
        self._closing = False
        self._compacted_at = 0

    async def open(self) -> Stored:
        """Read the database and start committing."""
        stored = await self.database.open()
        self.decided = State(stored.resources)
        self.committed = State(stored.resources)
        self.store_id = stored.store_id
        self.journal = Journal(
            self.database, stored.first_sequence, stored.last_sequence, self.history.ring
        )
        self._compacted_at = stored.last_sequence
        for record in stored.requests:
            self._requests[record.request_id] = record
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
    ) -> "asyncio.Future[int]":
        """Apply edits to the decided state now; the future has the last sequence once committed.

        The future may be ignored: its failure is logged here. Raises STORAGE_ERROR when commits have
        been failing for so long that the queue is full.
        """
        if self._closing or len(self._pending) >= PENDING_MAX:
            raise ModelhostError(
                Reason.STORAGE_ERROR,
                "the registry takes no changes now (shutting down, or the disk does not answer); "
                "try again later",
                {"path": "modelhost.db", "cause": "queue"},
                retry_delay_s=5.0,
            )
        record = None
        if request is not None and request.id:
            record = RequestRecord(request.id, request.fingerprint, answer, self.clock.time())
            self._requests[request.id] = record
        return self._put(tuple(edits), principal, record)

    def record(self, edits: Iterable[Edit], principal: str = "") -> "asyncio.Future[int]":
        """Stage what has happened already: as ``stage``, but never refused."""
        return self._put(tuple(edits), principal, None)

    def _put(
        self, edits: Sequence[Edit], principal: str, record: RequestRecord | None
    ) -> "asyncio.Future[int]":
        for edit in edits:
            self.decided.apply(edit)
        done: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        # Retrieved here once, so that a caller who does not wait makes no noise.
        done.add_done_callback(lambda f: f.cancelled() or f.exception())
        self._pending.append(_Staged(edits, principal, done, record, self.clock.time()))
        self._idle.clear()
        self._wake.set()
        return done

    async def answered(self, request: Request | None) -> str | None:
        """Return the answer already given to this request id, once it is durable, else None.

        Raises REQUEST_ID_REUSED when the id came with other content before.
        """
        record = self._requests.get(request.id) if request is not None and request.id else None
        if record is None or request is None:
            return None
        if self.clock.time() - record.time > REQUEST_AGE_S:
            return None
        if record.fingerprint != request.fingerprint:
            raise ModelhostError(
                Reason.REQUEST_ID_REUSED,
                f"request id '{request.id}' was used for another request within the last hour; "
                f"make a new id (UUID4) for each request",
                {"requestId": request.id},
            )
        await self.flush()
        return record.answer if request.id in self._requests else None

    async def flush(self) -> None:
        """Wait until everything staged so far is committed or has failed."""
        if self._pending:
            await asyncio.wait([self._pending[-1].done])
        else:
            await self._idle.wait()

    async def close(self) -> None:
        """Commit what is staged, then stop and close the database."""
        self._closing = True
        self._wake.set()
        if self._task is not None:
            await self._task
        await self.database.close()

    # --- the task -------------------------------------------------------------------------------

    async def _run(self) -> None:
        carried: list[_Staged] = []
        while True:
            if not self._pending:
                self._idle.set()
                if self._closing:
                    return
                await self._wait(RETRY_S if carried else None)
            if not self._pending and not carried:
                continue
            taken = carried + self._take()
            carried = []
            if not await self._commit(taken):
                carried = self._undo(taken)
                if self._closing:
                    return

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

    def _take(self) -> list[_Staged]:
        count = edits = 0
        for staged in self._pending:
            if count and edits + len(staged.edits) > BATCH_EDITS_MAX:
                break
            count += 1
            edits += len(staged.edits)
        taken, self._pending = self._pending[:count], self._pending[count:]
        return taken

    async def _commit(self, taken: Sequence[_Staged]) -> bool:
        sequence = self.journal.last_sequence
        events: list[Event] = []
        exists: dict[tuple[Kind, str], bool] = {}
        for staged in taken:
            for edit in staged.edits:
                sequence += 1
                key = (edit.kind, edit.key)
                known = exists.get(key, self.committed.get(*key) is not None)
                exists[key] = edit.resource is not None
                events.append(_event(sequence, edit, staged, created=not known))
        newest = {(e.kind, e.key): e.resource for e in events}
        batch = Batch(
            changes=tuple(Change(kind, key, value) for (kind, key), value in newest.items()),
            events=tuple(events),
            requests=tuple(s.request for s in taken if s.request is not None),
            compact_before=self._compaction(sequence),
        )
        try:
            await self.database.commit(batch)
        except ModelhostError as error:
            log.error("commit failed", reason=error.reason, message=error.message)
            for staged in taken:
                if not staged.done.done():
                    staged.done.set_exception(error)
            return False
        self.commit_count += 1
        self._publish(taken, events, batch.compact_before)
        return True

    def _publish(self, taken: Sequence[_Staged], events: Sequence[Event], compact: int) -> None:
        for event in events:
            self.committed.put(event.kind, event.key, event.resource)
        self.journal.append(events, compact)
        for listener in self._listeners:
            listener(events)
        for staged in taken:
            if not staged.done.done():
                staged.done.set_result(self.journal.last_sequence)
        while len(self._requests) > REQUESTS_MAX:
            self._requests.popitem(last=False)

    def _undo(self, taken: Sequence[_Staged]) -> list[_Staged]:
        """Undo what was staged but for volatile edits, which are returned to be carried over."""
        later, self._pending = self._pending, []
        carried: dict[tuple[Kind, str], Edit] = {}
        for staged in (*taken, *later):
            for edit in staged.edits:
                if edit.kind in VOLATILE:
                    carried[edit.kind, edit.key] = edit
                else:
                    self.decided.put(edit.kind, edit.key, self.committed.get(edit.kind, edit.key))
            if staged.request is not None:
                self._requests.pop(staged.request.request_id, None)
            if not staged.done.done():
                staged.done.set_exception(
                    ModelhostError(
                        Reason.STORAGE_ERROR,
                        "the change could not be stored, because one before it failed; nothing of "
                        "it was kept: try again",
                        {"path": "modelhost.db", "cause": "earlier commit failed"},
                        retry_delay_s=RETRY_S,
                    )
                )
        if not carried:
            return []
        done: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        return [_Staged(tuple(carried.values()), "", done, None, self.clock.time())]

    def _compaction(self, sequence: int) -> int:
        """Return the sequence before which events are dropped, once every 1,000 events."""
        if sequence - self._compacted_at < 1000:
            return 0
        self._compacted_at = sequence
        return max(0, sequence - self.history.count + 1)


def _event(sequence: int, edit: Edit, staged: _Staged, *, created: bool) -> Event:
    return Event(
        sequence=sequence,
        time=staged.time,
        kind=edit.kind,
        key=edit.key,
        resource=edit.resource,
        reason=edit.reason,
        details=edit.details,
        principal=staged.principal,
        created=created and edit.resource is not None,
    )
