"""One daemon a home: an advisory lock on ``<home>/lock`` for the life of the process.

The descriptor is close-on-exec, so that no worker holds the lock on when its daemon was killed. The
file stays when the lock is released: to remove it would let two processes lock two files of one name.
"""

import contextlib
import errno
import fcntl
import os
import select
from pathlib import Path
from types import TracebackType
from typing import Self

from modelhostd.core.errors import ModelhostError, Reason

FILE_NAME = "lock"
EXIT_CODE = 75
"""EX_TEMPFAIL of sysexits.h: it works once the other has ended."""

DYING_S = 0.2
"""How long a holder is given that may have been killed a moment ago."""


class HomeHeldError(Exception):
    """Another process has the home. ``pid`` is its process id, 0 where it could not be read."""

    exit_code = EXIT_CODE

    def __init__(self, home: Path, pid: int) -> None:
        self.home = home
        self.pid = pid
        holder = f"process {pid}" if pid else "another process"
        super().__init__(
            f"{home} is in use by {holder}: end it first (systemctl stop modelhostd, or kill "
            f"{pid or 'it'}), or choose another --home"
        )


class HomeLock:
    """The lock of one home. Made by :meth:`acquire`, given up by :meth:`release` or the process's end."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.path = home / FILE_NAME
        self._descriptor: int | None = None

    def acquire(self) -> None:
        """Take the lock, making the home first where it does not exist.

        Raises HomeHeldError at once, or after a moment in which the holder did not die; and
        PERMISSION_DENIED_ON_DISK or STORAGE_ERROR for a home that cannot be used.
        """
        if self._descriptor is not None:
            return
        try:
            self.home.mkdir(mode=0o700, parents=True, exist_ok=True)
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            descriptor = os.open(self.path, flags, 0o600)
        except OSError as error:
            raise _unusable(self.home, error) from error
        try:
            self._lock(descriptor)
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        except OSError as error:
            os.close(descriptor)
            raise _unusable(self.home, error) from error
        except HomeHeldError:
            os.close(descriptor)
            raise
        self._descriptor = descriptor

    def release(self) -> None:
        """Give the lock up. Idempotent."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)

    def __enter__(self) -> Self:
        self.acquire()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()

    def _lock(self, descriptor: int) -> None:
        if _try(descriptor):
            return
        pid = _holder(descriptor)
        _wait_for_end(pid)
        if not _try(descriptor):
            raise HomeHeldError(self.home, _holder(descriptor))


def _try(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _holder(descriptor: int) -> int:
    text = os.pread(descriptor, 32, 0).strip()
    return int(text) if text.isdigit() and len(text) < 10 else 0


def _wait_for_end(pid: int) -> None:
    """Return when the process has ended, or after DYING_S."""
    with contextlib.suppress(OSError):
        descriptor = os.pidfd_open(pid)
        try:
            poll = select.poll()
            poll.register(descriptor, select.POLLIN)
            poll.poll(DYING_S * 1000)
        finally:
            os.close(descriptor)


def _unusable(home: Path, error: OSError) -> ModelhostError:
    why = error.strerror or str(error)
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return ModelhostError(
            Reason.PERMISSION_DENIED_ON_DISK,
            f"{home} cannot be written: {why}. Give it to the user that runs modelhostd, or choose "
            "another --home",
            {"path": str(home)},
        )
    return ModelhostError(
        Reason.STORAGE_ERROR,
        f"{home} cannot be used: {why}. Choose another --home",
        {"path": str(home), "cause": why},
    )
