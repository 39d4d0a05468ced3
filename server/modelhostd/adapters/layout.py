"""Where everything is below the home directory, and the only way to get there.

    blobs/sha256/<2hex>/<64hex>              verified files, 0444
    models/<id>/<version>/manifest.json
    models/<id>/<version>/files/<path>       hard links into blobs
    staging/parts/<key>.part, <key>.json     what is being fetched, with its journal
    staging/verified/<sha256>[+<key>]        whole and hashed, not yet of any model
    staging/trees/<name>/                    a model's directory while it is built
    staging/trash/<name>/                    what is being deleted
    quarantine/<name>, <name>.json           what did not match, and why

Every directory is opened segment by segment beneath a descriptor of the home, without following
symbolic links; every name is checked first. All directories are 0700.
"""

import errno
import os
import re
import stat
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.names import ID
from modelhostd.core.paths import unsafe_path

PARTS = ("staging", "parts")
VERIFIED = ("staging", "verified")
TREES = ("staging", "trees")
TRASH = ("staging", "trash")
QUARANTINE = ("quarantine",)
MODELS = ("models",)
BLOBS = ("blobs", "sha256")
MANIFEST = "manifest.json"
FILES = "files"

_SHA256 = re.compile(r"[0-9a-f]{64}")
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def is_digest(name: str) -> bool:
    """Tell whether a name is a SHA-256 as blobs are named by."""
    return _SHA256.fullmatch(name) is not None


def blob_at(sha256: str) -> tuple[str, ...]:
    """Return the segments of a blob; the digest is checked, so that it cannot be a path."""
    if not is_digest(sha256):
        raise unsafe_path(sha256, "it is not a SHA-256 in lower-case hexadecimal")
    return (*BLOBS, sha256[:2], sha256)


def tree_at(model: str, version: int) -> tuple[str, ...]:
    """Return the segments of one artifact's directory."""
    if ID.fullmatch(model) is None or version < 1:
        raise unsafe_path(f"{model}/{version}", "it is not a model id and a version")
    return (*MODELS, model, str(version))


class Home:
    """A home directory, held by a descriptor: renaming it under our feet moves nothing elsewhere."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with disk_errors(path):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        # Also where nobody closes it: the descriptor goes with the object.
        self._close = weakref.finalize(self, os.close, self._fd)
        for segments in (PARTS, VERIFIED, TREES, TRASH, QUARANTINE, MODELS, BLOBS):
            with self.directory(*segments, create=True):
                pass

    def close(self) -> None:
        """Let go of the directory."""
        self._close()

    def shown(self, *segments: str) -> Path:
        """Return a path for messages and for readers (the worker opens models by it)."""
        return self.path.joinpath(*segments)

    @contextmanager
    def directory(self, *segments: str, create: bool = False) -> Iterator[int]:
        """Open a directory below home; yields its descriptor.

        ``create`` makes what is missing (0700) and syncs the parent of what it made. Raises
        FileNotFoundError for a missing one, STORAGE_ERROR for a symbolic link or a file on the way.
        """
        fd = os.dup(self._fd)
        try:
            for segment in segments:
                _check_segment(segment)
                if create:
                    try:
                        os.mkdir(segment, 0o700, dir_fd=fd)
                        os.fsync(fd)
                    except FileExistsError:
                        pass
                try:
                    deeper = os.open(segment, _DIRECTORY, dir_fd=fd)
                except OSError as error:
                    if error.errno in {errno.ELOOP, errno.ENOTDIR}:
                        raise _not_a_directory(self.shown(*segments)) from None
                    raise
                os.close(fd)
                fd = deeper
            yield fd
        finally:
            os.close(fd)

    @contextmanager
    def parent(
        self, segments: tuple[str, ...], *, create: bool = False
    ) -> Iterator[tuple[int, str]]:
        """Open the directory that holds an entry; yields (descriptor, name)."""
        _check_segment(segments[-1])
        with self.directory(*segments[:-1], create=create) as fd:
            yield fd, segments[-1]

    def open_file(self, segments: tuple[str, ...], flags: int = os.O_RDONLY) -> int:
        """Open a regular file below home without following links; returns its descriptor."""
        with self.parent(segments) as (directory, name):
            return open_regular(directory, name, flags)

    def stat(self, segments: tuple[str, ...]) -> os.stat_result | None:
        """Return the entry's stat (of a link itself), or None when it is not there."""
        try:
            with self.parent(segments) as (directory, name):
                return os.stat(name, dir_fd=directory, follow_symlinks=False)
        except FileNotFoundError:
            return None

    def names(self, *segments: str) -> list[str]:
        """Return the names in a directory, sorted; none when it is not there."""
        try:
            with self.directory(*segments) as fd:
                return sorted(os.listdir(fd))
        except FileNotFoundError:
            return []

    def free_bytes(self) -> tuple[int, int]:
        """Return (free for us, total) bytes of the file system below home."""
        facts = os.fstatvfs(self._fd)
        return facts.f_bavail * facts.f_frsize, facts.f_blocks * facts.f_frsize


def open_regular(directory: int, name: str, flags: int, mode: int = 0o600) -> int:
    """Open a regular file in an open directory, not through a link. Raises STORAGE_ERROR otherwise."""
    fd = os.open(name, flags | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, mode, dir_fd=directory)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise ModelhostError(
            Reason.STORAGE_ERROR,
            f"{name} below the home directory is not a regular file; remove it",
            {"path": name, "cause": "not a regular file"},
        )
    return fd


def write_all(fd: int, data: bytes | memoryview) -> None:
    """Write all of ``data`` at the descriptor's position."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn the operating system's errors on our own files into the reasons a caller can act on."""
    try:
        yield
    except OSError as error:
        raise disk_error(error, path) from error


def disk_error(error: OSError, path: Path) -> ModelhostError:
    """Return INSUFFICIENT_DISK_SPACE, PERMISSION_DENIED_ON_DISK or STORAGE_ERROR for an OSError."""
    cause = f"{errno.errorcode.get(error.errno or 0, 'error')}: {error.strerror or error}"
    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return ModelhostError(
            Reason.INSUFFICIENT_DISK_SPACE,
            f"{path} is full ({cause}); free some space, what was fetched is kept",
            {"path": str(path)},
        )
    if error.errno in {errno.EACCES, errno.EPERM, errno.EROFS}:
        return ModelhostError(
            Reason.PERMISSION_DENIED_ON_DISK,
            f"{path} cannot be written ({cause}); the daemon's user must own the home directory",
            {"path": str(path)},
        )
    return ModelhostError(
        Reason.STORAGE_ERROR,
        f"{path}: {cause}; check the disk, then try again",
        {"path": str(path), "cause": cause},
    )


def _check_segment(segment: str) -> None:
    # Names from outside were judged as whole paths before (core.paths); this holds the line whatever
    # a caller forgot.
    if segment in {"", ".", ".."} or "/" in segment or "\0" in segment:
        raise unsafe_path(segment, "it is not one segment of a path")


def _not_a_directory(path: Path) -> ModelhostError:
    return ModelhostError(
        Reason.STORAGE_ERROR,
        f"{path} holds a symbolic link or a file where a directory of ours must be; remove it",
        {"path": str(path), "cause": "not a directory"},
    )
