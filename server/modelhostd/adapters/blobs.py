"""The blob store: a file's way from the first byte to a blob, and who counts on it.

A file travels ``staging/parts`` -> ``staging/verified`` -> ``blobs``, each step one rename after a sync.
A blob that no tree links (``st_nlink`` 1) belongs to nobody.

Methods block and may be called from any thread; the event loop calls none of them.
"""

import json
import os
import stat
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from modelhostd.adapters.failpoints import hit
from modelhostd.adapters.layout import (
    BLOBS,
    PARTS,
    QUARANTINE,
    VERIFIED,
    Home,
    blob_at,
    disk_errors,
    is_digest,
    open_regular,
    write_all,
)
from modelhostd.adapters.parts import Part, read_journal
from modelhostd.adapters.space import SpaceLedger
from modelhostd.core.values import dataclass


@dataclass(frozen=True, slots=True)
class StoreConfig:
    """Where the store is and how it treats the disk."""

    home: Path
    sync_bytes: int = 32 << 20
    """Data is synced each time so many bytes were written (8 to 64 MiB)."""
    reserve_bytes: int = 64 << 20
    """Free space that no download may promise itself: the database needs some too."""
    part_ttl_s: float = 7 * 86_400.0
    """How long an abandoned partial download is kept."""
    free_bytes: Callable[[], tuple[int, int]] | None = None
    """(free, total) bytes instead of the file system's own; for tests and quotas."""


SHA256_CHARS = 64
ACCEPTED_MAX = 100_000


class Stopped(Exception):
    """The transfer was cancelled while it waited for something."""


