"""A file's digests, fed in order whatever order its bytes come in.

Bytes at the frontier are hashed as they come; those that came before their turn are read again out of the
page cache when the gap before them is closed.
"""

import hashlib
import os
from collections.abc import Callable
from typing import Any

from modelhostd.adapters.parts import Part

READ_BYTES = 1 << 20


class Digests:
    """SHA-256 of a file, and git's SHA-1 of it where that is all the source says."""

    def __init__(self, size: int, *, git: bool) -> None:
        self._size = size
        self._git = git
        self.restart()

    def restart(self) -> None:
        """Forget every byte."""
        self._sha256: Any = hashlib.sha256()
        # git's name of a blob is the SHA-1 of a header with its length, and its bytes.
        header = b"blob %d\0" % self._size
        self._sha1: Any = hashlib.sha1(header, usedforsecurity=False) if self._git else None

    def update(self, data: memoryview) -> None:
        """Add the next bytes."""
        self._sha256.update(data)
        if self._sha1 is not None:
            self._sha1.update(data)

    @property
    def sha256(self) -> str:
        """In lower-case hexadecimal."""
        return str(self._sha256.hexdigest())

    @property
    def git_sha1(self) -> str:
        """The same of git's; empty where it was not asked for."""
        return str(self._sha1.hexdigest()) if self._sha1 is not None else ""


class Hasher:
    """The hash frontier of one part; one thread at a time."""

    def __init__(self, part: Part, digests: Digests, stop: Callable[[], None]) -> None:
        self.position = 0
        """Everything before it is hashed."""
        self._part = part
        self._digests = digests
        self._stop = stop
        self._buffer: memoryview | None = None

    def restart(self) -> None:
        """Begin again at the first byte."""
        self._digests.restart()
        self.position = 0

    def feed(self, offset: int, data: memoryview) -> None:
        """Hash bytes on their way to the disk, if it is their turn."""
        if offset == self.position:
            self._digests.update(data)
            self.position += len(data)

    def catch_up(self, limit: int) -> None:
        """Hash what is on disk before ``limit``; ``stop`` is called between reads, may raise."""
        if self._buffer is None and self.position < limit:
            self._buffer = memoryview(bytearray(READ_BYTES))
        while self.position < limit:
            self._stop()
            assert self._buffer is not None
            wanted = self._buffer[: min(READ_BYTES, limit - self.position)]
            count = os.preadv(self._part.fd, [wanted], self.position)
            if count == 0:
                raise OSError(5, "a file that is being fetched became shorter")
            self._digests.update(wanted[:count])
            self.position += count
