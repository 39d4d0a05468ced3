"""A file's digests, fed in order whatever order its bytes come in.

Bytes at the frontier are hashed as they come; those that came before their turn are read again out of the
page cache when the gap before them is closed.
"""

import errno
import hashlib
import os
import threading
from collections.abc import Callable
from typing import Any

from modelhostd.adapters.parts import Part
from modelhostd.ports import RemoteFile

READ_BYTES = 1 << 20
NEAR_BYTES = 2 << 20
"""So little is read again by whoever is at the frontier: hashing what is in the cache of a core costs a
quarter less than hashing it later, and elsewhere."""


class Digests:
    """SHA-256 of a file, and the digest that its source tells where that is another."""

    def __init__(self, file: RemoteFile) -> None:
        self._file = file
        self.restart()

    def restart(self) -> None:
        """Forget every byte."""
        file = self._file
        self._sha256: Any = hashlib.sha256()
        self._told: Any = None
        if file.git_sha1 and not file.sha256:
            # git's name of a blob is the SHA-1 of a header with its length, and its bytes.
            header = b"blob %d\0" % file.size_bytes
            self._told = hashlib.sha1(header, usedforsecurity=False)
        elif file.checksum and not file.sha256:
            kind = file.checksum.partition(":")[0]
            self._told = hashlib.new(kind, usedforsecurity=False)

    def update(self, data: memoryview) -> None:
        """Add the next bytes."""
        self._sha256.update(data)
        if self._told is not None:
            self._told.update(data)

    @property
    def sha256(self) -> str:
        """In lower-case hexadecimal."""
        return str(self._sha256.hexdigest())

    @property
    def expected(self) -> str:
        """What the source tells; empty where it tells none."""
        file = self._file
        return file.sha256 or file.git_sha1 or file.checksum.partition(":")[2]

    @property
    def actual(self) -> str:
        """What came, as the same kind of digest."""
        return self.sha256 if self._told is None else str(self._told.hexdigest())


class Hasher:
    """The hash frontier of one part. Thread-safe."""

    def __init__(self, part: Part, digests: Digests, stop: Callable[[], None]) -> None:
        self.position = 0
        """Everything before it is hashed."""
        self._part = part
        self._digests = digests
        self._stop = stop
        self._lock = threading.Lock()
        self._buffer: memoryview | None = None

    def restart(self) -> None:
        """Begin again at the first byte."""
        self._digests.restart()
        self.position = 0

    def feed(self, offset: int, data: memoryview) -> None:
        """Hash bytes that are on disk, as all before them are, if it is nearly their turn."""
        if offset - self.position > NEAR_BYTES:
            return
        self.catch_up(offset)
        with self._lock:
            if offset == self.position:
                self._digests.update(data)
                self.position += len(data)

    def catch_up(self, limit: int) -> None:
        """Hash what is on disk before ``limit``; ``stop`` is called between reads, may raise."""
        while self.position < limit:
            self._stop()
            with self._lock:
                self._read(limit)

    def _read(self, limit: int) -> None:
        if self._buffer is None:
            self._buffer = memoryview(bytearray(READ_BYTES))
        wanted = self._buffer[: max(0, min(READ_BYTES, limit - self.position))]
        count = os.preadv(self._part.fd, [wanted], self.position) if wanted else 0
        if wanted and count == 0:
            raise OSError(errno.EIO, "a file that is being fetched became shorter")
        self._digests.update(wanted[:count])
        self.position += count
