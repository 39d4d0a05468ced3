"""Downloads: the queue, the tasks that fetch, and what their end means for models and operations."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial

import structlog

from modelhostd.core import operations as op_rules
from modelhostd.core import registry as rules
from modelhostd.core import tasks
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
from modelhostd.core.state import Edit
from modelhostd.host.operations import Operations
from modelhostd.host.registry import Registry, Request
from modelhostd.ports import DownloadJob, Downloads, Fetched, Files

log = structlog.get_logger(__name__)

CANCEL, PAUSE, STOP = "cancel", "pause", "stop"
_ACTIVE = frozenset(
    {ArtifactState.QUEUED, ArtifactState.DOWNLOADING, ArtifactState.VERIFYING, ArtifactState.PAUSED}
)


class Transfers:
    """Runs at most ``max_concurrent_downloads`` downloads, higher priority first, then first come."""

    def __init__(
        self, registry: Registry, operations: Operations, downloads: Downloads, files: Files
    ) -> None:
        self._registry = registry
        self._operations = operations
        self._downloads = downloads
        self._files = files
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._intent: dict[str, str] = {}
        self._paused = False
        self.on_available: Callable[[str], None] = lambda model: None

    # --- commands -------------------------------------------------------------------------------

    async def download(
        self,
        model_id: str,
        *,
        priority: int = 0,
        refresh: bool = False,
        principal: str = "",
        request: Request | None = None,
    ) -> Operation:
        """Return the operation that brings a model's files to disk, joined if it runs already.

        Files that are on disk from the model's source are left alone and the operation has SUCCEEDED,
        unless ``refresh`` asks the source for a newer revision.
        """
        answered = await self._registry.answered(request)
        if answered is not None:
            return self._operations.get(answered)
        model = self._registry.decided.model(model_id)
        have = model.available
        if have is not None and have.source == model.source and not refresh:
            return await self._done_already(model, have, principal, request)

        def edits(operation: Operation) -> Sequence[Edit]:
            changed, artifact = rules.wanted_artifact(
                model, operation.id, self._registry.clock.time()
            )
            version = str(artifact.version)
            return [rules.model_edit(changed, "DOWNLOAD_QUEUED", version=version)]

        operation, new = await self._operations.start(
            OperationKind.DOWNLOAD,
            model=model_id,
            join_key=f"download:{model_id}",
            priority=priority,
            principal=principal,
            request=request,
            edits=edits,
        )
        if new:
            self._cancellable(operation.id)
            self.pump()
        return self._operations.get(operation.id)

    async def pause(self, key: str) -> Operation:
        """Stop a download's bytes and keep what is there; PAUSED until ResumeOperation."""
        return await self._interrupt(key, PAUSE, "paused")

    async def resume(self, key: str) -> Operation:
        """Put a paused download back into the queue."""
        operation = self._registry.decided.operation(key)
        if operation.state is not OperationState.PAUSED:
            raise _wrong_state(operation, "resumed")
        now = self._registry.clock.time()
        edits = [op_rules.edit(op_rules.moved(operation, OperationState.QUEUED, now))]
        found = self._artifact(operation)
        if found is not None:
            model, artifact = found
            changed = rules.with_artifact(model, artifact.version, ArtifactState.QUEUED)
            edits.append(rules.model_edit(changed, "DOWNLOAD_QUEUED"))
        await self._registry.stage(edits)
        self._cancellable(key)
        self.pump()
        return self._operations.get(key)

    async def update(self, key: str, priority: int) -> Operation:
        """Change the priority of a waiting or running download."""
        if not op_rules.PRIORITY_MIN <= priority <= op_rules.PRIORITY_MAX:
            raise invalid(
                "operation.priority",
                f"{op_rules.PRIORITY_MIN} to {op_rules.PRIORITY_MAX}",
                priority,
            )
        operation = self._registry.decided.operation(key)
        if operation.state in FINAL_STATES:
            raise _wrong_state(operation, "changed")
        changed = replace(operation, priority=priority)
        await self._registry.stage([op_rules.edit(changed, "PRIORITY_CHANGED")])
        return self._operations.get(key)

    async def abandon(self, model_id: str) -> None:
        """Cancel the model's unfinished downloads and wait until their bytes have stopped."""
        found = [
            o.id
            for o in self._registry.decided.operations.values()
            if o.kind is OperationKind.DOWNLOAD
            and o.model == model_id
            and o.state not in FINAL_STATES
        ]
        for key in found:
            await self._operations.cancel(key)

    def recover(self) -> Sequence[Edit]:
        """Return the edits that put the last run's unfinished downloads back into the queue."""
        edits: list[Edit] = []
        for model in self._registry.decided.models.values():
            changed = model
            for artifact in model.artifacts:
                if artifact.state not in _ACTIVE:
                    continue
                operation = self._registry.decided.operations.get(artifact.operation)
                if operation is None or operation.state in FINAL_STATES:
                    error = op_rules.stored(_lost(model, artifact))
                    changed = _without_activity(changed, artifact, error)
                elif artifact.state is not ArtifactState.PAUSED:
                    changed = _requeued(changed, artifact)
            if changed != model:
                edits.append(rules.model_edit(changed, "DAEMON_RESTARTED"))
        return edits

    def start(self) -> None:
        """Make the recovered queue cancellable and start what may run."""
        for operation in self._registry.decided.operations.values():
            if operation.kind is OperationKind.DOWNLOAD and operation.state not in FINAL_STATES:
                self._cancellable(operation.id)
        self.pump()

    async def stop(self) -> None:
        """Stop every byte; unfinished downloads go on when the daemon starts again."""
        self._paused = True
        for key, task in list(self._tasks.items()):
            self._intent.setdefault(key, STOP)
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks.values())

    # --- running --------------------------------------------------------------------------------

    async def _done_already(
        self, model: Model, have: Artifact, principal: str, request: Request | None
    ) -> Operation:
        """Return an operation that says so: nothing was left to do."""
        now = self._registry.clock.time()
        queued = op_rules.new(
            self._operations.new_id(),
            OperationKind.DOWNLOAD,
            now,
            model=model.id,
            principal=principal,
        )
        result = {
            "model": model.id,
            "version": have.version,
            "revision": have.revision,
            "file_count": have.file_count,
            "size_bytes": have.size_bytes,
            "reused_bytes": have.size_bytes,
        }
        total = Progress(
            done_bytes=have.size_bytes,
            total_bytes=have.size_bytes,
            done_files=have.file_count,
            total_files=have.file_count,
            reused_bytes=have.size_bytes,
        )
        done = op_rules.succeeded(queued, now, result, total)
        await self._registry.stage([op_rules.edit(done)], principal, request, done.id)
        return done

    def pump(self) -> None:
        """Start waiting downloads while there are free places."""
        if self._paused:
            return
        limit = self._registry.decided.settings.max_concurrent_downloads
        waiting = op_rules.queue(self._registry.decided.operations.values(), OperationKind.DOWNLOAD)
        for operation in waiting:
            if len(self._tasks) >= limit:
                return
            if operation.id not in self._tasks:
                task = asyncio.create_task(self._run(operation), name=f"download {operation.model}")
                self._tasks[operation.id] = task
                task.add_done_callback(partial(self._ended, operation.id))

    def _ended(self, key: str, task: "asyncio.Task[None]") -> None:
        self._tasks.pop(key, None)
        intent = self._intent.pop(key, STOP)
        if task.cancelled() and intent != STOP:
            # Cancelled before its first step: no handler of its own ran.
            self._registry.record(self._interrupted(key, intent))
        if not task.cancelled() and task.exception() is not None:
            log.error("download task failed", operation=key, exc_info=task.exception())
        self.pump()

    async def _run(self, operation: Operation) -> None:
        key = operation.id
        found = self._artifact(operation)
        if found is None:
            missing = ModelhostError(
                Reason.WRONG_STATE,
                f"model '{operation.model}' has no artifact for operation '{key}' any more",
                {"name": f"operations/{key}", "state": operation.state.value},
            )
            await self._operations.settle(lambda: self._operations.failed(key, missing))
            return
        model, artifact = found
        try:
            await self._registry.stage(
                [
                    *self._operations.running(key, Phase.PLANNING),
                    rules.model_edit(
                        rules.with_artifact(model, artifact.version, ArtifactState.DOWNLOADING),
                        "DOWNLOADING",
                    ),
                ]
            )
            job = _job(model, artifact, key)
            fetched = await self._downloads.fetch(job, lambda p: self._report(key, p))
        except asyncio.CancelledError:
            intent = self._intent.get(key, STOP)
            if intent == STOP:
                raise
            await self._operations.settle(lambda: self._interrupted(key, intent))
        except ModelhostError as error:
            failure = error
            await self._operations.settle(lambda: self._failed(key, failure))
        else:
            await self._finish(key, fetched)

    def _report(self, key: str, progress: Progress) -> None:
        before = self._operations.progress(key).phase
        self._operations.report(key, progress)
        if progress.phase is not before and progress.phase in (Phase.VERIFYING, Phase.COMMITTING):
            self._verifying(key)

    def _verifying(self, key: str) -> None:
        found = self._artifact(self._registry.decided.operation(key))
        if found is not None and found[1].state is ArtifactState.DOWNLOADING:
            model, artifact = found
            changed = rules.with_artifact(model, artifact.version, ArtifactState.VERIFYING)
            self._registry.stage([rules.model_edit(changed, "VERIFYING")])

    async def _finish(self, key: str, fetched: Fetched) -> None:
        dropped: list[int] = []

        def edits() -> Sequence[Edit]:
            dropped.clear()
            found = self._artifact(self._registry.decided.operation(key))
            if found is None:
                return self._operations.failed(key, _model_gone(key))
            model, artifact = found
            changed, gone = self._accepted(model, artifact, fetched)
            dropped.extend(gone)
            have = changed.available
            assert have is not None
            result = {
                "model": model.id,
                "version": have.version,
                "revision": have.revision,
                "file_count": have.file_count,
                "size_bytes": have.size_bytes,
                "reused_bytes": fetched.reused_bytes,
            }
            return [
                rules.model_edit(changed, "AVAILABLE", version=str(have.version)),
                *self._operations.succeeded(key, result),
            ]

        operation = self._registry.decided.operation(key)
        if await self._operations.settle(edits):
            for version in dropped:
                await self._files.delete_artifact(operation.model, version)
            self.on_available(operation.model)

    def _accepted(
        self, model: Model, artifact: Artifact, fetched: Fetched
    ) -> tuple[Model, Sequence[int]]:
        """Return the model with its new artifact, and the versions whose files may be deleted."""
        if artifact.state is ArtifactState.DOWNLOADING:
            model = rules.with_artifact(model, artifact.version, ArtifactState.VERIFYING)
        before = model.available
        same = before is not None and before.revision == fetched.facts.revision
        if same and before is not None and before.source == artifact.source:
            kept = tuple(a for a in model.artifacts if a.version != artifact.version)
            return replace(model, artifacts=kept), [artifact.version]
        model = rules.with_artifact(
            model,
            artifact.version,
            ArtifactState.AVAILABLE,
            revision=fetched.facts.revision,
            size_bytes=sum(f.size_bytes for f in fetched.files),
            file_count=len(fetched.files),
            predicted_bytes=fetched.predicted_bytes,
            available_time=self._registry.clock.time(),
            operation="",
            error=None,
        )
        task = model.task or tasks.task_of(fetched.facts.task, fetched.facts.tags)
        model = replace(model, task=task, licence=model.licence or fetched.facts.licence)
        in_use = {i.artifact_version for i in self._registry.decided.instances_of(model.id)}
        return rules.superseded(model, in_use)

    def _failed(self, key: str, error: ModelhostError) -> Sequence[Edit]:
        edits = [*self._operations.failed(key, error)]
        found = self._artifact(self._registry.decided.operation(key))
        if found is not None:
            model, artifact = found
            quarantined = error.reason is Reason.CHECKSUM_MISMATCH
            changed = rules.failed_artifact(
                model, artifact.version, op_rules.stored(error), quarantined
            )
            edits.append(rules.model_edit(changed, "DOWNLOAD_FAILED", cause=error.reason.value))
        return edits

    # --- interrupting ---------------------------------------------------------------------------

    def _cancellable(self, key: str) -> None:
        self._operations.on_cancel(key, lambda: self._interrupt_nowait(key, CANCEL))

    async def _interrupt(self, key: str, intent: str, verb: str) -> Operation:
        operation = self._registry.decided.operation(key)
        if operation.kind is not OperationKind.DOWNLOAD or operation.state not in (
            OperationState.QUEUED,
            OperationState.RUNNING,
        ):
            raise _wrong_state(operation, verb)
        self._interrupt_nowait(key, intent)
        task = self._tasks.get(key)
        if task is not None:
            await asyncio.wait({task}, timeout=10.0)
        await self._registry.flush()
        return self._operations.get(key)

    def _interrupt_nowait(self, key: str, intent: str) -> None:
        task = self._tasks.get(key)
        if task is not None:
            if key not in self._intent:
                self._intent[key] = intent
                task.cancel()
            return
        self._registry.stage(self._interrupted(key, intent))

    def _interrupted(self, key: str, intent: str) -> Sequence[Edit]:
        operation = self._registry.decided.operation(key)
        if operation.state in FINAL_STATES:
            return []
        now = self._registry.clock.time()
        found = self._artifact(operation)
        if intent == PAUSE:
            progress = self._operations.progress(key)
            paused = op_rules.moved(operation, OperationState.PAUSED, now)
            edits = [op_rules.edit(replace(paused, progress=progress))]
            if found is not None:
                model, artifact = found
                changed = rules.with_artifact(model, artifact.version, ArtifactState.PAUSED)
                edits.append(rules.model_edit(changed, "PAUSED"))
            return edits
        edits = [*self._operations.failed(key, op_rules.cancelled_error(operation))]
        if found is not None:
            model, artifact = found
            kept = tuple(a for a in model.artifacts if a.version != artifact.version)
            edits.append(rules.model_edit(replace(model, artifacts=kept), "DOWNLOAD_CANCELLED"))
        return edits

    def _artifact(self, operation: Operation) -> tuple[Model, Artifact] | None:
        model = self._registry.decided.models.get(operation.model)
        if model is None:
            return None
        found = next((a for a in model.artifacts if a.operation == operation.id), None)
        return (model, found) if found is not None else None


