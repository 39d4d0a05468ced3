"""Files hashed again: on demand and on a schedule, and what becomes of an artifact that is not whole.

Rules:
1. One scheduled verification at a time, the artifact that was verified longest ago first, each by its interval.
2. It reads slowly, more slowly while requests are answered, and not at all while anything loads or downloads.
3. An artifact with a file that is wrong is QUARANTINED, and not loaded any more; its good files are kept for
   the next download, a wrong one is in quarantine.
"""

import asyncio
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import structlog

from modelhostd.core import operations as op_rules
from modelhostd.core import registry as rules
from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.findings import DAMAGE, FindingKind
from modelhostd.core.resources import (
    FINAL_STATES,
    Artifact,
    ArtifactState,
    Model,
    Operation,
    OperationKind,
    OperationState,
    Phase,
)
from modelhostd.core.state import Edit
from modelhostd.host.departures import Departures
from modelhostd.host.operations import Operations
from modelhostd.host.registry import Registry, Request
from modelhostd.host.routes import Routes
from modelhostd.host.storage import findings_result
from modelhostd.ports import Files, Pace, StorageFinding

log = structlog.get_logger(__name__)

LOOK_S = 60.0
PACE_S = 1.0
UNPACED = 1e15
"""Bytes a second that nothing reaches."""
SLOW_SHARE = 0.25
"""Of the pace, while requests are answered."""
AGAIN_S = 3600.0
"""After a verification that came to no end: a disk that does not answer is not asked all the time."""
SCHEDULE = "schedule"
"""The principal of what nobody asked for."""


