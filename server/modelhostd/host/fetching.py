"""One download from its place in the queue to its artifact."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import structlog

from modelhostd.core import artifacts
from modelhostd.core import operations as op_rules
from modelhostd.core import registry as rules
from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.resources import (
    FINAL_STATES,
    Artifact,
    ArtifactState,
    Model,
    OperationState,
    Phase,
    Progress,
    Retry,
)
from modelhostd.core.state import Edit
from modelhostd.core.tasks import task_of_config
from modelhostd.host.departures import Departures
from modelhostd.host.operations import Operations
from modelhostd.host.registry import Registry
from modelhostd.host.room_waits import RoomWaits
from modelhostd.host.space import Space
from modelhostd.host.text_memories import TextMemories
from modelhostd.ports import DownloadJob, Downloads, Fetched, Files

log = structlog.get_logger(__name__)


class Fetching:
    """Carries out downloads, and commits what comes of them."""

    def __init__(
        self,
        registry: Registry,
        operations: Operations,
        downloads: Downloads,
        files: Files,
        space: Space,
        departures: Departures,
        memories: TextMemories,
    ) -> None:
        self._registry = registry
        self._operations = operations
        self._downloads = downloads
        self._files = files
        self._space = space
        self._departures = departures
        self._memories = memories

    async def run(self, key: str, whole: Callable[[], None], waits: RoomWaits) -> None:
        """Carry out a QUEUED download; ``whole`` is called once its files are there and verified.

        Where there is no room on disk now, and there could be, it ends PAUSED and is noted in ``waits``.
        """
        try:
            await self._operations.settle(lambda: self._starting(key))
            found = artifacts.artifact_of(self._registry.decided, key)
            if found is None:
                raise _model_gone(key)
            rate_limit = self._registry.committed.operation(key).rate_limit_bytes_per_second
            job = replace(job_of(*found, key), rate_limit=rate_limit)
            fetched = await self._fetched(key, job)
            whole()
            await self.finish(key, fetched)
        except ModelhostError as error:
            failure = error
            if await self._may_fit_later(failure):
                attempt, delay_s = waits.refused(key)
                await self._operations.settle(lambda: self._paused(key, failure, attempt, delay_s))
            else:
                await self._operations.settle(lambda: self._failed(key, failure))
        except Exception:
            log.exception("a download failed unexpectedly", operation=key)
            unexpected = ModelhostError(
                Reason.INTERNAL,
                f"download '{key}' failed; the daemon's log has the cause under its id",
                {"errorId": key},
            )
            await self._operations.settle(lambda: self._failed(key, unexpected))

    async def _fetched(self, key: str, job: DownloadJob) -> Fetched:
        def missing() -> int:
            progress = self._operations.progress(key)
            return progress.total_bytes - progress.done_bytes

        fetch = partial(self._downloads.fetch, job, partial(self._report, key))
        return await self._space.with_room(fetch, job.model, missing)

    async def _may_fit_later(self, error: ModelhostError) -> bool:
        """Tell whether a download failed for want of room that there may be one day."""
        if (
            error.reason is not Reason.INSUFFICIENT_DISK_SPACE
            or "neededBytes" not in error.metadata
        ):
            return False
        try:
            most = (await self._files.room()).most_bytes
        except ModelhostError:
            return True
        return int(error.metadata["neededBytes"]) <= most

    def _paused(
        self, key: str, error: ModelhostError, attempt: int, delay_s: float
    ) -> Sequence[Edit]:
        decided, now = self._registry.decided, self._registry.clock.time()
        operation = decided.operations.get(key)
        if operation is None or operation.state in FINAL_STATES:
            return ()
        retry = Retry(attempt, error.reason.value, error.message, now + delay_s)
        progress = replace(
            self._operations.progress(key),
            phase=Phase.WAITING,
            bytes_per_second=0.0,
            eta_s=None,
            retry=retry,
        )
        self._operations.report(key, progress)
        paused = replace(op_rules.moved(operation, OperationState.PAUSED, now), progress=progress)
        return [
            op_rules.edit(paused, error.reason.value),
            *artifacts.short_of_room(decided, key, error),
        ]

    def _starting(self, key: str) -> Sequence[Edit]:
        decided = self._registry.decided
        return [
            *self._operations.running(key, Phase.PLANNING),
            *artifacts.moved(decided, key, ArtifactState.DOWNLOADING, "DOWNLOADING"),
        ]

    def _report(self, key: str, progress: Progress) -> None:
        self._operations.report(key, progress)
        if progress.phase not in (Phase.VERIFYING, Phase.COMMITTING):
            return
        found = artifacts.artifact_of(self._registry.decided, key)
        if found is not None and found[1].state is ArtifactState.DOWNLOADING:
            edits = artifacts.moved(
                self._registry.decided, key, ArtifactState.VERIFYING, "VERIFYING"
            )
            try:
                self._registry.stage(edits)
            except ModelhostError as error:
                # A step on the way that nobody may be told of: no reason to lose the bytes.
                log.warning("not told: VERIFYING", operation=key, reason=error.reason)

    async def finish(self, key: str, fetched: Fetched) -> None:
        """Record an artifact that is whole, verified and published; delete the files that it replaces."""
        gone: list[int] = []
        facts = fetched.facts
        model_id = self._registry.decided.operation(key).model
        found = artifacts.artifact_of(self._registry.decided, key)
        config: Mapping[str, Any] = {}
        if found is not None:
            await self._memories.read(model_id, found[1].version)
            config = await self._files.read_config(model_id, found[1].version)
        arrived = artifacts.Arrived(
            revision=facts.revision,
            size_bytes=sum(f.size_bytes for f in fetched.files),
            file_count=len(fetched.files),
            predicted_bytes=fetched.predicted_bytes,
            task=facts.task,
            config_task=task_of_config(config),
            tags=facts.tags,
            licence=facts.licence,
        )

        def edits() -> Sequence[Edit]:
            decided, now = self._registry.decided, self._registry.clock.time()
            if artifacts.artifact_of(decided, key) is None:
                return self._operations.failed(key, _model_gone(key))
            model, have, gone[:] = artifacts.accepted(decided, key, arrived, now)
            return [
                rules.model_edit(model, "AVAILABLE", version=str(have.version)),
                *self._operations.succeeded(
                    key, download_result(model, have, fetched.reused_bytes)
                ),
            ]

        with self._departures.leaving([model_id]):
            if await self._operations.settle(edits):
                for version in gone:
                    await self._delete(model_id, version)

    async def _delete(self, model_id: str, version: int) -> None:
        try:
            await self._files.delete_artifact(model_id, version)
        except ModelhostError as error:
            log.error(
                "old files could not be deleted; CheckStorage finds them",
                model=model_id,
                version=version,
                message=error.message,
            )

    def _failed(self, key: str, error: ModelhostError) -> Sequence[Edit]:
        return [
            *self._operations.failed(key, error),
            *artifacts.failed(self._registry.decided, key, error),
        ]


def job_of(model: Model, artifact: Artifact, operation: str) -> DownloadJob:
    """Return what there is to fetch, with what is stored beside the files."""
    spec = asdict(rules.spec_of(model))
    manifest = {"id": model.id, "uid": model.uid, "create_time": model.create_time, **spec}
    source = artifact.source or model.source
    return DownloadJob(
        operation, model.id, artifact.version, source, manifest, allow_unsafe=artifact.allow_unsafe
    )


def download_result(model: Model, have: Artifact, reused_bytes: int) -> dict[str, object]:
    """Return the result of a download that brought, or found, an artifact."""
    return {
        "model": model.id,
        "version": have.version,
        "revision": have.revision,
        "file_count": have.file_count,
        "size_bytes": have.size_bytes,
        "reused_bytes": reused_bytes,
    }


def _model_gone(key: str) -> ModelhostError:
    return ModelhostError(
        Reason.CANCELLED,
        f"the model of operation '{key}' was deleted meanwhile",
        {"operation": key},
    )
