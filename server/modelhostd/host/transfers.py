"""Downloads as commands: wanted, paused, resumed, changed, given up. What runs is in the base class."""

from dataclasses import replace

from modelhostd.core import artifacts
from modelhostd.core import operations as op_rules
from modelhostd.core.errors import ModelhostError, Reason, invalid
from modelhostd.core.resources import (
    FINAL_STATES,
    Artifact,
    ArtifactState,
    Model,
    Operation,
    OperationKind,
    OperationState,
    Phase,
    Progress,
)
from modelhostd.host.fetching import Fetching, download_result
from modelhostd.host.operations import Operations
from modelhostd.host.registry import Registry, Request
from modelhostd.host.space import Space
from modelhostd.host.transfer_tasks import CANCEL, PAUSE, TransferTasks
from modelhostd.ports import Downloads

PAUSE_WAIT_S = 10.0
ABANDON_WAIT_S = 60.0


class Transfers(TransferTasks):
    """What operators and clients ask of downloads. ``per_host``: so many from one host at a time, 0 = no limit of its own."""

    def __init__(
        self,
        registry: Registry,
        operations: Operations,
        downloads: Downloads,
        fetching: Fetching,
        space: Space,
        *,
        per_host: int = 0,
    ) -> None:
        super().__init__(registry, operations, downloads, fetching, space, self.resume, per_host)

    # --- commands -------------------------------------------------------------------------------

    async def download(
        self,
        model_id: str,
        *,
        priority: int = 0,
        rate_limit: int = 0,
        refresh: bool = False,
        allow_unsafe: bool = False,
        principal: str = "",
        request: Request | None = None,
    ) -> Operation:
        """Return the operation that brings a model's files to disk, joined if it runs already.

        Files that are on disk from the model's source are left alone and the operation has SUCCEEDED,
        unless ``refresh`` asks the source for a newer revision. With ``allow_unsafe`` files that can
        run code when loaded may come, too, also of a revision that is there without them; one that runs without them
        is not joined.
        """
        answered = await self._registry.answered(request)
        if answered is not None:
            return self._operations.get(answered)
        decided = self._registry.decided
        model = decided.model(model_id)
        op_rules.refuse_while_deleted(decided.operations.values(), model_id)
        have = None if refresh else artifacts.fetched_already(model, allow_unsafe=allow_unsafe)
        if have is not None:
            return await self._done_already(model, have, principal, request)
        if allow_unsafe:
            self._refuse_a_safe_one(model_id)
        return await self._operations.start(
            OperationKind.DOWNLOAD,
            model=model_id,
            join_key=_join_key(model_id),
            priority=priority,
            rate_limit=rate_limit,
            principal=principal,
            request=request,
            edits=lambda operation: artifacts.wanted(model, operation, allow_unsafe=allow_unsafe),
            begun=lambda operation: self._begun(operation.id),
        )

    def _refuse_a_safe_one(self, model_id: str) -> None:
        running = self._registry.decided.active_operation(_join_key(model_id))
        found = running and artifacts.artifact_of(self._registry.decided, running.id)
        if running is not None and found and not found[1].allow_unsafe:
            raise ModelhostError(
                Reason.CONFLICTING_OPERATION,
                f"a download of model '{model_id}' without allow_unsafe is under way; wait for it or "
                "cancel it, then ask again",
                {"model": model_id, "operation": running.id},
            )

    async def pause(self, key: str) -> Operation:
        """Stop a download's bytes and keep what is there; PAUSED until ResumeOperation."""
        operation = self._download(key, "paused")
        if operation.state is not OperationState.PAUSED or self._waits_for_room(key):
            self._interrupt(key, PAUSE)
            await self._quiet([key], PAUSE_WAIT_S)
        return self._operations.get(key)

    async def resume(self, key: str) -> Operation:
        """Put a paused download back into the queue."""
        operation = self._download(key, "resumed")
        if operation.state is OperationState.PAUSED:
            now = self._registry.clock.time()
            queued = op_rules.moved(operation, OperationState.QUEUED, now)
            # Whatever it waited for: what it is told next is what it does then.
            progress = replace(self._operations.progress(key), phase=Phase.NONE, retry=None)
            self._operations.report(key, progress)
            edits = [
                op_rules.edit(replace(queued, progress=progress)),
                *artifacts.moved(
                    self._registry.decided, key, ArtifactState.QUEUED, "DOWNLOAD_QUEUED"
                ),
            ]
            await self._registry.stage(edits, stored=lambda: self._begun(key))
        return self._operations.get(key)

    async def update(
        self, key: str, *, priority: int | None = None, rate_limit: int | None = None
    ) -> Operation:
        """Change the priority of a waiting or running operation, or a download's bytes a second."""
        operation = self._registry.decided.operation(key)
        if operation.state in FINAL_STATES:
            raise _wrong_state(operation, "changed")
        changed, reason = operation, "PRIORITY_CHANGED"
        if priority is not None:
            low, high = op_rules.PRIORITY_MIN, op_rules.PRIORITY_MAX
            if not low <= priority <= high:
                raise invalid("operation.priority", f"{low} to {high}", priority)
            changed = replace(changed, priority=priority)
        if rate_limit is not None:
            op_rules.check_rate_limit(rate_limit, "operation.rate_limit_bytes_per_second")
            if operation.kind is not OperationKind.DOWNLOAD:
                raise _wrong_state(operation, "limited to a rate")
            changed = replace(changed, rate_limit_bytes_per_second=rate_limit)
            reason = "RATE_LIMIT_CHANGED"
        await self._registry.stage(
            [op_rules.edit(changed, reason)], stored=lambda: self._limit_one(key)
        )
        return self._operations.get(key)

    def _limit_one(self, key: str) -> None:
        operation = self._registry.committed.operations.get(key)
        if operation is not None and operation.kind is OperationKind.DOWNLOAD:
            self._downloads.limit_one(key, operation.rate_limit_bytes_per_second)

    def settings_changed(self) -> None:
        """Act on what the settings say of downloads now."""
        settings = self._registry.committed.settings
        self._downloads.limit(settings.download_rate_limit_bytes_per_second)
        self.pump()

    async def abandon(self, model_id: str) -> None:
        """Cancel the model's unfinished downloads and wait until nothing works on them any more.

        Raises CONFLICTING_OPERATION when one does not end.
        """
        keys = [
            o.id
            for o in self._registry.decided.operations.values()
            if o.kind is OperationKind.DOWNLOAD
            and o.model == model_id
            and o.state not in FINAL_STATES
        ]
        for key in keys:
            self._interrupt(key, CANCEL)
        if not await self._quiet(keys, ABANDON_WAIT_S):
            raise ModelhostError(
                Reason.CONFLICTING_OPERATION,
                f"a download of model '{model_id}' does not end; cancel it, then try again",
                {"model": model_id, "operation": keys[0]},
            )

    def start(self) -> None:
        """Make the recovered queue cancellable and start what may run."""
        for operation in self._registry.decided.operations.values():
            if operation.kind is OperationKind.DOWNLOAD and operation.state not in FINAL_STATES:
                self._cancellable(operation.id)
        self.settings_changed()

    async def _done_already(
        self, model: Model, have: Artifact, principal: str, request: Request | None
    ) -> Operation:
        """Return an operation that says so: nothing was left to do."""
        total = Progress(
            done_bytes=have.size_bytes,
            total_bytes=have.size_bytes,
            done_files=have.file_count,
            total_files=have.file_count,
            reused_bytes=have.size_bytes,
        )
        key, done = self._operations.done_already(
            OperationKind.DOWNLOAD,
            model.id,
            download_result(model, have, have.size_bytes),
            total,
            principal=principal,
            request=request,
        )
        await done
        return self._operations.get(key)

    def _waits_for_room(self, key: str) -> bool:
        found = artifacts.artifact_of(self._registry.decided, key)
        return found is not None and found[1].error is not None

    def _download(self, key: str, verb: str) -> Operation:
        operation = self._registry.decided.operation(key)
        if operation.kind is not OperationKind.DOWNLOAD or operation.state in FINAL_STATES:
            raise _wrong_state(operation, verb)
        return operation


def _join_key(model_id: str) -> str:
    return f"download:{model_id}"


def _wrong_state(operation: Operation, verb: str) -> ModelhostError:
    return ModelhostError(
        Reason.WRONG_STATE,
        f"operation '{operation.id}' ({operation.kind.value}, {operation.state.value}) "
        f"cannot be {verb}",
        {"name": f"operations/{operation.id}", "state": operation.state.value},
    )
