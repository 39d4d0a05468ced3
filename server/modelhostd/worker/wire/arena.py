"""Tensor arenas: memory that a daemon and one worker share, as sealed memfds.

The daemon makes and seals them before the worker is started; nobody can then truncate one under the other's feet
(that would be a SIGBUS). Their memory comes with ``allocate``, beside the worker's start and before its first use.
Each end maps the arena that it only reads as read-only: a wild write in a worker cannot reach another request.
"""

import contextlib
import fcntl
import mmap
import os

_POPULATE_READ = 22
_POPULATE_WRITE = 23


_MAPPED_BYTES = 64 << 20
"""Slots are taken from the beginning, so what lies beyond is seldom used, and is mapped when it is. Unmapping all of an
arena takes each end tens to hundreds of ms per GiB when its process dies: that was most of the time until workers
were gone after the daemon (bench/RESULTS.md)."""
_STEP_BYTES = 4 << 20
"""``madvise`` keeps the interpreter: 256 MiB at once would stop every other thread for 50 to 150 ms."""


def create(name: str, size: int) -> int:
    """Return the descriptor of a new arena of ``size`` bytes for good, close-on-exec, without memory yet.

    Raises ``OSError`` where the system has none to give.
    """
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size)
        seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    except BaseException:
        os.close(fd)
        raise
    return fd


def allocate(fd: int, offset: int, length: int) -> None:
    """Give part of an arena its memory. Takes about 80 ms per GiB and gives up the interpreter meanwhile.

    Raises ``OSError`` where there is no memory.
    """
    os.posix_fallocate(fd, offset, length)


class Arena:
    """One end's view of an arena. ``close`` ends it; the memory goes when both ends are gone."""

    def __init__(self, fd: int, size: int, *, writable: bool) -> None:
        """Map ``size`` bytes of ``fd``. The descriptor is not needed any more afterwards."""
        self.size = size
        self._populate = _POPULATE_WRITE if writable else _POPULATE_READ
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        self.memory = mmap.mmap(fd, size, flags=mmap.MAP_SHARED, prot=protection)

    def populate(self) -> None:
        """Map the pages that are used most now, so that no request pays for it. In a thread: others have
        their turn.
        """
        mapped = min(self.size, _MAPPED_BYTES)
        # Kernels before 5.14 cannot; the pages are then mapped one by one when first used.
        with contextlib.suppress(OSError):
            for offset in range(0, mapped, _STEP_BYTES):
                length = min(_STEP_BYTES, mapped - offset)
                self.memory.madvise(self._populate, offset, length)

    def holds(self, offset: int, length: int) -> bool:
        """Whether a slot of these numbers lies inside: they come from the other end."""
        return 0 <= offset <= self.size and 0 < length <= self.size - offset

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """Copy ``data`` to ``offset``."""
        self.memory[offset : offset + len(data)] = data

    def read(self, offset: int, length: int) -> bytes:
        """Return a copy of ``length`` bytes at ``offset``."""
        return self.memory[offset : offset + length]

    def view(self, offset: int, length: int) -> memoryview:
        """Return the bytes themselves, without a copy; read-only where the arena is mapped so."""
        return memoryview(self.memory)[offset : offset + length]

    def close(self) -> None:
        """Unmap. Views must be gone."""
        self.memory.close()
