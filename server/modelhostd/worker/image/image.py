"""One model's weights in host RAM, and the slab on its device that is filled from them."""

import logging
from collections.abc import Callable
from itertools import accumulate

import torch

from modelhostd.worker.image.arena import Block, HostArena
from modelhostd.worker.image.devices import Device, Slab
from modelhostd.worker.image.layout import Layout, Place, align, find_layout, point, unpoint

log = logging.getLogger("modelhostd.worker")

WASTE = 8
"""Parts of which more than one in so many bytes is not used by the module are packed anew."""


class Image:
    """The image of a module whose parameters and buffers are views of it, or of a slab, or of nothing.

    Made empty at the begin of a load: what the backend reads into ``memory`` stays where it is, ``adopt`` takes the
    rest. Without a device the module's tensors are views of the image itself, which then is the only copy. With one, ``evict``
    and ``swap_in`` take the slab away and bring it back. One thread at a time, while nothing runs in the module.
    """

    def __init__(self, device: Device | None, arena: HostArena) -> None:
        self._device = device
        self._arena = arena
        self._slab: Slab | None = None
        self._blocks: list[Block] = []
        self._places: tuple[Place, ...] = ()
        self._bases: list[int] = [0]
        self._unused: list[Block] = []

    def memory(self, size: int) -> Block:
        """Return memory that the image will have as a part, to be filled before ``adopt``.

        ``size`` is rounded up to the alignment of tensors. Raises ``MemoryError``.
        """
        block = self._arena.take(align(size))
        self._blocks.append(block)
        return block

    def adopt(self, module: torch.nn.Module) -> None:
        """Make the image of a module as it is now, and have the module be on its device.

        Raises :class:`NotImageableError` with nothing changed, ``MemoryError`` and torch's own: ``close`` it then, when
        the module is gone.
        """
        layout = find_layout(module, [block.tensor for block in self._blocks])
        parts, held = list(self._blocks), sum(block.size for block in self._blocks)
        if held - layout.used_bytes > held // WASTE:
            layout = find_layout(module, ())
            parts = []
        unused = [block for block in self._blocks if block not in parts]
        new = self._pack(layout)
        parts = [*parts, *new]
        self._places = layout.places
        self._bases = [0, *accumulate(block.size for block in parts)]
        if self._device is None:
            tensors = [block.tensor for block in parts]
            point(self._places, tensors, [0] * len(tensors), torch.device("cpu"))
        else:
            unpoint(self._places)
        # What a view of is left somewhere, outside of the module, waits for `close`.
        self._blocks = parts
        self._unused = [block for block in unused if not block.free()]
        for block in parts:
            if self._device is not None:
                self._device.pin(block)
            block.protect()
        if self._device is not None:
            self.swap_in(lambda: False)

    @property
    def device_bytes(self) -> int:
        """Bytes that the model holds on its device while it is there; 0 = nothing was adopted."""
        return self._bases[-1]

    @property
    def host_bytes(self) -> int:
        """Bytes of host RAM that stay when the model leaves its device; 0 = it cannot come back."""
        if self._device is None or not self._places:
            return 0
        return sum(block.size for block in self._blocks)

    def swap_in(self, cancelled: Callable[[], bool]) -> None:
        """Fill a slab and point the module to it.

        Raises :class:`Cancelled` and what the device raises without memory; the module is then as it was.
        """
        assert self._device is not None, "what is in RAM needs no slab"
        sources = [block.tensor for block in self._blocks]
        self._slab = self._device.fill(self.device_bytes, sources, cancelled)
        where = self._device.torch_device
        point(self._places, [self._slab.tensor] * len(sources), self._bases, where)

    def evict(self) -> bool:
        """Drop the slab, nothing copied back. False: something else still holds a part of it."""
        unpoint(self._places)
        return self._free_slab()

    def release_host(self) -> None:
        """Let go of the host's copy: the model stays on its device, and cannot leave it and come back."""
        if self._slab is not None:
            self._slab.wait()
        self._free_blocks()

    def close(self) -> bool:
        """Free everything; the module is gone. False: something holds a part of it still; ask again."""
        self._places = ()
        gone = self._free_slab()
        return self._free_blocks() and gone

    def _free_slab(self) -> bool:
        if self._slab is not None and self._slab.free():
            self._slab = None
        return self._slab is None

    def _free_blocks(self) -> bool:
        blocks, self._blocks, self._unused = [*self._blocks, *self._unused], [], []
        for block in blocks:
            if self._device is not None:
                self._device.unpin(block)
            if not block.free():
                self._unused.append(block)
        return not self._unused

    def _pack(self, layout: Layout) -> list[Block]:
        """Copy what lies in none of the parts into a new one."""
        if not layout.new_bytes:
            return []
        block = self.memory(layout.new_bytes)
        block.prepare(0, block.size)
        for piece in layout.pieces:
            block.tensor[piece.offset : piece.offset + piece.length].copy_(piece.source())
        return [block]
