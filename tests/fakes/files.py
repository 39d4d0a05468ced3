"""A files port in memory: the same promises as the blob store, without a disk.

Trees are put in by a fake download or by ``put``; ``lose`` and ``flip`` do what disks do.
"""

import hashlib
import json
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from modelhostd.core.errors import ModelhostError, Reason, invalid
from modelhostd.core.findings import FindingKind
from modelhostd.core.resources import ModelFile, Phase, Progress
from modelhostd.ports import (
    Holdings,
    Pace,
    Pruned,
    Quarantined,
    Room,
    StorageFinding,
    StorageUse,
)

DISK_BYTES = 1 << 40


@dataclass
class FakeTree:
    """One artifact: its files by path, and what the download stored beside them."""

    files: dict[str, ModelFile]
    manifest: Mapping[str, Any] = field(default_factory=dict)


class FakeFiles:
    """Model trees and blobs in dictionaries; satisfies ``modelhostd.ports.Files``."""

    def __init__(self, root: Path = Path("/nonexistent/modelhost")) -> None:
        self.root = root
        self.trees: dict[tuple[str, int], FakeTree] = {}
        self.blobs: dict[str, bytes] = {}
        self.fail_next: ModelhostError | None = None
        """Raised once by the next call that touches the disk."""
        self.disk_bytes = DISK_BYTES
        self.budget_bytes = 0
        self.promised: dict[str, int] = {}
        """Bytes that running downloads may still write, by operation."""
        self.held: dict[str, frozenset[str]] = {}
        """Blobs that running downloads count on, by operation."""
        self.published: set[tuple[str, int]] = set()
        self.uses: dict[str, float] = {}
        self.uses_written = 0
        self.paces: list[Pace | None] = []
        """What verifications were asked with."""
        self.before_verify: Callable[[], Awaitable[None]] | None = None
        """What a verification waits for before it looks at a file."""
        self.staged: dict[str, int] = {}
        """Bytes that an interrupted download left, by model."""
        self.quarantine: dict[str, Quarantined] = {}
        self.restored: list[str] = []

    # What a download does, and what tests do.

    def put(
        self,
        model: str,
        version: int,
        files: Mapping[str, bytes],
        manifest: Mapping[str, Any] | None = None,
    ) -> tuple[ModelFile, ...]:
        """Publish an artifact, as a download does with its last rename."""
        listed = {}
        for path, data in files.items():
            digest = hashlib.sha256(data).hexdigest()
            self.blobs[digest] = data
            listed[path] = ModelFile(path, len(data), digest)
        self.trees[model, version] = FakeTree(listed, manifest or {})
        if manifest is not None:
            self.published.add((model, version))
        return tuple(listed[path] for path in sorted(listed))

    def promise(self, operation: str, needed: int, held: frozenset[str]) -> None:
        """Promise room to a download, as the first step of its bytes."""
        room = self.room_now()
        if needed > room.available_bytes:
            raise ModelhostError(
                Reason.INSUFFICIENT_DISK_SPACE,
                f"{needed} bytes are needed and {room.available_bytes} are free",
                {
                    "path": str(self.root),
                    "neededBytes": str(needed),
                    "freeBytes": str(room.available_bytes),
                },
            )
        self.promised[operation] = needed
        self.held[operation] = held

    def release(self, operation: str) -> None:
        """End a promise."""
        self.promised.pop(operation, None)
        self.held.pop(operation, None)

    @property
    def used_bytes(self) -> int:
        """What counts against the disk and the budget."""
        quarantine = sum(entry.size_bytes for entry in self.quarantine.values())
        return sum(map(len, self.blobs.values())) + sum(self.staged.values()) + quarantine

    def room_now(self) -> Room:
        """Return what may still be promised."""
        available, most = self.disk_bytes - self.used_bytes, self.disk_bytes
        if self.budget_bytes:
            available = min(available, self.budget_bytes - self.used_bytes)
            most = min(most, self.budget_bytes)
        promised = sum(self.promised.values())
        over = max(0, self.used_bytes - self.budget_bytes) if self.budget_bytes else 0
        return Room(max(0, available - promised), most, promised, over)

    def lose(self, model: str, version: int) -> None:
        """Remove a tree behind the registry's back."""
        del self.trees[model, version]

    def flip(self, model: str, version: int, path: str) -> None:
        """Flip one bit of one file."""
        digest = self.trees[model, version].files[path].sha256
        data = bytearray(self.blobs[digest])
        data[0] ^= 1
        self.blobs[digest] = bytes(data)

    # The port.

    def model_dir(self, model: str, version: int) -> Path:
        """Return the directory the files would be in."""
        return self.root / "models" / model / str(version) / "files"

    async def list_files(self, model: str, version: int) -> Sequence[ModelFile]:
        """Return the files in the order of their paths, or raise STORAGE_ERROR."""
        self._fail()
        tree = self.trees.get((model, version))
        if tree is None:
            raise ModelhostError(
                Reason.STORAGE_ERROR,
                f"model '{model}' version {version} has no manifest on disk; download it again",
                {"path": str(self.model_dir(model, version)), "cause": "missing"},
            )
        return tuple(tree.files[path] for path in sorted(tree.files))

    async def read_config(self, model: str, version: int) -> Mapping[str, Any]:
        """Return what ``config.json`` says."""
        tree = self.trees.get((model, version))
        file = tree.files.get("config.json") if tree is not None else None
        try:
            found = json.loads(self.blobs.get(file.sha256, b"{}")) if file is not None else {}
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}

    async def on_disk(self, models: Collection[str]) -> Mapping[str, Sequence[int]]:
        """Return the versions that were put in and not taken away."""
        self._fail()
        found: dict[str, list[int]] = {}
        for model, version in sorted(self.trees):
            if model in models:
                found.setdefault(model, []).append(version)
        return found

    async def delete_artifact(self, model: str, version: int, *, keep_bytes: bool = False) -> int:
        """Remove a tree and the blobs that no other tree names."""
        self._fail()
        tree = self.trees.pop((model, version), None)
        self.published.discard((model, version))
        if tree is None:
            return 0
        kept = {file.sha256 for other in self.trees.values() for file in other.files.values()}
        kept.update(*self.held.values())
        gone = {file.sha256 for file in tree.files.values()} - kept
        freed = sum(len(self.blobs.pop(digest, b"")) for digest in sorted(gone))
        return 0 if keep_bytes else freed

    async def verify(
        self,
        model: str,
        version: int,
        report: Callable[[Progress], None],
        pace: Pace | None = None,
    ) -> Sequence[StorageFinding]:
        """Hash every file and compare."""
        self.paces.append(pace)
        files = await self.list_files(model, version)
        if self.before_verify is not None:
            await self.before_verify()
        total = sum(file.size_bytes for file in files)
        done = 0
        findings: list[StorageFinding] = []
        for count, file in enumerate(files, 1):
            findings.extend(self._deep(model, version, file))
            done += file.size_bytes
            report(Progress(Phase.VERIFYING, done, total, count, len(files), file=file.path))
        return tuple(findings)

    async def check(
        self, expected: Mapping[str, Sequence[int]], *, deep: bool, repair: bool
    ) -> Sequence[StorageFinding]:
        """Compare the trees with ``expected``; a repair drops what nobody expects."""
        self._fail()
        findings: list[StorageFinding] = []
        wanted = {(model, version) for model, versions in expected.items() for version in versions}
        for model, version in sorted(wanted - self.trees.keys()):
            name = f"{model}/{version}"
            findings.append(
                StorageFinding(FindingKind.MISSING_TREE, name, f"{name} is not on disk")
            )
        # What this process made may have its row on the way.
        for model, version in sorted(self.trees.keys() - wanted - self.published):
            name = f"{model}/{version}"
            findings.append(
                StorageFinding(
                    FindingKind.STRAY_TREE, name, f"{name} is not registered", True, repaired=repair
                )
            )
            if repair:
                del self.trees[model, version]
        for key in sorted(wanted & self.trees.keys()) if deep else ():
            for file in self.trees[key].files.values():
                findings.extend(self._deep(*key, file))
        findings.extend(self._stray_blobs(repair=repair))
        return tuple(findings)

    async def use(self) -> StorageUse:
        """Count bytes."""
        self._fail()
        linked = {file.sha256 for tree in self.trees.values() for file in tree.files.values()}
        blob_bytes = sum(map(len, self.blobs.values()))
        models: dict[str, int] = {}
        for (model, _), tree in self.trees.items():
            models[model] = models.get(model, 0) + sum(f.size_bytes for f in tree.files.values())
        return StorageUse(
            blob_bytes=blob_bytes,
            blob_count=len(self.blobs),
            staging_bytes=sum(self.staged.values()),
            quarantine_bytes=sum(entry.size_bytes for entry in self.quarantine.values()),
            reclaimable_bytes=sum(len(d) for key, d in self.blobs.items() if key not in linked)
            + sum(self.staged.values()),
            free_bytes=self.disk_bytes - self.used_bytes,
            total_bytes=self.disk_bytes,
            model_bytes=models,
            room=self.room_now(),
        )

    def limit_bytes(self, budget: int) -> None:
        """Remember the budget."""
        self.budget_bytes = budget

    async def room(self) -> Room:
        """Return what is left of disk and budget."""
        self._fail()
        return self.room_now()

    async def holdings(self) -> Holdings:
        """Return the blobs of each tree, and those that fetches count on."""
        self._fail()
        artifacts = {
            key: {file.sha256: file.size_bytes for file in tree.files.values()}
            for key, tree in self.trees.items()
        }
        return Holdings(artifacts, frozenset().union(*self.held.values()))

    async def read_uses(self) -> Mapping[str, float]:
        """Return what was written last."""
        return dict(self.uses)

    async def write_uses(self, uses: Mapping[str, float]) -> None:
        """Remember it."""
        self._fail()
        self.uses = dict(uses)
        self.uses_written += 1

    async def prune(self, busy: Collection[str], *, dry_run: bool = False) -> Pruned:
        """Drop the blobs that no tree names and what was left of the models that are not busy."""
        self._fail()
        linked = {file.sha256 for tree in self.trees.values() for file in tree.files.values()}
        stray = self.blobs.keys() - linked - frozenset().union(*self.held.values())
        idle = [model for model in self.staged if model not in busy]
        freed = sum(len(self.blobs[digest]) for digest in stray)
        freed += sum(self.staged[model] for model in idle)
        for digest in () if dry_run else stray:
            del self.blobs[digest]
        for model in () if dry_run else idle:
            del self.staged[model]
        return Pruned(freed, len(stray))

    async def quarantined(self) -> Sequence[Quarantined]:
        """Return what was put into ``quarantine``, the newest first."""
        self._fail()
        return sorted(self.quarantine.values(), key=lambda q: (-q.create_time, q.name))

    async def restore_quarantined(self, name: str) -> str:
        """Take an entry out; its name is in ``restored``."""
        self._fail()
        entry = self.quarantine.pop(name, None)
        if entry is None:
            raise invalid("name", "a file in quarantine; ListQuarantine lists them", name)
        self.restored.append(name)
        return entry.model

    async def delete_quarantined(self, name: str) -> None:
        """Forget an entry."""
        self._fail()
        self.quarantine.pop(name, None)

    def _stray_blobs(self, *, repair: bool) -> list[StorageFinding]:
        linked = {file.sha256 for tree in self.trees.values() for file in tree.files.values()}
        stray = sorted(self.blobs.keys() - linked - frozenset().union(*self.held.values()))
        if repair:
            for digest in stray:
                del self.blobs[digest]
        return [
            StorageFinding(
                FindingKind.STRAY_BLOB, digest, "no model links it", True, repaired=repair
            )
            for digest in stray
        ]

    def _deep(self, model: str, version: int, file: ModelFile) -> list[StorageFinding]:
        actual = hashlib.sha256(self.blobs[file.sha256]).hexdigest()
        if actual == file.sha256:
            return []
        name = f"{model}/{version}/{file.path}"
        message = f"{name}: expected SHA-256 {file.sha256}, found {actual}"
        found = StorageFinding(FindingKind.CORRUPT_FILE, name, message)
        return [replace(found, expected=file.sha256, actual=actual)]

    def _fail(self) -> None:
        error, self.fail_next = self.fail_next, None
        if error is not None:
            raise error
