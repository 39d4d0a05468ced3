"""Random storage work on a whole host: downloads, deletions, checks, verifications and policies at once.

The disk takes its time: between any two steps of a piece of file work others get their turn.
"""

import asyncio
import hashlib
import random
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from pathlib import Path

from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.findings import FindingKind
from modelhostd.core.registry import ModelSpec
from modelhostd.core.resources import (
    FINAL_STATES,
    Artifact,
    ArtifactState,
    InstanceState,
    Model,
    OperationState,
    Progress,
    Settings,
    Source,
)
from modelhostd.core.storage import POLICIES
from modelhostd.ports import Holdings, Pace, Pruned, Room, StorageFinding
from tests.fakes.clock import settle
from tests.fakes.database import disk_full
from tests.fakes.files import FakeFiles
from tests.host.support import Running, World
from tests.support import DEADLINE_S

MODELS = ("a", "b", "c", "d", "e")
SIZES = (100, 200, 300, 400)
SHARED = b"shared" * 20
BUDGETS = (0, 0, 900, 1500, 5000)
POLICY_FIELDS = ["storage_policy", "disk_budget_bytes", "storage_ttl_s"]


class SlowFiles(FakeFiles):
    """A disk whose work takes turns, and on which a reader sees what others do meanwhile."""

    def __init__(self, root: Path, seed: int) -> None:
        super().__init__(root)
        self.random = random.Random(seed)
        self.strays: list[tuple[str, int]] = []
        """Trees that a check took for nobody's. Here nobody puts any."""

    async def turn(self) -> None:
        """Let others work, for a moment or for long."""
        for _ in range(self.random.choice((0, 1, 3, 10, 60))):
            await asyncio.sleep(0)

    async def delete_artifact(self, model: str, version: int, *, keep_bytes: bool = False) -> int:
        await self.turn()
        freed = await super().delete_artifact(model, version, keep_bytes=keep_bytes)
        await self.turn()
        return freed

    async def verify(
        self,
        model: str,
        version: int,
        report: Callable[[Progress], None],
        pace: Pace | None = None,
    ) -> Sequence[StorageFinding]:
        files = await self.list_files(model, version)
        tree = self.trees[model, version]
        findings: list[StorageFinding] = []
        for file in files:
            await self.turn()
            if self.trees.get((model, version)) is tree:
                findings.extend(self._deep(model, version, file))
            else:
                name = f"{model}/{version}/{file.path}"
                findings.append(StorageFinding(FindingKind.MISSING_FILE, name, f"{name} is gone"))
        return tuple(findings)

    async def check(
        self, expected: Mapping[str, Sequence[int]], *, deep: bool, repair: bool
    ) -> Sequence[StorageFinding]:
        findings: list[StorageFinding] = []
        wanted = {(model, version) for model, versions in expected.items() for version in versions}
        for key in sorted(wanted):
            await self.turn()
            tree = self.trees.get(key)
            if tree is None:
                name = f"{key[0]}/{key[1]}"
                findings.append(StorageFinding(FindingKind.MISSING_TREE, name, f"{name} is gone"))
            for file in tree.files.values() if tree is not None and deep else ():
                await self.turn()
                if self.trees.get(key) is tree:
                    findings.extend(self._deep(*key, file))
        for key in sorted(self.trees):
            await self.turn()
            if key in wanted or key in self.published or key not in self.trees:
                continue
            name = f"{key[0]}/{key[1]}"
            finding = StorageFinding(FindingKind.STRAY_TREE, name, "not registered", True, repair)
            findings.append(finding)
            self.strays.append(key)
            if repair:
                del self.trees[key]
        await self.turn()
        findings.extend(self._stray_blobs(repair=repair))
        return tuple(findings)

    async def prune(self, busy: Collection[str], *, dry_run: bool = False) -> Pruned:
        await self.turn()
        return await super().prune(busy, dry_run=dry_run)

    async def room(self) -> Room:
        await self.turn()
        return await super().room()

    async def holdings(self) -> Holdings:
        found = await super().holdings()
        await self.turn()
        return found


