"""Tensor arenas: memory that a daemon and one worker share, as sealed memfds.

The daemon makes and seals them before the worker is started; nobody can then truncate one under the other's feet
(that would be a SIGBUS). Their memory comes from the beginning on by ``allocate``, an extent beside the worker's start and
more as it is needed; no slot lies where there is none yet, for to touch that could be a SIGBUS as well.
Each end maps the arena that it only reads as read-only: a wild write in a worker cannot reach another request.
"""

import contextlib
import fcntl
import mmap
import os

_POPULATE_READ = 22
_POPULATE_WRITE = 23

EXTENT_BYTES = 32 << 20
"""What is allocated at once. Slots are taken from the beginning, so few workers ever need a second one; and giving an
arena's pages back takes 0.3 to 0.9 s per GiB, by which a worker outlived a killed daemon (bench/RESULTS.md)."""
_STEP_BYTES = 1 << 20


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
    """Give part of an arena, which nobody uses yet, its memory. Takes 2 s per GiB and more: call it in a thread.

    Raises ``OSError`` where there is no memory, with nothing allocated.
    """
    os.posix_fallocate(fd, offset, length)
    # The kernel clears pages when they are first used: by a write, as that gives up the interpreter and madvise does not.
    zeros = bytes(_STEP_BYTES)
    for start in range(0, length, _STEP_BYTES):
        os.pwrite(fd, memoryview(zeros)[: length - start], offset + start)


class Arena:
    """One end's view of an arena. ``close`` ends it; the memory goes when both ends are gone."""

    def __init__(self, fd: int, size: int, *, writable: bool) -> None:
        """Map ``size`` bytes of ``fd``. The descriptor is not needed any more afterwards."""
        self.size = size
        self._populate = _POPULATE_WRITE if writable else _POPULATE_READ
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        self.memory = mmap.mmap(fd, size, flags=mmap.MAP_SHARED, prot=protection)

    def populate(self, offset: int, length: int) -> None:
        """Map pages that are allocated, so that no request pays for it. In a thread: others have their turn."""
        # Kernels before 5.14 cannot; the pages are then mapped one by one when first used.
        with contextlib.suppress(OSError):
            for start in range(0, length, _STEP_BYTES):
                step = min(_STEP_BYTES, length - start)
                self.memory.madvise(self._populate, offset + start, step)

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
