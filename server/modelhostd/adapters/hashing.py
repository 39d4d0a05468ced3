"""A file's digests, fed in order whatever order its bytes come in.

Bytes at the frontier are hashed as they come, in a thread beside those who write where a file has one; those
that came before their turn are read again out of the page cache when the gap before them is closed.
"""

import errno
import hashlib
import os
import threading
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Any

from modelhostd.adapters.crc import CRC32C, Crc32c
from modelhostd.adapters.parts import Part
from modelhostd.ports import RemoteFile

READ_BYTES = 1 << 20
BUFFER_BYTES = 2 << 20
"""What is read, written and hashed at once by a connection that is alone: each step wakes a thread twice.
Of 1 GiB over loopback 512 KiB took 1.7 to 2.1 s of processor time, 2 MiB 1.5 to 1.7 s, 4 MiB as much."""
BUFFER_BYTES_BESIDE = 1 << 20
"""The same of one of several, of which none is fast: 512 KiB took a twentieth more processor time. Eight files
of one download, each by two connections, have 24 MiB."""
NEAR_BYTES = 3 * BUFFER_BYTES
"""So little before bytes that are there may be read again to make it their turn; further on, they wait."""
TICK_S = 0.05


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
            self._told = Crc32c() if kind == CRC32C else hashlib.new(kind, usedforsecurity=False)

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
    """The hash frontier of one part: one thread's at a time; ``position`` may be read by all."""

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
        """Hash bytes that are on disk, as all before them are, if it is nearly their turn."""
        if offset - self.position > NEAR_BYTES:
            return
        self.catch_up(offset)
        if offset == self.position:
            self._digests.update(data)
            self.position += len(data)

    def catch_up(self, limit: int) -> None:
        """Hash what is on disk before ``limit``; ``stop`` is called between reads, may raise."""
        while self.position < limit:
            self._stop()
            self._read(limit)

    def _read(self, limit: int) -> None:
        if self._buffer is None:
            self._buffer = memoryview(bytearray(READ_BYTES))
        wanted = self._buffer[: min(READ_BYTES, limit - self.position)]
        count = os.preadv(self._part.fd, [wanted], self.position)
        if count == 0:
            raise OSError(errno.EIO, "a file that is being fetched became shorter")
        self._digests.update(wanted[:count])
        self.position += count


class HashThread:
    """Hashes beside those who write: full buffers go to a thread, and empty ones come back.

    There is one buffer more than there are writers: while it is hashed, the next one fills. Who would fill
    a second one waits, so the hashing is never far behind what comes in order.
    """

    def __init__(self, hasher: Hasher, part: Part, failed: Callable[[BaseException], None]) -> None:
        self._hasher = hasher
        self._part = part
        self._failed = failed
        self._stopping = False
        self._full: SimpleQueue[tuple[int, int, memoryview] | None] = SimpleQueue()
        """Offset, count and buffer; None = look at what is there."""
        self._empty: SimpleQueue[memoryview] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="modelhost-hash", daemon=True)

    def start(self, spare: memoryview) -> None:
        """Begin, with one buffer like those that the writers have."""
        self._empty.put(spare)
        self._thread.start()

    def stop(self) -> None:
        """Hash what was handed over, and end."""
        self._stopping = True
        self._full.put(None)
        self._thread.join()

    def swap(self, offset: int, buffer: memoryview, count: int) -> memoryview:
        """Hand over ``count`` bytes that are on disk at ``offset``; return the buffer to go on with.

        That is the same one when it is not the bytes' turn yet: they are read again later.
        """
        prefix = self._part.prefix
        if prefix < offset + count:
            return buffer
        if offset - self._hasher.position > NEAR_BYTES:
            if self._full.empty():
                self._full.put(None)
            return buffer
        while self._thread.is_alive():
            try:
                spare = self._empty.get(timeout=TICK_S)
            except Empty:
                continue
            self._full.put((offset, count, buffer))
            return spare
        return buffer

    def _run(self) -> None:
        try:
            while True:
                try:
                    full = self._full.get(timeout=TICK_S)
                except Empty:
                    full = None
                if full is not None:
                    offset, count, buffer = full
                    try:
                        self._hasher.feed(offset, buffer[:count])
                    finally:
                        self._empty.put(buffer)
                elif self._stopping:
                    return
                else:
                    self._hasher.catch_up(self._part.prefix)
        except BaseException as error:
            self._failed(error)
