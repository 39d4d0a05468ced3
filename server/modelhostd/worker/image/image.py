"""One model's weights in host RAM, and the slab on its device that is filled from them."""

import logging
from collections.abc import Callable

import torch

from modelhostd.worker.backend import Cancelled
from modelhostd.worker.image.layout import Layout, find_layout, point, unpoint

log = logging.getLogger("modelhostd.worker")

COPY_BYTES = 64 * 2**20
"""Most bytes of one copy: between two of them a cancellation is noticed."""

_PLACEHOLDERS: dict[torch.dtype, torch.Tensor] = {}


class Image:
    """The image of a module whose parameters and buffers are views of it, or of a slab, or of nothing.

    On ``cpu`` they are views of the image itself, which then is the only copy. Elsewhere ``evict`` and ``swap_in`` take
    the slab away and bring it back. One thread at a time, while nothing runs in the module.
    """

    def __init__(self, module: torch.nn.Module, device: torch.device, *, in_place: bool) -> None:
        """Re-pack a module as it is now. Raises :class:`NotImageableError`, ``MemoryError``."""
        self._device = device
        self._in_place = in_place
        self._layout: Layout = find_layout(module)
        self._memory = _empty(self._layout.total_bytes, torch.device("cpu"))
        self._slab: torch.Tensor | None = None
        for piece in self._layout.pieces:
            self._memory[piece.offset : piece.offset + piece.length].copy_(piece.source())
        self._layout = Layout((), self._layout.places, self._layout.total_bytes)
        if in_place:
            point(self._layout.places, self._memory)
        else:
            unpoint(self._layout.places, _PLACEHOLDERS)
            self.swap_in(lambda: False)

    @property
    def device_bytes(self) -> int:
        """Bytes that the model holds on its device while it is there."""
        return self._layout.total_bytes

    @property
    def host_bytes(self) -> int:
        """Bytes of host RAM that stay when the model leaves its device."""
        return 0 if self._in_place else self._layout.total_bytes

    def swap_in(self, cancelled: Callable[[], bool]) -> None:
        """Fill a slab and point the module to it.

        Raises :class:`Cancelled` and torch's out-of-memory error; the module is then as it was.
        """
        slab = _empty(self._layout.total_bytes, self._device)
        for start in range(0, self._layout.total_bytes, COPY_BYTES):
            if cancelled():
                raise Cancelled
            part = slice(start, start + COPY_BYTES)
            slab[part].copy_(self._memory[part])
        point(self._layout.places, slab)
        self._slab = slab

    def evict(self) -> bool:
        """Drop the slab, nothing copied back. False: something else still holds a part of it."""
        unpoint(self._layout.places, _PLACEHOLDERS)
        slab, self._slab = self._slab, None
        return slab is None or _only_holder(slab)


def _only_holder(slab: torch.Tensor) -> bool:
    storage = slab.untyped_storage()
    # One for the tensor, one for the storage's own Python object.
    return bool(torch._C._storage_Use_Count(storage._cdata) <= 2)  # noqa: SLF001


def _empty(size: int, device: torch.device) -> torch.Tensor:
    # Memory that is made in inference mode cannot be filled again outside of it.
    with torch.inference_mode(mode=False):
        return torch.empty(size, dtype=torch.uint8, device=device)
