"""Storage as a whole: checked against the registry, pruned, and what is in its quarantine."""

from collections.abc import Mapping, Sequence
from functools import partial

import structlog

from modelhostd.core.artifacts import downloading, superfluous
from modelhostd.core.deletions import being_deleted
from modelhostd.core.errors import ModelhostError
from modelhostd.core.leftovers import leftovers, suspects
from modelhostd.core.resources import ArtifactState, Model, Operation, OperationKind, Phase
from modelhostd.host.operations import Operations
from modelhostd.host.registry import Registry, Request
from modelhostd.ports import Files, Quarantined, StorageFinding, StorageUse

log = structlog.get_logger(__name__)


class Storage:
    """What is on disk, seen beside what the registry says."""

    def __init__(self, registry: Registry, operations: Operations, files: Files) -> None:
        self._registry = registry
        self._operations = operations
        self._files = files

    async def use(self) -> StorageUse:
        """Count the bytes under the home directory."""
        return await self._files.use()

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

    async def prune(self, principal: str = "", request: Request | None = None) -> Operation:
        """Remove what nobody needs; the operation's result says how much."""
        answered = await self._registry.answered(request)
        if answered is not None:
            return self._operations.get(answered)
        return await self._operations.start(
            OperationKind.PRUNE,
            join_key="prune",
            principal=principal,
            request=request,
            begun=lambda o: self._operations.run(o.id, Phase.VERIFYING, self._prune),
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
        if edits:
            await self._registry.stage(edits)
        freed = 0
        for model, version in removed:
            freed += await self._files.delete_artifact(model, version)
        pruned = await self._files.prune(downloading(self._registry.decided))
        return {
            "freed_bytes": freed + pruned.freed_bytes,
            "blob_count": pruned.blob_count,
            "artifact_count": len(removed),
        }

    async def _check(self, deep: bool, repair: bool) -> Mapping[str, object]:
        # What is being deleted lies on disk without a row for a moment: that is nothing to repair.
        leaving = being_deleted(self._registry.decided)
        expected = {model: v for model, v in self.expected().items() if model not in leaving}
        on_disk = await self._files.on_disk(leaving)
        findings = await self._files.check({**expected, **on_disk}, deep=deep, repair=repair)
        now = self.expected()
        changed = {model for model, versions in expected.items() if now.get(model) != versions}
        moving = leaving | being_deleted(self._registry.decided) | changed
        told = [f for f in findings if f.name.partition("/")[0] not in moving]
        return {"findings": findings_result(told)}

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
        }
        for f in findings
    ]