class Verification:
    """Verifies artifacts."""

    def __init__(
        self,
        registry: Registry,
        operations: Operations,
        routes: Routes,
        files: Files,
        departures: Departures,
    ) -> None:
        self._registry = registry
        self._operations = operations
        self._routes = routes
        self._files = files
        self._departures = departures
        self._paced: dict[str, Pace] = {}
        self._tried: dict[tuple[str, int], float] = {}
        self._ticker: asyncio.Task[None] | None = None

    async def verify(
        self,
        model_id: str,
        version: int = 0,
        principal: str = "",
        request: Request | None = None,
        *,
        pace: Pace | None = None,
    ) -> Operation:
        """Hash an artifact's files again (0 = the newest); the operation's result lists what differs.

        Without a ``pace`` as fast as the disk goes, also where a scheduled one is joined.
        """
        answered = await self._registry.answered(request)
        if answered is not None:
            return self._operations.get(answered)
        artifact = rules.artifact_at(self._registry.decided.model(model_id), version)
        op_rules.refuse_while_deleted(
            self._registry.decided.operations.values(), model_id, artifact.version
        )

        def begun(operation: Operation) -> None:
            work = partial(self._verify, model_id, artifact, operation.id, pace)
            self._operations.run(operation.id, Phase.VERIFYING, work, cancellable=True)

        operation = await self._operations.start(
            OperationKind.VERIFY,
            model=model_id,
            join_key=f"verify:{model_id}:{artifact.version}",
            principal=principal,
            request=request,
            begun=begun,
        )
        joined = self._paced.get(operation.id)
        if pace is None and joined is not None:
            joined.bytes_per_second = UNPACED
        return operation

    async def _verify(
        self, model_id: str, artifact: Artifact, operation: str, pace: Pace | None
    ) -> Mapping[str, object]:
        if pace is not None:
            self._paced[operation] = pace
        try:
            findings = await self._files.verify(
                model_id,
                artifact.version,
                lambda p: self._operations.report(operation, p),
                pace,
            )
        finally:
            self._paced.pop(operation, None)
        await self.judge(model_id, artifact, findings)
        return {
            "file_count": artifact.file_count,
            "size_bytes": artifact.size_bytes,
            "findings": findings_result(findings),
        }

    async def judge(
        self, model_id: str, artifact: Artifact, findings: Sequence[StorageFinding]
    ) -> None:
        """Store what was found by hashing all files of an artifact, if that is still there."""
        model = self._registry.decided.models.get(model_id)
        if model is None or _same(model, artifact) is None:
            return  # deleted, or replaced, while it was read
        damage = next((f for f in findings if f.kind in DAMAGE and not f.repaired), None)
        if damage is None:
            now = self._registry.clock.time()
            sound = rules.with_artifact(
                model, artifact.version, ArtifactState.AVAILABLE, verify_time=now
            )
            edit = rules.model_edit(sound, "VERIFIED", version=str(artifact.version))
            await self._operations.settle(lambda: self._still(model_id, artifact, edit))
            return
        error = _error(damage)
        log.error("an artifact is damaged", model=model_id, message=error.message)
        broken = rules.failed_artifact(
            model, artifact.version, op_rules.stored(error), quarantined=True
        )
        told = {"version": str(artifact.version), "cause": error.reason.value, **error.metadata}
        edit = rules.model_edit(broken, "QUARANTINED", **told)
        with self._departures.leaving([model_id]):
            await self._operations.settle(lambda: self._still(model_id, artifact, edit))
            # Out of sight, so that no load and no reader takes it; its good files stay for the next download.
            try:
                await self._files.delete_artifact(model_id, artifact.version, keep_bytes=True)
            except ModelhostError as gone_wrong:
                # Its row says what it is; the next start takes the files away.
                log.error("damaged files are still there", message=gone_wrong.message)

    def _still(self, model_id: str, artifact: Artifact, edit: Edit) -> Sequence[Edit]:
        """Return the edit on the model as it is now, or none where the artifact has gone meanwhile."""
        model, made = self._registry.decided.models.get(model_id), edit.resource
        if model is None or _same(model, artifact) is None or not isinstance(made, Model):
            return ()
        judged = next(a for a in made.artifacts if a.version == artifact.version)
        artifacts = tuple(judged if a.version == judged.version else a for a in model.artifacts)
        return [replace(edit, resource=replace(model, artifacts=artifacts))]

    # --- the schedule ---------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to look for what is due."""
        self._ticker = asyncio.create_task(self._tick(), name="verification")

    async def stop(self) -> None:
        """Begin none any more; one under way ends with the operations."""
        if self._ticker is not None:
            self._ticker.cancel()
            await asyncio.wait([self._ticker])

    async def _tick(self) -> None:
        while True:
            await self._registry.clock.sleep(LOOK_S)
            try:
                found = self._due()
                if found is not None and self._share() > 0:
                    await self._scheduled(*found)
            except Exception:
                # The next look finds the same artifact, after its while.
                log.exception("a scheduled verification failed")

    def _due(self) -> tuple[Model, Artifact] | None:
        """Return what was verified longest ago, if its time has come."""
        decided, now = self._registry.decided, self._registry.clock.time()
        interval_s = decided.settings.verify_interval_s
        if not interval_s:
            return None
        due = [
            (max(artifact.verify_time, artifact.available_time), model.id, artifact)
            for model in decided.models.values()
            for artifact in model.artifacts
            if artifact.state is ArtifactState.AVAILABLE
            and now >= max(artifact.verify_time, artifact.available_time) + interval_s
            and now >= self._tried.get((model.id, artifact.version), -math.inf) + AGAIN_S
        ]
        if not due:
            return None
        _, model_id, artifact = min(due, key=lambda d: (d[0], d[1], d[2].version))
        return decided.models[model_id], artifact

    async def _scheduled(self, model: Model, artifact: Artifact) -> None:
        """Verify one artifact, at a pace that follows what else goes on."""
        key = (model.id, artifact.version)
        self._tried = {**self._tried, key: self._registry.clock.time()}
        pace = Pace(self._rate())
        try:
            operation = await self.verify(model.id, artifact.version, SCHEDULE, pace=pace)
        except ModelhostError as error:
            log.warning("not verified", model=model.id, reason=error.reason)
            return
        while self._unfinished(operation.id):
            if pace.bytes_per_second < UNPACED:
                pace.bytes_per_second = self._rate(operation.id)
            await self._registry.clock.sleep(PACE_S)
        done = self._registry.decided.operations.get(operation.id)
        if done is not None and done.state is OperationState.SUCCEEDED:
            self._tried = {k: at for k, at in self._tried.items() if k != key}

    def _rate(self, but_for: str = "") -> float:
        rate = self._registry.decided.settings.verify_rate_bytes_per_second
        return rate * self._share(but_for)

    def _share(self, but_for: str = "") -> float:
        """Return how much of its pace a verification may have now: 1, a part, or 0 where it would hurt."""
        for operation in self._registry.decided.operations.values():
            works = operation.state is OperationState.RUNNING and operation.id != but_for
            if works and self._operations.progress(operation.id).phase is not Phase.WAITING:
                return 0.0
        busy = any(r.in_flight for r in self._routes) or self._routes.waited_for()
        return SLOW_SHARE if busy else 1.0

    def _unfinished(self, key: str) -> bool:
        operation = self._registry.decided.operations.get(key)
        return operation is not None and operation.state not in FINAL_STATES


def _same(model: Model, artifact: Artifact) -> Artifact | None:
    """Return the artifact as it is now, unless it is gone or another one has its version."""
    return next(
        (
            a
            for a in model.artifacts
            if a.version == artifact.version
            and a.state is ArtifactState.AVAILABLE
            and a.available_time == artifact.available_time
        ),
        None,
    )


def _error(damage: StorageFinding) -> ModelhostError:
    """Return what a QUARANTINED artifact says of the first thing that is wrong with it."""
    if damage.kind == FindingKind.CORRUPT_FILE:
        told = {"file": damage.name, "expected": damage.expected, "actual": damage.actual}
        return ModelhostError(Reason.CHECKSUM_MISMATCH, damage.message, told)
    told = {"path": damage.name, "cause": damage.kind}
    return ModelhostError(Reason.STORAGE_ERROR, damage.message, told)
