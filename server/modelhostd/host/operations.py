"""Long work as callers see it: started, joined, carried out, ended, cancelled.

An operation belongs to the daemon: a caller that goes away stops nothing.
"""

import asyncio
import uuid
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import replace
from functools import partial
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
from modelhostd.host.operation_table import OperationTable
from modelhostd.host.registry import Registry, Request

log = structlog.get_logger(__name__)

CANCEL_WAIT_S = 10.0
COMMIT_RETRY_MAX_S = 30.0
Edits = Callable[[Operation], Sequence[Edit]]


class Operations(OperationTable):
    """The table of operations, and the tasks that carry some of them out."""

    def __init__(self, registry: Registry, *, keep_count: int, keep_age_s: float) -> None:
        super().__init__(registry)
        self._keep = (keep_count, keep_age_s)
        self._cancel: dict[str, Callable[[], None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopping = False
        registry.subscribe(self._published)

    # --- starting -------------------------------------------------------------------------------

    def new_id(self) -> str:
        """Return a fresh operation id (UUID4)."""
        return str(uuid.uuid4())

    async def start(
        self,
        kind: OperationKind,
        *,
        model: str = "",
        join_key: str = "",
        priority: int = 0,
        rate_limit: int = 0,
        principal: str = "",
        request: Request | None = None,
        edits: Edits | None = None,
        begun: Callable[[Operation], None] | None = None,
    ) -> Operation:
        """Return the operation for this work once it is durable; equal work is joined.

        ``edits`` are committed with a new one. ``begun`` begins the work of a new one when it is
        durable, whether or not the caller still waits.
        """
        operation, _, done = self.begin(
            kind,
            model=model,
            join_key=join_key,
            priority=priority,
            rate_limit=rate_limit,
            principal=principal,
            request=request,
            edits=edits,
            begun=begun,
        )
        await done
        return self.get(operation.id)

    def begin(
        self,
        kind: OperationKind,
        *,
        model: str = "",
        join_key: str = "",
        join: bool = True,
        priority: int = 0,
        rate_limit: int = 0,
        principal: str = "",
        request: Request | None = None,
        edits: Edits | None = None,
        begun: Callable[[Operation], None] | None = None,
        undone: Callable[[Operation], None] | None = None,
    ) -> "tuple[Operation, bool, asyncio.Future[int]]":
        """Decide as ``start`` does, without waiting; the future is done when it is durable.

        ``undone`` is called when a new one could not be stored. Without ``join`` a new one is made.
        """
        registry = self._registry
        joined = registry.decided.active_operation(join_key) if join_key and join else None
        if joined is not None:
            return joined, False, registry.stage((), principal, request, joined.id)
        operation = rules.new(
            self.new_id(),
            kind,
            registry.clock.time(),
            model=model,
            join_key=join_key,
            priority=priority,
            rate_limit=rate_limit,
            principal=principal,
        )
        changes = [rules.edit(operation), *(edits(operation) if edits is not None else ())]
        done = registry.stage(
            [*changes, *self._forgettable()],
            principal,
            request,
            operation.id,
            stored=partial(begun, operation) if begun is not None else None,
            undone=partial(self._undone, operation, undone),
        )
        return operation, True, done

    def done_already(
        self,
        kind: OperationKind,
        model: str,
        result: Mapping[str, Any],
        progress: Progress | None = None,
        *,
        principal: str = "",
        request: Request | None = None,
    ) -> "tuple[str, asyncio.Future[int]]":
        """Return an operation that says that nothing was left to do, and when it is durable."""
        now = self._registry.clock.time()
        queued = rules.new(self.new_id(), kind, now, model=model, principal=principal)
        done = rules.succeeded(queued, now, result, progress or Progress())
        edits = [rules.edit(done), *self._forgettable()]
        return done.id, self._registry.stage(edits, principal, request, done.id)

    def _undone(self, operation: Operation, undone: Callable[[Operation], None] | None) -> None:
        if operation.id not in self._registry.decided.operations:
            self._drop(operation.id)
        if undone is not None:
            undone(operation)

    # --- carrying out and ending ----------------------------------------------------------------

    def run(
        self,
        key: str,
        phase: Phase,
        work: Callable[[], Awaitable[Mapping[str, Any]]],
        *,
        cancellable: bool = False,
    ) -> None:
        """Carry out an operation's work in a task of its own; it ends by what comes of it."""
        self._registry.record(self.running(key, phase))
        task = self._spawn(self._work(key, work))
        if cancellable:
            self.on_cancel(key, lambda: _cancel(task))
        task.add_done_callback(partial(self._worked, key))

    async def _work(self, key: str, work: Callable[[], Awaitable[Mapping[str, Any]]]) -> None:
        try:
            result = await work()
            await self.settle(lambda: self.succeeded(key, result))
        except ModelhostError as error:
            failure = error
            await self.settle(lambda: self.failed(key, failure))
        except Exception:
            error_id = uuid.uuid4().hex
            log.exception("an operation failed unexpectedly", operation=key, error_id=error_id)
            unexpected = ModelhostError(
                Reason.INTERNAL,
                f"operation '{key}' failed; the daemon's log has the cause under {error_id}",
                {"errorId": error_id},
            )
            await self.settle(lambda: self.failed(key, unexpected))

    def _worked(self, key: str, task: "asyncio.Task[None]") -> None:
        operation = self._unfinished(key)
        if task.cancelled() and operation is not None and not self._stopping:
            cancelled = rules.cancelled_error(operation)
            self.conclude(lambda: self.failed(key, cancelled))

    def conclude(self, make: Callable[[], Sequence[Edit]]) -> None:
        """Settle an outcome that nobody waits for."""
        self._spawn(self._settled(make))

    async def _settled(self, make: Callable[[], Sequence[Edit]]) -> None:
        await self.settle(make)

    def _spawn(self, work: Coroutine[None, None, None]) -> "asyncio.Task[None]":
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def settle(self, make: Callable[[], Sequence[Edit]], principal: str = "") -> bool:
        """Commit the outcome of work that was done; retried until it is stored.

        ``make`` is called before each try and decides on the state as it is then; no edits = nothing
        left to say. Returns False when the daemon closes before a try succeeds. Raises STORAGE_ERROR
        for an outcome that can never be stored.
        """
        delay = 0.5
        while True:
            try:
                edits = make()
                if edits:
                    await self._registry.stage(edits, principal)
                return True
            except ModelhostError as error:
                if not _passes(error):
                    raise
                log.error("an outcome could not be stored, trying again", reason=error.reason)
                if self._registry.closing:
                    return False
                await self._registry.clock.sleep(delay)
                delay = min(delay * 2, COMMIT_RETRY_MAX_S)

    async def follow(self, key: str, follower: str) -> None:
        """Show an operation's progress as another one's until it ends; raise its error."""
        async for state in self.watch(key):
            if state.state not in FINAL_STATES:
                self.report(follower, state.progress)
            elif state.state is not OperationState.SUCCEEDED and state.error is not None:
                raise rules.raised(state.error)

    def on_cancel(self, key: str, cancel: Callable[[], None]) -> None:
        """Set what CancelOperation calls while this operation is unfinished."""
        self._cancel[key] = cancel

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
        decided = self._unfinished(key)
        if decided is not None and not decided.cancel_requested:
            # Durable on its own: a crash on the way must not let a download go on.
            asked = replace(decided, cancel_requested=True)
            self._registry.record([rules.edit(asked, "CANCEL_REQUESTED")])
        cancel()
        return await self.wait(key, CANCEL_WAIT_S)

    async def stop(self, timeout_s: float) -> None:
        """End the work that is under way; its operations end with the daemon."""
        self._stopping = True
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=timeout_s)

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
                self._drop(event.key)

    def _drop(self, key: str) -> None:
        self._samples.drop(key)
        self._cancel.pop(key, None)


def _passes(error: ModelhostError) -> bool:
    """Tell whether a failed commit may succeed later, with more room or a disk that answers."""
    if error.reason is Reason.STORAGE_ERROR:
        return error.metadata.get("cause") != "encoding"
    return error.reason is Reason.INSUFFICIENT_DISK_SPACE


def _cancel(task: "asyncio.Task[None]") -> None:
    task.cancel()
