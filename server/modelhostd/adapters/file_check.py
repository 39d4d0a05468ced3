"""The files of one artifact against its manifest, by size or byte by byte. Blocking."""

import errno
import hashlib
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import suppress

from modelhostd.adapters.blobs import BlobStore
from modelhostd.adapters.layout import FILES, blob_at, tree_at
from modelhostd.core.findings import FindingKind
from modelhostd.core.manifest import Manifest
from modelhostd.core.resources import ModelFile
from modelhostd.ports import StorageFinding

HASH_BYTES = 1 << 20


class FileCheck:
    """Compares the files of one artifact with its manifest."""

    def __init__(self, store: BlobStore) -> None:
        self._store = store

    def check(
        self,
        manifest: Manifest,
        *,
        deep: bool,
        repair: bool,
        step: Callable[[ModelFile, int], None] = lambda _file, _position: None,
    ) -> Iterator[StorageFinding]:
        """Yield what is wrong; ``step`` is called with a file and the bytes of it that were read."""
        for file in manifest.files:
            yield from self._file(manifest, file, deep=deep, repair=repair, step=step)

    def _file(
        self,
        manifest: Manifest,
        file: ModelFile,
        *,
        deep: bool,
        repair: bool,
        step: Callable[[ModelFile, int], None],
    ) -> Iterator[StorageFinding]:
        name = f"{manifest.model}/{manifest.version}/{file.path}"
        segments = (*tree_at(manifest.model, manifest.version), FILES, *file.path.split("/"))
        found = self._store.home.stat(segments)
        if found is None or not stat.S_ISREG(found.st_mode):
            whole = self._store.has_blob(file.sha256, file.size_bytes)
            if whole and repair and found is None:
                self._link(blob_at(file.sha256), segments)
            yield StorageFinding(
                FindingKind.MISSING_FILE,
                name,
                f"{name} is not there; " + ("its blob is" if whole else "download the model again"),
                repairable=whole,
                repaired=whole and repair and found is None,
            )
            return
        if found.st_size != file.size_bytes:
            yield StorageFinding(
                FindingKind.WRONG_SIZE,
                name,
                f"{name} has {found.st_size} bytes, its manifest says {file.size_bytes}; download the "
                "model again",
            )
            return
        if deep and (actual := self._hash(segments, file, step)) != file.sha256:
            moved = self._distrust(name, file, actual, found.st_ino) if repair else ""
            yield StorageFinding(
                FindingKind.CORRUPT_FILE,
                name,
                f"{name}: expected SHA-256 {file.sha256}, found {actual}{moved}; download the model "
                "again",
                expected=file.sha256,
                actual=actual,
            )
            return
        if self._store.home.stat(blob_at(file.sha256)) is None:
            if repair:
                self._link(segments, blob_at(file.sha256))
            yield StorageFinding(
                FindingKind.MISSING_BLOB,
                name,
                f"{name} is there and its blob {file.sha256} is not",
                repairable=True,
                repaired=repair,
            )

    def _hash(
        self, segments: tuple[str, ...], file: ModelFile, step: Callable[[ModelFile, int], None]
    ) -> str:
        digest = hashlib.sha256()
        buffer = memoryview(bytearray(HASH_BYTES))
        position = 0
        fd = self._store.home.open_file(segments)
        try:
            while count := os.readv(fd, [buffer]):
                digest.update(buffer[:count])
                position += count
                step(file, position)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            return "nothing: the disk cannot read it (EIO)"
        finally:
            os.close(fd)
        return digest.hexdigest()

    def _distrust(self, name: str, file: ModelFile, actual: str, inode: int) -> str:
        """Take the blob out of the store if it is the same bad bytes: the next download fetches it."""
        blob = self._store.home.stat(blob_at(file.sha256))
        if blob is None or blob.st_ino != inode:
            return ""
        model = name.partition("/")[0]
        facts = {"model": model, "file": file.path, "expected": file.sha256, "actual": actual}
        where = self._store.quarantine_blob(file.sha256, facts)
        return f", now in quarantine as {where}"

    def _link(self, existing: tuple[str, ...], wanted: tuple[str, ...]) -> None:
        with (
            self._store.commit,
            self._store.home.parent(existing) as (source, name),
            self._store.home.parent(wanted, create=True) as (folder, new),
        ):
            with suppress(FileExistsError):
                os.link(name, new, src_dir_fd=source, dst_dir_fd=folder, follow_symlinks=False)
            os.fsync(folder)
