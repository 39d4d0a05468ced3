"""Images that outlive their worker: hashed when they are at rest, and adopted by the next worker where the hash holds.

An image's checksum: crc32 (zlib) of each extent of the weights and of the description, in this order, and BLAKE2b-128 of
these numbers. crc32 because it is there, gives the interpreter up, and takes 4 GB/s of one core, where what it
saves, reading into fresh memory, takes 1.3 to 2 (bench/RESULTS.md); what it has to find are wild writes.
"""

import hashlib
import logging
import os
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence

from modelhostd.worker import failures
from modelhostd.worker.backend import Cancelled
from modelhostd.worker.image.arena import HostArena, LentBlock
from modelhostd.worker.image.descriptions import Weights
from modelhostd.worker.image.image import Image
from modelhostd.worker.image.part import EXTENT_BYTES, Part
from modelhostd.worker.own_threads import start_thread
from modelhostd.worker.wire.frames import Key
from modelhostd.worker.wire.images import DESCRIPTION_MAX_BYTES, Kept

log = logging.getLogger("modelhostd.worker")

STEP_BYTES = 4 * 2**20
"""Hashed at once while others compute: a millisecond."""
REST = 3
"""What is rested after a step, in steps: a load costs its worker a quarter of one core for a second per GiB."""
MAX_THREADS = 8
"""Of an adoption: as many cores read what a memory bus gives."""


def rest(part: Part, arena: HostArena, pause: Callable[[float], object]) -> Kept | None:
    """Hash a part that is read-only, a little at a time; None where it went meanwhile, or cannot be described.

    ``pause`` is called with seconds. What lies where is written beside it, and goes with it. Raises ``MemoryError``.
    """
    text = part.description
    if not 0 < len(text) <= DESCRIPTION_MAX_BYTES:
        return None
    note = arena.take(len(text))
    try:
        note.prepare(0, len(text))
        note.bytes(0, len(text))[:] = text
        note.protect()
    except BaseException:
        note.drop()
        raise
    if not part.attach(note):
        return None
    sums = []
    for start in range(0, part.size, EXTENT_BYTES):
        end, value = min(start + EXTENT_BYTES, part.size), 0
        for step in range(start, end, STEP_BYTES):
            begin = time.monotonic()
            hashed = part.crc32(step, min(STEP_BYTES, end - step), value)
            if hashed is None:
                return None
            value = hashed
            pause(REST * (time.monotonic() - begin))
        sums.append(value)
    return Kept(part.place, note.place, _checksum(sums, text))


class Adoption:
    """One image on its way into this worker. Until ``done`` it stays, whatever becomes of the load."""

    weights: Weights | None = None
    """For the backend; a view of the memory, to be let go of before that can go."""

    def __init__(self, part: Part, blocks: Sequence[LentBlock], forget: Callable[[], None]) -> None:
        self.part = part
        self._blocks = blocks
        self._forget = forget

    def done(self) -> None:
        """Have the image belong to its new instance, or, where it turned out to be of no use, to nobody."""
        self.weights = None
        for block in self._blocks:
            block.claim()
        self._forget()


class Inheritance:
    """What the worker before left in the arena."""

    def __init__(self, arena: HostArena, kept: Mapping[Key, Kept]) -> None:
        self._arena = arena
        self._kept = dict(kept)
        self._adoptions: dict[Key, Adoption] = {}
        """The last of each image that was begun, and not done."""
        self._lock = threading.Lock()

    def drop(self, key: Key) -> None:
        """Free an image that nobody adopted."""
        adoption, kept = self._adoptions.get(key), self._kept.get(key)
        if adoption is not None:
            # It failed, and somebody may have a view left of it.
            adoption.done()
        elif kept is not None:
            self._forget(key)
            for place in kept.ranges:
                self._arena.release(place)

    def adopt(
        self,
        key: Key,
        image: Image,
        cancelled: Callable[[], bool],
        report: Callable[[int, int], None],
    ) -> Adoption:
        """Make what was left the first part of an image that is empty yet, its extents on their way to the device.

        Raises MODEL_NOT_LOADED where there is none, or its checksum does not hold, :class:`Cancelled`, and what the
        device raises; close the image then.
        """
        kept = self._kept.get(key)
        if kept is None:
            raise failures.not_loaded(key[0])
        blocks = [self._arena.restore(place) for place in kept.ranges]
        part = image.restore(blocks[0])
        part.attach(blocks[1])
        adoption = Adoption(part, blocks, lambda: self._forget(key))
        self._adoptions[key] = adoption
        # One at a time: together they would only take turns at the memory bus.
        with self._lock:
            sums = _Hashing(part, cancelled, report).run()
        text = bytes(blocks[1].bytes(0, kept.description.length))
        if _checksum(sums, text) != kept.checksum:
            adoption.done()
            log.error("the image that instance %s left has changed since: it is not used", key[0])
            raise failures.damaged(key[0])
        adoption.weights = Weights(part.tensor, text)
        return adoption

    def _forget(self, key: Key) -> None:
        self._kept.pop(key, None)
        self._adoptions.pop(key, None)


class _Hashing:
    """Hashes the extents of a part with several threads, and sends each on to the device."""

    def __init__(
        self, part: Part, cancelled: Callable[[], bool], report: Callable[[int, int], None]
    ) -> None:
        self._part = part
        self._cancelled = cancelled
        self._report = report
        self._lock = threading.Lock()
        self._error: BaseException | None = None
        self._done = 0
        self._sums = [0] * -(-part.size // EXTENT_BYTES)

    def run(self) -> list[int]:
        """Return the extents' numbers."""
        extents = iter(range(len(self._sums)))
        count = min(MAX_THREADS, len(os.sched_getaffinity(0)), len(self._sums))
        threads = [start_thread(self._run, extents, name=f"hash-{n}") for n in range(count)]
        for thread in threads:
            thread.join()
        if self._error is not None:
            raise self._error
        return self._sums

    def _run(self, extents: Iterator[int]) -> None:
        while True:
            with self._lock:
                index = next(extents, None) if self._error is None else None
            if index is None:
                return
            try:
                self._hash(index)
            except BaseException as error:
                with self._lock:
                    self._error = self._error or error
                return

    def _hash(self, index: int) -> None:
        start = index * EXTENT_BYTES
        length = min(EXTENT_BYTES, self._part.size - start)
        if self._cancelled():
            raise Cancelled
        self._sums[index] = zlib.crc32(self._part.bytes(start, length))
        self._part.filled(start, length)
        with self._lock:
            self._done += length
            self._report(self._done, self._part.size)


def _checksum(sums: Sequence[int], text: bytes) -> bytes:
    numbers = (*sums, zlib.crc32(text))
    packed = struct.pack(f"<{len(numbers)}I", *numbers)
    return hashlib.blake2b(packed, digest_size=16).digest()
