"""One contiguous part of an image: memory of the host, extent by extent sent to a slab of its device."""

import threading
import zlib
from collections.abc import Callable, Iterator

import torch

from modelhostd.worker.backend import Cancelled
from modelhostd.worker.image.arena import Block
from modelhostd.worker.image.devices import Device, Slab
from modelhostd.worker.wire.images import Range

EXTENT_BYTES = 64 * 2**20
"""What is pinned, and copied, at once. A copy may not reach over the end of what was pinned together; smaller
than 16 MiB they would not run at the bus's rate."""


class Part:
    """Memory of an image, and with a ``device`` the slab that is filled from it.

    While it is filled, by several threads, extents that are whole go to the device already. ``seal`` ends that.
    """

    def __init__(self, block: Block, device: Device | None) -> None:
        self.tensor = block.tensor
        self.size = block.size
        self.slab: Slab | None = None
        self.views = 0
        """Of the slab, which the module has while it is on the device."""
        self.description = b""
        """What lies where in it, as whoever filled it tells a later load."""
        self._block = block
        self._note: Block | None = None
        self._device = device
        self._freed = False
        self._host = threading.Lock()
        """Held while the memory of the host is looked at beside what else goes on, or freed."""
        self._lock = threading.Lock()
        self._missing = [extent.numel() for _, extent in self._extents()]

    def prepare(self, start: int, length: int) -> None:
        """Give bytes their memory before they are filled. Raises ``MemoryError``."""
        self._block.prepare(start, length)

    def filled(self, start: int, length: int) -> None:
        """Note that bytes have their contents; each is told once. Raises what a device without memory does."""
        if self._device is None:
            return
        end = start + length
        while start < end:
            index = start // EXTENT_BYTES
            count = min(end, (index + 1) * EXTENT_BYTES) - start
            start += count
            with self._lock:
                self._missing[index] -= count
                whole = self._missing[index] == 0
            if whole:
                self._send(index)

    def describe(self, text: bytes) -> None:
        """Take what lies where, for who finds this memory when this process has gone."""
        self.description = text

    @property
    def place(self) -> Range:
        """Where it lies in the arena."""
        return self._block.place

    def attach(self, note: Block) -> bool:
        """Have another block go with the memory of the host; False, and it is gone, where that has gone."""
        with self._host:
            if not self._freed:
                self._note = note
                return True
        note.free()
        return False

    def bytes(self, start: int, length: int) -> memoryview:
        """Return the memory of the host itself: not for one moment longer than it is there."""
        return self._block.bytes(start, length)

    def crc32(self, start: int, length: int, value: int) -> int | None:
        """Go on with a crc32 over some bytes; None where they have gone."""
        with self._host:
            return None if self._freed else zlib.crc32(self.bytes(start, length), value)

    def seal(self) -> None:
        """Have the rest go to the device too, and make the host's memory read-only."""
        if self._device is not None:
            for index, missing in enumerate(self._missing):
                if missing:
                    self._send(index)
            self._open().ready()
        self._missing = []
        self._block.protect()

    def swap_in(self, cancelled: Callable[[], bool]) -> None:
        """Fill a new slab. Raises :class:`Cancelled`, and what a device without memory does, with none held."""
        assert self._device is not None, "what is in RAM needs no slab"
        slab = self._open()
        try:
            step = EXTENT_BYTES * self._device.extents_at_once
            for start in range(0, self.size, step):
                if cancelled():
                    raise Cancelled
                slab.copy(start, self.tensor[start : start + step])
        except BaseException:
            self.evict()
            raise
        slab.ready()

    def evict(self, views: int = 0) -> bool:
        """Give the slab back; False: something still holds a view of it, beside so many that nobody uses."""
        if self.slab is not None and self.slab.free(views):
            self.slab = None
        return self.slab is None

    def release_host(self) -> bool:
        """Give the host's memory back; False: something still holds a view of it."""
        if self.slab is not None:
            self.slab.wait()
        if self._freed:
            return True
        if self._device is not None:
            for _, extent in self._extents():
                self._device.unpin(extent)
                del extent  # a view, too
        with self._host:
            del self.tensor
            self._freed = self._block.free()
            if not self._freed:
                self.tensor = self._block.tensor
            elif self._note is not None:
                self._note.free()
        return self._freed

    def close(self) -> bool:
        """Give everything back; False: something still holds a view, ask again."""
        gone = self.evict()
        return self.release_host() and gone

    def _open(self) -> Slab:
        assert self._device is not None
        with self._lock:
            if self.slab is None:
                self.slab = self._device.slab(self.size)
            return self.slab

    def _send(self, index: int) -> None:
        assert self._device is not None
        start = index * EXTENT_BYTES
        extent = self.tensor[start : start + EXTENT_BYTES]
        self._device.pin(extent)
        self._open().copy(start, extent)

    def _extents(self) -> Iterator[tuple[int, torch.Tensor]]:
        for start in range(0, self.size, EXTENT_BYTES):
            yield start, self.tensor[start : start + EXTENT_BYTES]
