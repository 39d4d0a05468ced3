"""Registry against disk: what is missing, what is too much, what changed, and the repairs that are safe.

Nothing that could be somebody's only copy is deleted: unknown directories go to quarantine. Blocking.
"""

import os
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress

from modelhostd.adapters.blobs import BlobStore
from modelhostd.adapters.file_check import FileCheck
from modelhostd.adapters.layout import (
    BLOBS,
    FILES,
    MODELS,
    PARTS,
    QUARANTINE,
    TRASH,
    TREES,
    VERIFIED,
    tree_at,
)
from modelhostd.adapters.trees import TreeStore
from modelhostd.core.errors import ModelhostError
from modelhostd.core.findings import FindingKind
from modelhostd.core.manifest import Manifest
from modelhostd.core.names import ID
from modelhostd.core.paths import printable
from modelhostd.ports import Holdings, StorageFinding, StorageUse

FINDINGS_MAX = 10_000


class StorageCheck:
    """Compares the whole home directory with what the registry expects."""

    def __init__(self, store: BlobStore, trees: TreeStore, now: Callable[[], float]) -> None:
        self._store = store
        self._trees = trees
        self._now = now
        self.files = FileCheck(store)

    def run(
        self, expected: Mapping[str, Sequence[int]], *, deep: bool, repair: bool
    ) -> tuple[StorageFinding, ...]:
        """Return every difference, at most ``FINDINGS_MAX``; twice in a row repairs nothing more."""
        out: list[StorageFinding] = []
        for finding in self._findings(expected, deep=deep, repair=repair):
            out.append(finding)
            if len(out) >= FINDINGS_MAX:
                break
        return tuple(out)

    def _findings(
        self, expected: Mapping[str, Sequence[int]], *, deep: bool, repair: bool
    ) -> Iterator[StorageFinding]:
        for model in sorted(expected):
            for version in sorted(expected[model]):
                yield from self._artifact(model, version, deep=deep, repair=repair)
        yield from self._stray_trees(expected, repair=repair)
        yield from self._stray_blobs(repair=repair)
        yield from self._leftovers(repair=repair)

    def _artifact(
        self, model: str, version: int, *, deep: bool, repair: bool
    ) -> Iterator[StorageFinding]:
        name, segments = f"{model}/{version}", tree_at(model, version)
        if self._store.home.stat(segments) is None:
            yield StorageFinding(
                FindingKind.MISSING_TREE, name, f"{name} is not on disk; download the model again"
            )
            return
        try:
            manifest = self._trees.read_manifest(segments, name)
        except ModelhostError as error:
            yield StorageFinding(FindingKind.BROKEN_MANIFEST, name, error.message)
            return
        yield from self.files.check(manifest, deep=deep, repair=repair)
        known = {file.path for file in manifest.files}
        for path in self._walk((*segments, FILES)):
            if path not in known:
                shown = printable(f"{name}/{path}")
                message = f"{shown} is not in the manifest; remove it by hand"
                yield StorageFinding(FindingKind.EXTRA_FILE, shown, message)

    def _walk(self, segments: tuple[str, ...], prefix: str = "") -> Iterator[str]:
        for name in self._store.home.names(*segments):
            found = self._store.home.stat((*segments, name))
            if found is not None and stat.S_ISDIR(found.st_mode):
                yield from self._walk((*segments, name), f"{prefix}{name}/")
            elif found is not None:
                yield f"{prefix}{name}"

    def trees(self) -> Iterator[tuple[str, str]]:
        """Yield (model, version) of every entry below ``models``, as they are named on disk."""
        for model in self._store.home.names(*MODELS):
            found = self._store.home.stat((*MODELS, model))
            if found is None or not stat.S_ISDIR(found.st_mode):
                yield model, ""
                continue
            for version in self._store.home.names(*MODELS, model):
                yield model, version

    def _stray_trees(
        self, expected: Mapping[str, Sequence[int]], *, repair: bool
    ) -> Iterator[StorageFinding]:
        for model, version in list(self.trees()):
            number = int(version) if version.isascii() and version.isdigit() else 0
            if number in expected.get(model, ()) or self._trees.published(model, number):
                continue
            shown = printable(f"{model}/{version}")[1:-1]
            if repair:
                entry = (*MODELS, model, version) if version else (*MODELS, model)
                self._store.quarantine_tree(entry, {"tree": shown, "why": "not registered"})
            yield StorageFinding(
                FindingKind.STRAY_TREE,
                shown,
                f"{shown} is on disk and not registered",
                repairable=True,
                repaired=repair,
            )
        if repair:
            with self._store.commit, self._store.home.directory(*MODELS) as models:
                for model in os.listdir(models):
                    with suppress(OSError):
                        os.rmdir(model, dir_fd=models)

    def _blobs(self) -> Iterator[tuple[str, os.stat_result]]:
        for prefix in self._store.home.names(*BLOBS):
            for name in self._store.home.names(*BLOBS, prefix):
                found = self._store.home.stat((*BLOBS, prefix, name))
                if found is not None:
                    yield f"{prefix}/{name}", found

    def _stray_blobs(self, *, repair: bool) -> Iterator[StorageFinding]:
        for name, listed in list(self._blobs()):
            if listed.st_nlink > 1:
                continue
            sha256 = name.rpartition("/")[2]
            repaired = False
            # What is just being deleted or published has gone, or is some model's, when the lock is free.
            with self._store.commit:
                found = self._store.home.stat((*BLOBS, *name.split("/")))
                if found is None or found.st_nlink > 1 or self._store.held(sha256):
                    continue
                if repair:
                    with suppress(ModelhostError):
                        repaired = self._store.drop_blob(sha256) == found.st_size
            yield StorageFinding(
                FindingKind.STRAY_BLOB,
                sha256,
                f"blob {printable(sha256)} of {found.st_size} bytes belongs to no model",
                repairable=True,
                repaired=repaired,
            )

    def _leftovers(self, *, repair: bool) -> Iterator[StorageFinding]:
        """What no running step of this process made, and old partial downloads."""
        for segments, name in list(self._staged()):
            if repair:
                with self._store.commit, self._store.home.directory(*segments) as folder:
                    try:
                        shutil.rmtree(name, dir_fd=folder)
                    except NotADirectoryError:
                        os.unlink(name, dir_fd=folder)
            shown = printable("/".join((*segments, name)))[1:-1]
            yield StorageFinding(
                FindingKind.LEFTOVER_STAGING,
                shown,
                f"{shown} was left by an interrupted step",
                repairable=True,
                repaired=repair,
            )

    def _staged(self) -> Iterator[tuple[tuple[str, ...], str]]:
        home = self._store.home
        # Building and emptying hold the commit lock from first to last: with it, what is there is left.
        with self._store.commit:
            for segments in (TREES, TRASH):
                for name in home.names(*segments):
                    yield segments, name
        oldest = self._now() - self._store.config.part_ttl_s
        for segments in (PARTS, VERIFIED):
            for name in home.names(*segments):
                key = name.rpartition(".")[0] if segments is PARTS else name.partition("+")[0]
                found = home.stat((*segments, name))
                busy = self._store.claimed(key) or self._store.held(key)
                if found is not None and found.st_mtime < oldest and not busy:
                    yield segments, name

    def manifests(self) -> tuple[tuple[Manifest, ...], tuple[StorageFinding, ...]]:
        """Return every readable manifest below ``models`` whose directory is named as it says."""
        good: list[Manifest] = []
        broken: list[StorageFinding] = []
        for model, version in self.trees():
            name = printable(f"{model}/{version}")[1:-1]
            try:
                if ID.fullmatch(model) is None or not (version.isascii() and version.isdigit()):
                    raise ValueError("not a model's directory")
                manifest = self._trees.read_manifest(tree_at(model, int(version)), name)
                if (manifest.model, str(manifest.version)) != (model, version):
                    raise ValueError(f"its manifest is of {manifest.model}/{manifest.version}")
            except (ModelhostError, ValueError) as error:
                broken.append(StorageFinding(FindingKind.BROKEN_MANIFEST, name, str(error)))
                continue
            good.append(manifest)
        return tuple(good), tuple(broken)

    def holdings(self) -> Holdings:
        """Return who has which blobs. Of a broken manifest nothing is known: its blobs stay linked."""
        artifacts = {
            (manifest.model, manifest.version): {f.sha256: f.size_bytes for f in manifest.files}
            for manifest in self.manifests()[0]
        }
        return Holdings(artifacts, self._store.held_digests())

    def use(self) -> StorageUse:
        """Count bytes by what they are for."""
        home = self._store.home
        blobs = list(self._blobs())
        stray = sum(found.st_size for _, found in blobs if found.st_nlink == 1)
        staging = sum(self._bytes(part) for part in (PARTS, VERIFIED, TREES, TRASH))
        free, total = self._store.space.free_bytes()
        models: dict[str, int] = {}
        for manifest in self.manifests()[0]:
            models[manifest.model] = models.get(manifest.model, 0) + manifest.size_bytes
        return StorageUse(
            blob_bytes=sum(found.st_size for _, found in blobs),
            blob_count=len(blobs),
            staging_bytes=staging,
            quarantine_bytes=sum(
                self._size((*QUARANTINE, name)) for name in home.names(*QUARANTINE)
            ),
            reclaimable_bytes=stray + staging,
            free_bytes=free,
            total_bytes=total,
            model_bytes=models,
            room=self._store.space.room(),
        )

    def _bytes(self, segments: tuple[str, ...]) -> int:
        return sum(self._size((*segments, name)) for name in self._store.home.names(*segments))

    def _size(self, segments: tuple[str, ...]) -> int:
        found = self._store.home.stat(segments)
        if found is None:
            return 0
        if stat.S_ISDIR(found.st_mode):
            return self._bytes(segments)
        # A hard link is counted where its blob is.
        return found.st_size if found.st_nlink == 1 else 0