class StorageChaos:
    """What happens to the storage of a host, and what must hold whatever happens."""

    def __init__(self, root: Path, seed: int) -> None:
        self.random = random.Random(seed)
        self.world = World(root)
        self.files = SlowFiles(root, seed)
        self.world.files = self.files
        self.world.downloads.files = self.files
        self.world.uploads.files = self.files
        self.flipped: set[str] = set()
        """Blobs with a wrong bit; only artifacts that had one may be QUARANTINED."""
        self.tasks: set[asyncio.Task[None]] = set()
        self.number = 0
        for model in MODELS:
            self.publish(model)

    def publish(self, model: str) -> None:
        """Put a new revision of a model at its source; some files are those of other models."""
        self.number += 1
        content = {"model.safetensors": b"%d" % self.number * self.random.choice(SIZES)}
        if self.random.random() < 0.5:
            content["shared.safetensors"] = SHARED
        self.world.downloads.add(f"hf://org/{model}", content, predicted_bytes=100)

    def client(self, work: Callable[[], Awaitable[object]]) -> None:
        """Let a client do something, and expect nothing but typed errors."""

        async def call() -> None:
            try:
                await work()
            except ModelhostError as error:
                if error.reason is Reason.INTERNAL:
                    raise

        self.tasks.add(asyncio.ensure_future(call()))

    async def step(self, run: Running) -> None:
        """Do one random thing."""
        host, model, chance = run.host, self.random.choice(MODELS), self.random
        match chance.randrange(20):
            case 0 | 1 | 2:
                self.client(lambda: host.transfers.download(model, refresh=chance.random() < 0.6))
            case 3:
                self.publish(model)
            case 4 | 5:
                self.client(lambda: host.models.delete(model, force=True, keep_entry=True))
            case 6:
                self.client(lambda: self.replace(run, model))
            case 7 | 8:
                self.client(lambda: host.verification.verify(model))
            case 9 | 10:
                deep, repair = chance.random() < 0.5, chance.random() < 0.7
                self.client(lambda: host.storage.check(deep=deep, repair=repair))
            case 11:
                self.client(lambda: host.storage.prune(dry_run=chance.random() < 0.3))
            case 12:
                settings = Settings(
                    storage_policy=chance.choice(POLICIES),
                    disk_budget_bytes=chance.choice(BUDGETS),
                    storage_ttl_s=3600.0,
                )
                self.client(lambda: host.update_settings(settings, POLICY_FIELDS))
            case 13:
                self.client(lambda: host.residency.load(model))
            case 14:
                self.client(lambda: host.residency.unload(model))
            case 15:
                self.client(lambda: host.models.pin(model, pinned=chance.random() < 0.3))
            case 16:
                self.client(lambda: self.steer(run))
            case 17 if chance.random() < 0.3:
                self.flip()
            case 18 if chance.random() < 0.3:
                run.database.fail_commits(disk_full())
            case _:
                if chance.random() < 0.2:
                    self.world.clock.jump(1800.0)
                await self.world.clock.advance(chance.choice([0.3, 6.0, 61.0]))

    async def replace(self, run: Running, model: str) -> None:
        """Delete a model with its entry, and register another one of its name."""
        operation = await run.host.models.delete(model, force=True)
        await run.host.operations.wait(operation.id, timeout_s=None)
        await self.create(run, model)

    async def create(self, run: Running, model: str) -> None:
        """Register a model."""
        await run.host.models.create(ModelSpec(source=Source(f"hf://org/{model}")), model)

    async def steer(self, run: Running) -> None:
        """Cancel, pause or resume something."""
        active = [o for o in run.host.operations.list() if o.state not in FINAL_STATES]
        if active:
            operation = self.random.choice(active)
            commands = [run.host.operations.cancel, run.host.transfers.pause]
            await self.random.choice([*commands, run.host.transfers.resume])(operation.id)

    def flip(self) -> None:
        """Flip a bit of a blob that some artifact has."""
        linked = [f for tree in self.files.trees.values() for f in tree.files.values()]
        sound = [f for f in linked if f.sha256 not in self.flipped and f.sha256 in self.files.blobs]
        if sound:
            digest = self.random.choice(sound).sha256
            data = bytearray(self.files.blobs[digest])
            data[0] ^= 1
            self.files.blobs[digest] = bytes(data)
            self.flipped.add(digest)

    # --- what must hold -------------------------------------------------------------------------

    def check(self, run: Running) -> None:
        """Assert what holds at every moment."""
        assert not self.files.strays, "a check took files on their way for nobody's"
        for state in (run.host.registry.committed, run.host.registry.decided):
            for model in state.models.values():
                for artifact in model.artifacts:
                    self.check_artifact(model, artifact)
        decided = run.host.registry.decided
        for instance in decided.instances.values():
            model_now = decided.models.get(instance.model)
            if instance.state is not InstanceState.READY or model_now is None:
                continue
            versions = {a.version: a for a in model_now.artifacts}
            gone = instance.artifact_version not in versions
            # Only somebody's command, or damage, takes the files of what is loaded.
            assert not gone or self.told(run, instance.model) != "EVICTED_FROM_DISK"

    def check_artifact(self, model: Model, artifact: Artifact) -> None:
        """An AVAILABLE artifact is there as a whole; a QUARANTINED one had a file that is wrong."""
        if artifact.state is ArtifactState.AVAILABLE:
            tree = self.files.trees.get((model.id, artifact.version))
            assert tree is not None, f"{model.id}/{artifact.version} is shown and not there"
            for file in tree.files.values():
                assert file.sha256 in self.files.blobs, f"{model.id}/{artifact.version}: {file}"
        if artifact.state is ArtifactState.QUARANTINED:
            assert artifact.error is not None
            assert artifact.error.metadata.get("expected") in self.flipped, artifact.error

    def told(self, run: Running, model: str) -> str:
        """Return the reason of the last event of a model."""
        events = run.host.registry.journal._ring.read(1, 100_000) or ()
        return next((e.reason for e in reversed(events) if e.key == model), "")

    async def quiet(self, run: Running) -> None:
        """Make room, wait until everything has ended, and assert that nothing is left over."""
        host = run.host
        run.database._failures.clear()
        # A commit that fails still is not to be met by what comes now.
        await settle(50)
        await host.registry.flush()
        await host.update_settings(Settings(), POLICY_FIELDS)
        for _ in range(20):
            for operation in host.operations.list():
                if operation.state is OperationState.PAUSED:
                    await host.transfers.resume(operation.id)
            await self.world.clock.advance(10.0)
            await settle(50)
            if not [o for o in host.operations.list() if o.state not in FINAL_STATES]:
                break
        if self.tasks:
            done, waiting = await asyncio.wait(self.tasks, timeout=DEADLINE_S)
            assert not waiting
            for task in done:
                if not task.cancelled():
                    task.result()
            self.tasks.clear()
        self.check(run)
        assert [o for o in host.operations.list() if o.state not in FINAL_STATES] == []
        assert not self.files.promised
        await run.end(await host.storage.prune())
        self.check(run)
        shown = {
            (m.id, a.version)
            for m in host.registry.committed.models.values()
            for a in m.artifacts
            if a.state is ArtifactState.AVAILABLE
        }
        assert set(self.files.trees) == shown
        linked = {f.sha256 for tree in self.files.trees.values() for f in tree.files.values()}
        assert set(self.files.blobs) == linked
        checked = await run.end(await host.storage.check(deep=True, repair=False))
        wrong = {f.get("expected", f["kind"]) for f in checked.result["findings"]}
        assert wrong <= self.flipped
        self.flipped = {
            digest
            for digest, data in self.files.blobs.items()
            if hashlib.sha256(data).hexdigest() != digest
        } | {
            artifact.error.metadata["expected"]
            for model in host.registry.committed.models.values()
            for artifact in model.artifacts
            if artifact.state is ArtifactState.QUARANTINED and artifact.error is not None
        }

    async def crash(self, run: Running) -> None:
        """End the host at once."""
        await run.crash()
        await settle()
        self.tasks.clear()
        self.files.promised.clear()
        self.files.held.clear()