def _job(model: Model, artifact: Artifact, operation: str) -> DownloadJob:
    spec = asdict(rules.spec_of(model))
    manifest = {"id": model.id, "uid": model.uid, "create_time": model.create_time, **spec}
    source = artifact.source or model.source
    return DownloadJob(operation, model.id, artifact.version, source, manifest)


def _without_activity(model: Model, artifact: Artifact, error: object) -> Model:
    changed = [
        replace(a, state=ArtifactState.FAILED, error=error, operation="")  # type: ignore[arg-type]
        if a.version == artifact.version
        else a
        for a in model.artifacts
    ]
    return replace(model, artifacts=tuple(changed))


def _requeued(model: Model, artifact: Artifact) -> Model:
    return rules.with_artifact(model, artifact.version, ArtifactState.QUEUED)


def _lost(model: Model, artifact: Artifact) -> ModelhostError:
    return ModelhostError(
        Reason.DAEMON_RESTARTED,
        f"the daemon restarted while version {artifact.version} of model '{model.id}' was on its "
        f"way; download it again, what is there is kept",
        {"operation": artifact.operation},
    )


def _model_gone(key: str) -> ModelhostError:
    return ModelhostError(
        Reason.CANCELLED,
        f"the model of operation '{key}' was deleted meanwhile",
        {"operation": key},
    )


def _wrong_state(operation: Operation, verb: str) -> ModelhostError:
    return ModelhostError(
        Reason.WRONG_STATE,
        f"operation '{operation.id}' ({operation.kind.value}, {operation.state.value}) "
        f"cannot be {verb}",
        {"name": f"operations/{operation.id}", "state": operation.state.value},
    )
