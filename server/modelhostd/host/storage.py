"""Storage as a whole: checked against the registry, pruned, and what is in its quarantine."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from functools import partial

import structlog

from modelhostd.core.artifacts import downloading, superfluous
from modelhostd.core.deletions import being_deleted
from modelhostd.core.errors import ModelhostError
from modelhostd.core.findings import DAMAGE
from modelhostd.core.leftovers import leftovers, suspects
from modelhostd.core.resources import (
    Artifact,
    ArtifactState,
    Model,
    Operation,
    OperationKind,
    Phase,
)
from modelhostd.core.storage import Shares, StoredArtifact, stored_artifacts
from modelhostd.core.values import dataclass
from modelhostd.host.departures import Departures
from modelhostd.host.operations import Operations
from modelhostd.host.registry import Registry, Request
from modelhostd.host.space import Space
from modelhostd.host.uses import Uses
from modelhostd.ports import Files, Quarantined, StorageFinding, StorageUse

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class ModelReport:
    """What one model has on disk. ``own_bytes``: what deleting its files would free.

    ``last_use``: seconds since the epoch, 0 = never. ``kept_by``: why no policy would take its files now.
    """

    model: str
    size_bytes: int
    own_bytes: int
    last_use: float
    kept_by: str


@dataclass(frozen=True, slots=True)
class StorageReport:
    """What the disk is used for, by whom, and how it does as a cache."""

    use: StorageUse
    shared_bytes: int
    models: Sequence[ModelReport]
    uses: Uses


Judge = Callable[[str, Artifact, Sequence[StorageFinding]], Awaitable[None]]


class Storage:
    """What is on disk, seen beside what the registry says."""

    def __init__(
        self,
        registry: Registry,
        operations: Operations,
        files: Files,
        space: Space,
        uses: Uses,
        departures: Departures,
    ) -> None:
        self._registry = registry
        self._operations = operations
        self._files = files
        self._space = space
        self._uses = uses
        self._departures = departures
        self.judge: Judge | None = None
        """Takes an artifact that a repairing check found damaged, and what is wrong with it."""

    async def use(self) -> StorageUse:
        """Count the bytes under the home directory."""
        return await self._files.use()

    async def report(self) -> StorageReport:
        """Count them, and tell by whom; the largest model first."""
        use, holdings = await self._files.use(), await self._files.holdings()
        used, kept = self._uses.last(), self._space.kept_by()
        stored = stored_artifacts(self._registry.committed, holdings.artifacts, used, kept)
        shares = Shares(stored, holdings.held)
        by_model: dict[str, list[StoredArtifact]] = {}
        for artifact in stored:
            by_model.setdefault(artifact.model, []).append(artifact)
        models = [
            ModelReport(
                key,
                size,
                shares.freed(by_model.get(key, ())),
                used.get(key, 0.0),
                kept.get(key, "") or _kept_by(by_model.get(key, ())),
            )
            for key, size in use.model_bytes.items()
        ]
        models.sort(key=lambda m: (-m.size_bytes, m.model))
        return StorageReport(use, shares.shared_bytes, models, self._uses)

    async def check(
        self, *, deep: bool, repair: bool, principal: str = "", request: Request | None = None
    ) -> Operation:
        """Compare registry and disk; the operation's result lists the findings."""
        answered = await self._registry.answered(request)
        if answered is not None:
            return self._operations.get(answered)
        work = partial(self._check, deep, repair)
        return await self._operations.start(
            OperationKind.CHECK_STORAGE,
            join_key=f"check-storage:{deep}:{repair}",
            principal=principal,
            request=request,
            begun=lambda o: self._operations.run(o.id, Phase.VERIFYING, work, cancellable=True),
        )

    async def prune(
        self, principal: str = "", request: Request | None = None, *, dry_run: bool = False
    ) -> Operation:
        """Remove what nobody needs; the operation's result says how much. ``dry_run`` only says it."""
        answered = await self._registry.answered(request)
        if answered is not None:
            return self._operations.get(answered)
        work = self._would_prune if dry_run else self._prune
        return await self._operations.start(
            OperationKind.PRUNE,
            join_key="prune-dry" if dry_run else "prune",
            principal=principal,
            request=request,
            begun=lambda o: self._operations.run(o.id, Phase.VERIFYING, work),
        )

    async def quarantined(self, model: str = "") -> Sequence[Quarantined]:
        """Return what is in quarantine, all or one model's, the newest first."""
        found = await self._files.quarantined()
        return [entry for entry in found if model in ("", entry.model)]

    async def restore_quarantined(self, name: str) -> Model:
        """Have the next download of its model take a quarantined file as it is; return the model.

        Raises INVALID_ARGUMENT (no such file) and MODEL_NOT_FOUND (its model is deleted).
        """
        for entry in await self._files.quarantined():
            if entry.name == name:
                self._registry.decided.model(entry.model)
        return self._registry.decided.model(await self._files.restore_quarantined(name))

    async def delete_quarantined(self, name: str) -> None:
        """Delete a quarantined file for good."""
        await self._files.delete_quarantined(name)

    async def take_away_leftovers(self) -> None:
        """Take away files that are not to be seen, since a crash came between them and their row.

        At start, before anything else works. Where the disk does not let it, CheckStorage finds them.
        """
        state = self._registry.committed
        try:
            on_disk = await self._files.on_disk(suspects(state))
            for left in leftovers(state, on_disk):
                await self._files.delete_artifact(left.model, left.version, keep_bytes=left.wanted)
                log.info("took away what a crash left", model=left.model, version=left.version)
        except ModelhostError as error:
            log.error("files that a crash left are still there", message=error.message)

    async def _prune(self) -> Mapping[str, object]:
        removed, edits = superfluous(self._registry.decided)
        freed = 0
        with self._departures.leaving(model for model, _ in removed):
            if edits:
                await self._registry.stage(edits)
            for model, version in removed:
                freed += await self._files.delete_artifact(model, version)
        pruned = await self._files.prune(downloading(self._registry.decided))
        return {
            "freed_bytes": freed + pruned.freed_bytes,
            "blob_count": pruned.blob_count,
            "artifact_count": len(removed),
        }

    async def _would_prune(self) -> Mapping[str, object]:
        holdings = await self._files.holdings()
        removed, _ = superfluous(self._registry.decided)
        stored = stored_artifacts(self._registry.decided, holdings.artifacts, {}, {})
        shares = Shares(stored, holdings.held)
        freed = shares.freed(a for a in stored if (a.model, a.version) in removed)
        pruned = await self._files.prune(downloading(self._registry.decided), dry_run=True)
        return {
            "freed_bytes": freed + pruned.freed_bytes,
            "blob_count": pruned.blob_count,
            "artifact_count": len(removed),
            "dry_run": True,
        }

    async def _check(self, deep: bool, repair: bool) -> Mapping[str, object]:
        # What is being deleted lies on disk without a row for a moment: that is nothing to repair.
        leaving = self._leaving()
        expected = {model: v for model, v in self.expected().items() if model not in leaving}
        on_disk = await self._files.on_disk(leaving)
        findings = await self._files.check({**expected, **on_disk}, deep=deep, repair=repair)
        now = self.expected()
        changed = {model for model, versions in expected.items() if now.get(model) != versions}
        moving = leaving | self._leaving() | changed
        told = [f for f in findings if f.name.partition("/")[0] not in moving]
        if repair:
            await self._judge_damage(told)
        return {"findings": findings_result(told)}

    async def _judge_damage(self, findings: Sequence[StorageFinding]) -> None:
        damaged: dict[tuple[str, str], list[StorageFinding]] = {}
        for finding in findings:
            if finding.kind in DAMAGE and not finding.repaired:
                model, _, rest = finding.name.partition("/")
                damaged.setdefault((model, rest.partition("/")[0]), []).append(finding)
        for (key, version), wrong in damaged.items():
            model_now = self._registry.decided.models.get(key)
            for artifact in model_now.artifacts if model_now is not None else ():
                if str(artifact.version) == version and self.judge is not None:
                    await self.judge(key, artifact, wrong)

    def _leaving(self) -> AbstractSet[str]:
        return being_deleted(self._registry.decided) | self._departures.models

    def expected(self) -> Mapping[str, Sequence[int]]:
        """Return what the disk should hold: model id -> available versions."""
        return {
            model.id: [a.version for a in model.artifacts if a.state is ArtifactState.AVAILABLE]
            for model in self._registry.committed.models.values()
        }


def findings_result(findings: Sequence[StorageFinding]) -> Sequence[Mapping[str, object]]:
    """Return findings as an operation's result keeps them."""
    return [
        {
            "kind": f.kind,
            "name": f.name,
            "message": f.message,
            "repairable": f.repairable,
            "repaired": f.repaired,
            **({"expected": f.expected, "actual": f.actual} if f.expected else {}),
        }
        for f in findings
    ]


def _kept_by(artifacts: Sequence[StoredArtifact]) -> str:
    """Return why none of a model's artifacts may go; empty where one may, or where there is none."""
    reasons = {artifact.kept_by for artifact in artifacts}
    return "" if "" in reasons else max(reasons, default="")
