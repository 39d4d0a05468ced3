"""The Files port: the trees and blobs below the home directory, for the loop. Blocking work in threads."""

import asyncio
import json
import os
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from modelhostd.adapters.blobs import BlobStore
from modelhostd.adapters.layout import FILES, disk_errors, tree_at
from modelhostd.adapters.pruning import Pruning
from modelhostd.adapters.quarantine import Quarantine
from modelhostd.adapters.storage_check import StorageCheck
from modelhostd.adapters.threads import in_thread
from modelhostd.adapters.trees import TreeStore
from modelhostd.adapters.uses import read_uses, write_uses
from modelhostd.adapters.verifying import Verifying
from modelhostd.core.manifest import Manifest
from modelhostd.core.resources import ModelFile, Progress
from modelhostd.ports import (
    Holdings,
    Pace,
    Pruned,
    Quarantined,
    Room,
    StorageFinding,
    StorageUse,
)

THREADS_MAX = 4
"""Pieces of file work at once; more would only make the disk seek."""

CONFIG_BYTES_MAX = 1 << 20

T = TypeVar("T")


class FileStore:
    """The files of one home directory; satisfies ``ports.Files``."""

    def __init__(
        self, store: BlobStore, trees: TreeStore, *, now: Callable[[], float] = time.time
    ) -> None:
        self._store = store
        self._trees = trees
        self._check = StorageCheck(store, trees, now)
        self._pruning = Pruning(store, now)
        self._quarantine = Quarantine(store)
        self._slots = asyncio.Semaphore(THREADS_MAX)

    def model_dir(self, model: str, version: int) -> Path:
        """Return the directory with the files of one artifact."""
        return self._store.home.shown(*tree_at(model, version), FILES)

    async def list_files(self, model: str, version: int) -> Sequence[ModelFile]:
        """Return the manifest's files in the order of their paths."""
        return (await self._run(partial(self._manifest, model, version))).files

    async def read_config(self, model: str, version: int) -> Mapping[str, Any]:
        """Return the artifact's ``config.json``, or nothing."""
        return await self._run(partial(_read_config, self.model_dir(model, version)))

    async def on_disk(self, models: Collection[str]) -> Mapping[str, Sequence[int]]:
        """Return which artifacts of these models lie on disk: model -> versions."""
        return await self._run(partial(self._trees.on_disk, tuple(models)))

    async def delete_artifact(self, model: str, version: int, *, keep_bytes: bool = False) -> int:
        """Remove one artifact, the blobs that nobody else needs and the model's abandoned parts.

        With ``keep_bytes`` blobs and parts are left to the next download.
        """

        def work() -> int:
            if keep_bytes:
                return self._trees.remove(model, version, keep_bytes=True)
            return self._trees.remove(model, version) + self._store.drop_parts(model)

        return await self._run(work)

    async def verify(
        self,
        model: str,
        version: int,
        report: Callable[[Progress], None],
        pace: Pace | None = None,
    ) -> Sequence[StorageFinding]:
        """Hash every file again. A blob whose bytes changed goes to quarantine, so that the next
        download fetches it; the model's directory stays as it is until then.
        """
        loop = asyncio.get_running_loop()
        stop = threading.Event()

        def tell(progress: Progress) -> None:
            if not stop.is_set():
                loop.call_soon_threadsafe(report, progress)

        def work() -> Sequence[StorageFinding]:
            manifest = self._manifest(model, version)
            return Verifying(self._check.files, manifest, tell, stop, pace).run()

        try:
            return await self._run(work)
        except asyncio.CancelledError:
            stop.set()
            raise

    async def check(
        self, expected: Mapping[str, Sequence[int]], *, deep: bool, repair: bool
    ) -> Sequence[StorageFinding]:
        """Compare the disk with ``expected``; see ``core.findings`` for what is found and repaired."""
        wanted = {model: tuple(versions) for model, versions in expected.items()}
        return await self._run(partial(self._check.run, wanted, deep=deep, repair=repair))

    async def use(self) -> StorageUse:
        """Count bytes."""
        return await self._run(self._check.use)

    def limit_bytes(self, budget: int) -> None:
        """Let files take ``budget`` bytes of the disk; 0 = as much as it has."""
        self._store.space.limit(budget)

    async def room(self) -> Room:
        """Return what downloads may still take."""
        return await self._run(self._store.space.room)

    async def holdings(self) -> Holdings:
        """Return who has which blobs, by the manifests on disk."""
        return await self._run(self._check.holdings)

    async def read_uses(self) -> Mapping[str, float]:
        """Return when each model was last used, as far as it is known."""
        return await self._run(partial(read_uses, self._store.home.path))

    async def write_uses(self, uses: Mapping[str, float]) -> None:
        """Store it."""
        await self._run(partial(write_uses, self._store.home.path, dict(uses)))

    async def prune(self, busy: Collection[str], *, dry_run: bool = False) -> Pruned:
        """Remove blobs of no artifact and what interrupted downloads left, but for ``busy`` models'."""
        return await self._run(partial(self._pruning.run, frozenset(busy), dry_run=dry_run))

    async def quarantined(self) -> Sequence[Quarantined]:
        """Return what is in quarantine, the newest first."""
        return await self._run(self._quarantine.list)

    async def restore_quarantined(self, name: str) -> str:
        """Make a file a fetched one, under the digest that it has; return its model."""
        return await self._run(partial(self._quarantine.restore, name))

    async def delete_quarantined(self, name: str) -> None:
        """Delete a file of the quarantine for good."""
        await self._run(partial(self._quarantine.delete, name))

    async def recover(self) -> None:
        """Finish what a crash interrupted; at start, before the first download."""
        await self._run(self._trees.recover)

    async def read_manifests(self) -> tuple[Sequence[Manifest], Sequence[StorageFinding]]:
        """Return every manifest that can be read, to rebuild a lost registry, and the broken ones."""
        return await self._run(self._check.manifests)

    async def _run(self, work: Callable[[], T]) -> T:
        async with self._slots:
            return await asyncio.shield(in_thread(partial(self._guarded, work)))

    def _guarded(self, work: Callable[[], T]) -> T:
        with disk_errors(self._store.home.path):
            return work()

    def _manifest(self, model: str, version: int) -> Manifest:
        return self._trees.read_manifest(tree_at(model, version), f"{model}/{version}")


def _read_config(folder: Path) -> Mapping[str, Any]:
    try:
        fd = os.open(folder / "config.json", os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        with open(fd, "rb") as file:
            data = file.read(CONFIG_BYTES_MAX + 1)
        found = json.loads(data) if len(data) <= CONFIG_BYTES_MAX else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
