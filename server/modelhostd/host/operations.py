"""Long work as callers see it: started, joined, watched, waited for and ended.

An operation belongs to the daemon: a caller that goes away stops nothing. Progress is not part of the
committed state: it is a sample, replaced by the next one and lost with the daemon.
"""

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import structlog

from modelhostd.core import operations as rules
from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.resources import (
    FINAL_STATES,
    Event,
    Kind,
    Operation,
    OperationKind,
    OperationState,
    Phase,
    Progress,
)
from modelhostd.core.state import Edit
from modelhostd.host.journal import Signal
from modelhostd.host.registry import Registry, Request

log = structlog.get_logger(__name__)

SAMPLE_INTERVAL_S = 0.25
COMMIT_RETRY_MAX_S = 30.0


class Operations:
    """Every operation of the host, with live progress beside the committed rows."""

    def __init__(self, registry: Registry, *, keep_count: int, keep_age_s: float) -> None:
        self._registry = registry
        self._keep = (keep_count, keep_age_s)
        self._progress: dict[str, Progress] = {}
        self._samples = 0
        self._sample_of: dict[str, int] = {}
        self._cancel: dict[str, Callable[[], None]] = {}
        self.sampled = Signal()
        registry.subscribe(self._published)

    # --- reading --------------------------------------------------------------------------------

    def get(self, key: str) -> Operation:
        """Return an operation with its newest progress, or raise OPERATION_NOT_FOUND."""
        return self.live(self._registry.committed.operation(key))

    def list(self) -> Sequence[Operation]:
        """Return every operation, newest first."""
        found = self._registry.committed.operations.values()
        return [self.live(o) for o in sorted(found, key=lambda o: (-o.create_time, o.id))]

    def live(self, operation: Operation) -> Operation:
        """Return an operation as stored, with live progress and queue position added."""
        if operation.state in FINAL_STATES:
            return operation
        progress = self._progress.get(operation.id, operation.progress)
        position = 0
        if operation.state is OperationState.QUEUED:
            waiting = rules.queue(self._registry.committed.operations.values(), operation.kind)
            position = next((i + 1 for i, o in enumerate(waiting) if o.id == operation.id), 0)
        return replace(operation, progress=progress, queue_position=position)

    def samples_after(self, number: int) -> tuple[int, Mapping[str, Progress]]:
        """Return the number of the newest sample, and the progress that is newer than ``number``."""
        newer = {k: self._progress[k] for k, n in self._sample_of.items() if n > number}
        return self._samples, newer

    async def watch(self, key: str) -> AsyncIterator[Operation]:
        """Yield the operation now, at each change, at most 4 samples a second; end after the end."""
        journal, changed = self._registry.journal, asyncio.Event()
        loop = asyncio.get_running_loop()
        with journal.changed.subscribed(changed), self.sampled.subscribed(changed):
            operation = self.get(key)
            cursor, seen = journal.last_sequence + 1, self._samples
            sampled_at = loop.time()
            yield operation
            while operation.state not in FINAL_STATES:
                changed.clear()
                while cursor <= journal.last_sequence:
                    for event in await journal.read(cursor):
                        cursor = event.sequence + 1
                        if event.kind is Kind.OPERATION and event.key == key:
                            if not isinstance(event.resource, Operation):
                                return
                            operation = self.live(event.resource)
                            yield operation
                if operation.state in FINAL_STATES:
                    return
                pause = max(0.0, sampled_at + SAMPLE_INTERVAL_S - loop.time())
                fresh = self._sample_of.get(key, 0) > seen
                if fresh and pause == 0.0:
                    seen, sampled_at = self._samples, loop.time()
                    operation = self.get(key)
                    yield operation
                    continue
                try:
                    async with asyncio.timeout(pause if fresh else None):
                        await changed.wait()
                except TimeoutError:
                    pass

    async def wait(self, key: str, timeout_s: float | None) -> Operation:
        """Return the operation once it has ended, or as it is when ``timeout_s`` has passed."""
        changed = asyncio.Event()
        with self._registry.journal.changed.subscribed(changed):
            try:
                async with asyncio.timeout(timeout_s):
                    while (operation := self.get(key)).state not in FINAL_STATES:
                        changed.clear()
                        await changed.wait()
                    return operation
            except TimeoutError:
                return self.get(key)

    def new_id(self) -> str:
        """Return a fresh operation id (UUID4)."""
        return str(uuid.uuid4())

    # --- starting -------------------------------------------------------------------------------

    async def start(
        self,
        kind: OperationKind,
        *,
        model: str = "",
        join_key: str = "",
        priority: int = 0,
        principal: str = "",
        request: Request | None = None,
        edits: Callable[[Operation], Sequence[Edit]] | None = None,
    ) -> tuple[Operation, bool]:
        """Return the operation for this work and whether it is new; equal work is joined.

        ``edits`` are committed with a new one. Returns once it is durable.
        """
        operation, new, done = self.begin(
            kind,
            model=model,
            join_key=join_key,
            priority=priority,
            principal=principal,
            request=request,
            edits=edits,
        )
        await done
        return operation, new

    def begin(
        self,
        kind: OperationKind,
        *,
        model: str = "",
        join_key: str = "",
        priority: int = 0,
        principal: str = "",
        request: Request | None = None,
        edits: Callable[[Operation], Sequence[Edit]] | None = None,
    ) -> "tuple[Operation, bool, asyncio.Future[int]]":
        """Decide as ``start`` does, without waiting; the future is done when it is durable."""
        registry = self._registry
        joined = registry.decided.active_operation(join_key) if join_key else None
        if joined is not None:
            return joined, False, registry.stage((), principal, request, joined.id)
        operation = rules.new(
            self.new_id(),
            kind,
            registry.clock.time(),
            model=model,
            join_key=join_key,
            priority=priority,
            principal=principal,
        )
        changes = [rules.edit(operation), *(edits(operation) if edits is not None else ())]
        changes += self._forgettable()
        done = registry.stage(changes, principal, request, operation.id)
        return operation, True, done

    # --- running and ending ---------------------------------------------------------------------

    def on_cancel(self, key: str, cancel: Callable[[], None]) -> None:
        """Set what CancelOperation calls while this operation is unfinished."""
        self._cancel[key] = cancel

    def report(self, key: str, progress: Progress) -> None:
        """Take a progress sample of a running operation."""
        self._samples += 1
        self._progress[key] = progress
        self._sample_of[key] = self._samples
        self.sampled.notify()

    def progress(self, key: str) -> Progress:
        """Return the newest progress of an operation."""
        return self._progress.get(key, Progress())

    def running(self, key: str, phase: Phase = Phase.NONE) -> Sequence[Edit]:
        """Return the edits that set an operation RUNNING, with its first phase."""
        operation = self._unfinished(key)
        if operation is None:
            return ()
        progress = replace(operation.progress, phase=phase)
        self.report(key, progress)
        moved = rules.moved(operation, OperationState.RUNNING, self._registry.clock.time())
        return [rules.edit(replace(moved, progress=progress))]

    def succeeded(self, key: str, result: Mapping[str, Any]) -> Sequence[Edit]:
        """Return the edits that end an operation well."""
        operation = self._unfinished(key)
        if operation is None:
            return ()
        progress = replace(self._progress.get(key, operation.progress), phase=Phase.NONE)
        done = rules.succeeded(operation, self._registry.clock.time(), result, progress)
        return [rules.edit(done)]

    def failed(self, key: str, error: ModelhostError) -> Sequence[Edit]:
        """Return the edits that end an operation with an error (CANCELLED for that reason)."""
        operation = self._unfinished(key)
        if operation is None:
            return ()
        progress = self._progress.get(key, operation.progress)
        return [rules.edit(rules.failed(operation, self._registry.clock.time(), error, progress))]

    def _unfinished(self, key: str) -> Operation | None:
        """Return the operation unless it ended, or was undone because its commit failed."""
        operation = self._registry.decided.operations.get(key)
        if operation is None or operation.state in FINAL_STATES:
            return None
        return operation

    async def settle(self, make: Callable[[], Sequence[Edit]], principal: str = "") -> bool:
        """Commit the outcome of work that was done; retried until it is stored.

        ``make`` is called before each try and decides on the state as it is then; no edits = nothing
        left to say. Returns False when the daemon closes before a try succeeds.
        """
        delay = 0.5
        while True:
            try:
                edits = make()
                if edits:
                    await self._registry.stage(edits, principal)
                return True
            except ModelhostError as error:
                if error.reason not in (Reason.STORAGE_ERROR, Reason.INSUFFICIENT_DISK_SPACE):
                    raise
                log.error("an outcome could not be stored, trying again", reason=error.reason)
                if self._registry.closing:
                    return False
                await self._registry.clock.sleep(delay)
                delay = min(delay * 2, COMMIT_RETRY_MAX_S)

    async def cancel(self, key: str) -> Operation:
        """Ask an operation to end; returns it with its state then. Ended ones stay as they are.

        Raises WRONG_STATE for kinds that cannot be stopped half-way.
        """
        operation = self._registry.committed.operation(key)
        if operation.state in FINAL_STATES:
            return operation
        cancel = self._cancel.get(key)
        if cancel is None:
            raise ModelhostError(
                Reason.WRONG_STATE,
                f"operation '{key}' ({operation.kind.value}) cannot be cancelled; wait for its end",
                {"name": f"operations/{key}", "state": operation.state.value},
            )
        cancel()
        return await self.wait(key, timeout_s=10.0)

    def _forgettable(self) -> Sequence[Edit]:
        count, age_s = self._keep
        return rules.forgettable(
            self._registry.decided.operations.values(), self._registry.clock.time(), count, age_s
        )

    def _published(self, events: Sequence[Event]) -> None:
        for event in events:
            if event.kind is not Kind.OPERATION:
                continue
            operation = event.resource
            if not isinstance(operation, Operation) or operation.state in FINAL_STATES:
                self._progress.pop(event.key, None)
                self._sample_of.pop(event.key, None)
                self._cancel.pop(event.key, None)
