"""What goes wrong with the database, as errors that name the file and the next step."""

import errno
import os
import sqlite3
from pathlib import Path

from modelhostd.core.errors import ModelhostError, Reason

_NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT})
_NO_PERMISSION = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})
_DENIED_BY_SQLITE = frozenset({sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM, sqlite3.SQLITE_AUTH})


class CorruptDatabaseError(ModelhostError):
    """The database is not what it should be; only a rebuild helps."""


def _primary(error: Exception) -> int | None:
    """Return SQLite's primary result code: the low byte of the extended one."""
    code = getattr(error, "sqlite_errorcode", None)
    return None if code is None else code & 0xFF


def _shown(error: Exception) -> str:
    name = getattr(error, "sqlite_errorname", None)
    return f"{error} ({name})" if name else str(error)


def _storage(path: Path, message: str, cause: str) -> ModelhostError:
    return ModelhostError(Reason.STORAGE_ERROR, message, {"path": str(path), "cause": cause[:200]})


def corrupt(path: Path, cause: str) -> ModelhostError:
    """Return the error of a database that cannot be read; it was left as it is."""
    return CorruptDatabaseError(
        Reason.STORAGE_ERROR,
        f"the database {path} cannot be read: {cause}. It was left as it is; "
        "`modelhostd fsck --rebuild` moves it aside and rebuilds the registry from the models' "
        "manifests",
        {"path": str(path), "cause": cause[:200]},
    )


def newer(path: Path, found: int, known: int) -> ModelhostError:
    """Return the error of a database that a newer modelhostd wrote."""
    return _storage(
        path,
        f"the database {path} has schema version {found}, this modelhostd knows up to {known}. It "
        "was left as it is; start the newer modelhostd again, or choose another --home",
        f"schema version {found}, known {known}",
    )


def denied(path: Path, cause: str) -> ModelhostError:
    """Return the error of a home that this user may not write."""
    return ModelhostError(
        Reason.PERMISSION_DENIED_ON_DISK,
        f"{path} cannot be read and written: {cause}. Give {path.parent} to the user that runs "
        "modelhostd, or choose another --home",
        {"path": str(path)},
    )


def full(path: Path, needed_bytes: int) -> ModelhostError:
    """Return the error of a write for which there was no room."""
    try:
        status = os.statvfs(path.parent)
        free = str(status.f_bavail * status.f_frsize)
    except OSError:
        free = "unknown"
    return ModelhostError(
        Reason.INSUFFICIENT_DISK_SPACE,
        f"no room to write {needed_bytes} bytes to {path} ({free} bytes free); nothing was changed. "
        "Free disk space and try again",
        {"path": str(path), "neededBytes": str(needed_bytes), "freeBytes": free},
    )


def opening(path: Path, error: Exception) -> ModelhostError:
    """Return what a failure to open means."""
    if isinstance(error, OSError):
        if error.errno in _NO_PERMISSION:
            return denied(path, error.strerror or str(error))
        if error.errno in _NO_SPACE:
            return full(path, 4096)
        return _storage(
            path, f"the database {path} cannot be opened: {error.strerror or error}", str(error)
        )
    code = _primary(error)
    if code in _DENIED_BY_SQLITE or (code == sqlite3.SQLITE_CANTOPEN and _not_ours(path)):
        return denied(path, _shown(error))
    if code == sqlite3.SQLITE_FULL:
        return full(path, 4096)
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return _storage(
            path, f"another process has the database {path} open; end it first", _shown(error)
        )
    if code in (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN):
        return _storage(
            path, f"the database {path} cannot be opened: {_shown(error)}", _shown(error)
        )
    return corrupt(path, _shown(error))


def _not_ours(path: Path) -> bool:
    return not (os.access(path.parent, os.W_OK | os.X_OK) and os.access(path, os.R_OK | os.W_OK))


def committing(path: Path, error: Exception, size_bytes: int) -> ModelhostError:
    """Return what a failure to commit means; nothing of the batch is stored."""
    no_space = isinstance(error, OSError) and error.errno in _NO_SPACE
    if no_space or _primary(error) == sqlite3.SQLITE_FULL:
        return full(path, size_bytes)
    return _storage(
        path,
        f"writing to the database {path} failed, nothing was changed: {_shown(error)}. If it does "
        "not pass by itself, stop the daemon and run `modelhostd fsck`",
        _shown(error),
    )


def reading(path: Path, error: Exception) -> ModelhostError:
    """Return what a failure to read events means."""
    return _storage(
        path,
        f"reading the database {path} failed: {_shown(error)}. If it does not pass by itself, stop "
        "the daemon and run `modelhostd fsck`",
        _shown(error),
    )


def not_storable(path: Path, error: Exception) -> ModelhostError:
    """Return the error of a value that could not be read back; nothing is stored."""
    return _storage(path, f"a change cannot be stored, nothing was changed: {error}", "encoding")


def gap(path: Path, sequence: int, expected: int) -> ModelhostError:
    """Return the error of a batch that does not continue the log."""
    return _storage(
        path,
        f"an event with sequence {sequence} came where {expected} is next; nothing was changed",
        "sequence",
    )


def closed(path: Path) -> ModelhostError:
    """Return the error of a call before open or after close."""
    return _storage(path, f"the database {path} is not open", "closed")