class BlobStore:
    """One home directory's blobs, trees, staging and quarantine."""

    def __init__(self, config: StoreConfig) -> None:
        self.config = config
        self.home = Home(config.home)
        # Publishing and deleting exclude each other: between a look at st_nlink and the unlink no
        # other thread may link the blob.
        self.commit = threading.RLock()
        self._state = threading.Condition()
        self._held: Counter[str] = Counter()
        self._claimed: set[str] = set()
        self.space = SpaceLedger(self.home, config.reserve_bytes, config.free_bytes)
        self._accepted: dict[str, tuple[str, str]] = {}

    def close(self) -> None:
        """Let go of the home directory."""
        self.home.close()

    # --- what is there --------------------------------------------------------------------------

    def has_blob(self, sha256: str, size: int) -> bool:
        """Tell whether a blob is there, whole by its size."""
        found = self.home.stat(blob_at(sha256))
        return found is not None and stat.S_ISREG(found.st_mode) and found.st_size == size

    def verified(self) -> dict[str, str]:
        """Return key -> sha256 of the files that are fetched and hashed and not yet a model's."""
        return {_key(name): name[:SHA256_CHARS] for name in self.home.names(*VERIFIED)}

    def found(self, key: str, size: int) -> str | None:
        """Return the SHA-256 of a file that this process has fetched whole, or None.

        For the moment a claim is held: what was there before is listed once, by ``verified``.
        """
        with self._state:
            sha256, name = self._accepted.get(key, (key, key))
        if len(sha256) != SHA256_CHARS:
            return None
        whole = self.has_blob(sha256, size) or self.home.stat((*VERIFIED, name)) is not None
        return sha256 if whole else None

    # --- one writer for each file, and blobs that are spoken for --------------------------------

    @contextmanager
    def claim(self, key: str, cancelled: Callable[[], bool]) -> Iterator[None]:
        """Be the only one who writes a part; waits for the one who does. Raises Stopped."""
        with self._state:
            while key in self._claimed:
                if cancelled():
                    raise Stopped
                self._state.wait(0.05)
            self._claimed.add(key)
        try:
            yield
        finally:
            with self._state:
                self._claimed.discard(key)
                self._state.notify_all()

    @contextmanager
    def hold(self, digests: Iterable[str]) -> Iterator[None]:
        """Keep blobs from being deleted while a download counts on them."""
        held = tuple(digests)
        with self._state:
            self._held.update(held)
        try:
            yield
        finally:
            with self._state:
                self._held.subtract(held)
                self._held = +self._held

    def held_digests(self) -> frozenset[str]:
        """Return the blobs that downloads count on."""
        with self._state:
            return frozenset(digest for digest, count in self._held.items() if count > 0)

    def held(self, sha256: str) -> bool:
        """Tell whether a download counts on a blob."""
        with self._state:
            return self._held[sha256] > 0

    @contextmanager
    def reserve(self, owner: str, needed: int) -> Iterator[Callable[[int], None]]:
        """Promise disk space to one download; yields a function that takes off what was written.

        Raises INSUFFICIENT_DISK_SPACE with the numbers.
        """
        try:
            yield self.space.promise(owner, needed)
        finally:
            self.space.release(owner)

    # --- from part to blob ----------------------------------------------------------------------

    def open_part(self, key: str, size: int, model: str) -> Part:
        """Open (or go on with) a part; the caller holds its claim."""
        return Part(self.home, key, size, model, self.config.sync_bytes)

    def accept(self, part: Part, sha256: str) -> None:
        """Move a part whose digest is right to the verified files; durable when this returns."""
        part.complete()
        name = sha256 if part.key == sha256 else f"{sha256}+{part.key}"
        with self.home.directory(*PARTS) as parts, self.home.directory(*VERIFIED) as verified:
            os.rename(f"{part.key}.part", name, src_dir_fd=parts, dst_dir_fd=verified)
            hit("verified.renamed")
            os.fsync(verified)
            hit("verified.dir_synced")
            with self._state:
                self._accepted[part.key] = (sha256, name)
                while len(self._accepted) > ACCEPTED_MAX:
                    del self._accepted[next(iter(self._accepted))]
            with suppress(FileNotFoundError):
                os.unlink(f"{part.key}.json", dir_fd=parts)

    def quarantine_part(self, part: Part, facts: Mapping[str, str]) -> str:
        """Move a part that is not what it should be out of the way, with a note why; return its name."""
        with self.home.directory(*PARTS) as parts:
            name = self._quarantine(parts, f"{part.key}.part", {**facts, "key": part.key})
            with suppress(FileNotFoundError):
                os.unlink(f"{part.key}.json", dir_fd=parts)
        return name

    def _quarantine(self, directory: int, entry: str, facts: Mapping[str, str]) -> str:
        name = f"{int(time.time())}-{uuid.uuid4().hex[:12]}"
        note = json.dumps({"time": time.time(), **facts}, indent=1).encode()
        with self.home.directory(*QUARANTINE) as quarantine:
            # The note first: what lies in quarantine always says why.
            fd = open_regular(quarantine, f"{name}.json", os.O_WRONLY | os.O_CREAT | os.O_EXCL)
            try:
                write_all(fd, note)
            finally:
                os.close(fd)
            os.rename(entry, name, src_dir_fd=directory, dst_dir_fd=quarantine)
        return name

    def quarantine_tree(self, segments: tuple[str, ...], facts: Mapping[str, str]) -> str:
        """Move a directory that the registry does not know out of sight, with a note why."""
        with self.home.parent(segments) as (directory, entry):
            return self._quarantine(directory, entry, facts)

    def verified_names(self) -> dict[str, str]:
        """Return sha256 -> name of the verified files, for ``open_content``."""
        return {name[:SHA256_CHARS]: name for name in self.home.names(*VERIFIED)}

    def open_content(self, sha256: str, names: Mapping[str, str]) -> int:
        """Open a blob or a verified file (``verified_names``) for reading; returns its descriptor."""
        # A download of the same file may publish it between the listing and now, and a deletion of the
        # model that had it give it back.
        for place in ((*VERIFIED, names.get(sha256, sha256)), blob_at(sha256)):
            with suppress(FileNotFoundError):
                return self.home.open_file(place)
        return self.home.open_file((*VERIFIED, sha256))

    def drop_verified(self, sha256: str) -> None:
        """Forget a verified file that turned out to be of no use."""
        with self.home.directory(*VERIFIED) as verified:
            for name in os.listdir(verified):
                if name.startswith(sha256):
                    os.unlink(name, dir_fd=verified)

    def store_verified(self, sizes: Mapping[str, int]) -> None:
        """Move the verified files among these digests into the blob store; durable on return.

        The caller holds ``commit``. ``sizes`` is sha256 -> bytes; a blob of another size is replaced.
        """
        names: dict[str, list[str]] = {}
        for name in self.home.names(*VERIFIED):
            names.setdefault(name[:SHA256_CHARS], []).append(name)
        found = sorted(sizes.keys() & names.keys())
        if not found:
            return
        touched = {sha256[:2] for sha256 in found}
        # Together: each sync is a commit of the file system's journal.
        with self.home.directory(*BLOBS) as blobs:
            for prefix in sorted(touched):
                with suppress(FileExistsError):
                    os.mkdir(prefix, 0o700, dir_fd=blobs)
            os.fsync(blobs)
        with self.home.directory(*VERIFIED) as verified:
            for sha256 in found:
                first, *others = names[sha256]
                if self.has_blob(sha256, sizes[sha256]):
                    others.append(first)
                else:
                    with self.home.parent(blob_at(sha256)) as (blobs, name):
                        fd = open_regular(verified, first, os.O_RDONLY)
                        try:
                            os.fchmod(fd, 0o444)
                        finally:
                            os.close(fd)
                        os.rename(first, name, src_dir_fd=verified, dst_dir_fd=blobs)
                for other in others:  # fetched once more under another name
                    os.unlink(other, dir_fd=verified)
                hit("publish.blob_renamed")
        for prefix in sorted(touched):
            with self.home.directory(*BLOBS, prefix) as blobs:
                os.fsync(blobs)
        hit("publish.blobs_synced")

    def digests(self) -> list[str]:
        """Return every blob's digest."""
        home = self.home
        names = (n for prefix in home.names(*BLOBS) for n in home.names(*BLOBS, prefix))
        return [name for name in names if is_digest(name)]

    def give_back(self, digests: Iterable[str]) -> None:
        """Make blobs that no tree links verified files again.

        A download goes on from those, and what nobody wants for a week is a leftover. The caller holds
        ``commit``.
        """
        for sha256 in digests:
            found = self.home.stat(blob_at(sha256))
            if found is None or found.st_nlink > 1:
                continue
            with (
                self.home.directory(*VERIFIED) as verified,
                self.home.parent(blob_at(sha256)) as (blobs, name),
            ):
                os.rename(name, sha256, src_dir_fd=blobs, dst_dir_fd=verified)

    def quarantine_blob(self, sha256: str, facts: Mapping[str, str]) -> str:
        """Take a blob whose bytes changed out of the store, so that the next download fetches it."""
        with self.commit, self.home.parent(blob_at(sha256)) as (blobs, name):
            return self._quarantine(blobs, name, {**facts, "key": sha256})

    def drop_blob(self, sha256: str) -> int:
        """Remove a blob that no tree links; return the bytes freed.

        One that a download counts on is a verified file again. The caller holds ``commit``.
        """
        found = self.home.stat(blob_at(sha256))
        if found is None or found.st_nlink > 1:
            return 0
        if self.held(sha256):
            self.give_back([sha256])
            return 0
        with self.home.parent(blob_at(sha256)) as (blobs, name):
            os.unlink(name, dir_fd=blobs)
        return found.st_size

    def drop_parts(self, model: str) -> int:
        """Remove the partial downloads that were begun for a model and that nobody writes now."""
        freed = 0
        with disk_errors(self.home.shown(*PARTS)):
            for name in self.home.names(*PARTS):
                key, dot, suffix = name.rpartition(".")
                if not dot or suffix != "part":
                    continue
                journal = read_journal(self.home, key)
                if journal is None or journal.model != model:
                    continue
                with self._state:
                    if key in self._claimed:
                        continue
                freed += self.drop_part(key)
        return freed

    def drop_lone_journals(self) -> None:
        """Remove journals whose part is gone, and halves of journals. Nobody may be writing."""
        with self.home.directory(*PARTS) as parts:
            names = set(os.listdir(parts))
            for name in names:
                key, _, suffix = name.rpartition(".")
                if suffix == "new" or (suffix == "json" and f"{key}.part" not in names):
                    os.unlink(name, dir_fd=parts)

    def drop_part(self, key: str) -> int:
        """Remove one part and its journal; return the bytes freed."""
        found = self.home.stat((*PARTS, f"{key}.part"))
        with self.home.directory(*PARTS) as parts:
            for suffix in ("part", "json", "new"):
                with suppress(FileNotFoundError):
                    os.unlink(f"{key}.{suffix}", dir_fd=parts)
        return found.st_size if found else 0

    def claimed(self, key: str) -> bool:
        """Tell whether somebody writes this part now."""
        with self._state:
            return key in self._claimed


def _key(name: str) -> str:
    """``<sha256>+<key>`` -> key; a bare ``<sha256>`` is its own key."""
    return name.partition("+")[2] or name
