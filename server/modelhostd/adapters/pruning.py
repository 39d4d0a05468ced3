"""Pruning: takes away what no model needs and no download counts on. Blocking."""

import os
import shutil
from collections.abc import Callable, Collection
from contextlib import suppress

from modelhostd.adapters.blobs import BlobStore
from modelhostd.adapters.layout import BLOBS, PARTS, TRASH, TREES, VERIFIED
from modelhostd.adapters.parts import read_journal
from modelhostd.core.errors import ModelhostError
from modelhostd.ports import Pruned

YOUNG_S = 600.0
"""Fetched files younger than this may be those of a download that begins just now."""


class Pruning:
    """Prunes one home directory."""

    def __init__(self, store: BlobStore, now: Callable[[], float]) -> None:
        self._store = store
        self._now = now

    def run(self, busy: Collection[str]) -> Pruned:
        """Remove blobs without a model and abandoned staging; ``busy`` models' downloads go on later."""
        freed = self._parts(busy) + self._half_built()
        if not busy:
            freed += self._verified()
        blob_bytes, blob_count = self._blobs()
        return Pruned(freed + blob_bytes, blob_count)

    def _parts(self, busy: Collection[str]) -> int:
        freed = 0
        for name in self._store.home.names(*PARTS):
            key, dot, suffix = name.rpartition(".")
            if not dot or suffix != "part" or self._store.claimed(key):
                continue
            journal = read_journal(self._store.home, key)
            if journal is None or journal.model not in busy:
                freed += self._store.drop_part(key)
        return freed

    def _half_built(self) -> int:
        # Building and emptying hold the lock from first to last: with it, what is there is left over.
        with self._store.commit:
            for segments in (TREES, TRASH):
                for name in self._store.home.names(*segments):
                    with self._store.home.directory(*segments) as folder:
                        shutil.rmtree(name, ignore_errors=True, dir_fd=folder)
        return 0  # their bytes are the blobs' and counted there

    def _verified(self) -> int:
        freed = 0
        for name in self._store.home.names(*VERIFIED):
            found = self._store.home.stat((*VERIFIED, name))
            sha256, _, key = name.partition("+")
            spoken_for = self._store.held(sha256) or self._store.claimed(key or sha256)
            if found is None or spoken_for or found.st_mtime > self._now() - YOUNG_S:
                continue
            with self._store.home.directory(*VERIFIED) as verified, suppress(FileNotFoundError):
                os.unlink(name, dir_fd=verified)
                freed += found.st_size
        return freed

    def _blobs(self) -> tuple[int, int]:
        freed = count = 0
        for prefix in self._store.home.names(*BLOBS):
            for sha256 in self._store.home.names(*BLOBS, prefix):
                # A name that is no digest is not ours to remove; CheckStorage tells of it.
                with self._store.commit, suppress(ModelhostError):
                    size = self._store.drop_blob(sha256)
                    freed += size
                    count += size > 0
        return freed, count
