"""Pruning: takes away what no model needs and no download counts on, or tells what that would free. Blocking."""

import os
import shutil
from collections.abc import Callable, Collection
from contextlib import suppress

from modelhostd.adapters.blobs import BlobStore
from modelhostd.adapters.layout import BLOBS, PARTS, TRASH, TREES, VERIFIED, blob_at, is_digest
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

    def run(self, busy: Collection[str], *, dry_run: bool = False) -> Pruned:
        """Remove blobs without a model and abandoned staging; ``busy`` models' downloads go on later."""
        freed = self._parts(busy, dry_run)
        if not dry_run:
            self._half_built()
        if not busy:
            freed += self._verified(dry_run)
        blob_bytes, blob_count = self._blobs(dry_run)
        return Pruned(freed + blob_bytes, blob_count)

    def _parts(self, busy: Collection[str], dry_run: bool) -> int:
        freed = 0
        for name in self._store.home.names(*PARTS):
            key, dot, suffix = name.rpartition(".")
            if not dot or suffix != "part" or self._store.claimed(key):
                continue
            journal = read_journal(self._store.home, key)
            if journal is None or journal.model not in busy:
                found = self._store.home.stat((*PARTS, name)) if dry_run else None
                freed += (found.st_size if found else 0) if dry_run else self._store.drop_part(key)
        return freed

    def _half_built(self) -> None:
        """Their bytes are the blobs' and counted there."""
        # Building and emptying hold the lock from first to last: with it, what is there is left over.
        with self._store.commit:
            for segments in (TREES, TRASH):
                for name in self._store.home.names(*segments):
                    with self._store.home.directory(*segments) as folder:
                        shutil.rmtree(name, ignore_errors=True, dir_fd=folder)

    def _verified(self, dry_run: bool) -> int:
        freed = 0
        for name in self._store.home.names(*VERIFIED):
            found = self._store.home.stat((*VERIFIED, name))
            sha256, _, key = name.partition("+")
            spoken_for = self._store.held(sha256) or self._store.claimed(key or sha256)
            if found is None or spoken_for or found.st_mtime > self._now() - YOUNG_S:
                continue
            with self._store.home.directory(*VERIFIED) as verified, suppress(FileNotFoundError):
                if not dry_run:
                    os.unlink(name, dir_fd=verified)
                freed += found.st_size
        return freed

    def _blobs(self, dry_run: bool) -> tuple[int, int]:
        freed = count = 0
        for prefix in self._store.home.names(*BLOBS):
            for sha256 in self._store.home.names(*BLOBS, prefix):
                # A name that is no digest is not ours to remove; CheckStorage tells of it.
                with self._store.commit, suppress(ModelhostError):
                    size = self._of_nobody(sha256) if dry_run else self._store.drop_blob(sha256)
                    freed += size
                    count += size > 0
        return freed, count

    def _of_nobody(self, sha256: str) -> int:
        found = self._store.home.stat(blob_at(sha256)) if is_digest(sha256) else None
        spoken_for = found is None or found.st_nlink > 1 or self._store.held(sha256)
        return 0 if spoken_for or found is None else found.st_size
