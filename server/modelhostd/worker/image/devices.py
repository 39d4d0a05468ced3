"""Where slabs are: RAM that stands for a GPU, or a GPU."""

import ctypes
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from modelhostd.worker.backend import Cancelled
from modelhostd.worker.image.arena import SPACE_BYTES, Block, HostArena

COPY_BYTES = 64 * 2**20
"""Of one copy on the CPU: between two of them a cancellation is noticed."""


class Slab(Protocol):
    """Memory of a device that one model's weights are in."""

    @property
    def tensor(self) -> torch.Tensor:
        """All of it, as uint8."""

    def wait(self) -> None:
        """Wait until what was copied into it is there, and its sources may go."""

    def free(self) -> bool:
        """Give it back when what runs on it has ended; False: something still holds a view of it."""


class Device(Protocol):
    """A device that images are swapped into."""

    @property
    def torch_device(self) -> torch.device:
        """What torch calls it."""

    def pin(self, block: Block) -> None:
        """Prepare host memory for copies at the bus's rate; may be slow, never fails."""

    def unpin(self, block: Block) -> None:
        """Undo ``pin``."""

    def fill(
        self, size: int, sources: Sequence[torch.Tensor], cancelled: Callable[[], bool]
    ) -> Slab:
        """Return a slab of ``size`` bytes with ``sources`` in it, one behind the other.

        What is computed on the device from now on sees them; the copies may still be on their way. Raises
        :class:`Cancelled`, and ``MemoryError`` or torch's own, with nothing held.
        """


class RamSlab:
    """A slab of ``devices/sim-0``."""

    def __init__(self, block: Block) -> None:
        self._block = block

    @property
    def tensor(self) -> torch.Tensor:
        """All of it, as uint8."""
        return self._block.tensor

    def wait(self) -> None:
        """Do nothing: copies on the CPU are done when they return."""

    def free(self) -> bool:
        """Give it back; False: something still holds a view of it."""
        return self._block.free()


class RamDevice:
    """``devices/sim-0``: slabs in RAM. As a GPU's, its memory is there already, so what was freed is kept."""

    def __init__(self) -> None:
        self.torch_device = torch.device("cpu")
        self.arena = HostArena("modelhost-sim", SPACE_BYTES)

    def pin(self, block: Block) -> None:
        """Do nothing: a copy on the CPU needs no pinning."""

    def unpin(self, block: Block) -> None:
        """Do nothing."""

    def fill(
        self, size: int, sources: Sequence[torch.Tensor], cancelled: Callable[[], bool]
    ) -> Slab:
        """Return a slab with the sources in it; see :class:`Device`."""
        block = self.arena.take(size)
        target = block.tensor.data_ptr()
        try:
            start = 0
            for source in sources:
                for first in range(0, source.numel(), COPY_BYTES):
                    if cancelled():
                        raise Cancelled
                    length = min(COPY_BYTES, source.numel() - first)
                    block.prepare(start, length)
                    # One memmove: torch's copy takes threads for it, which slow each other down.
                    ctypes.memmove(target + start, source.data_ptr() + first, length)
                    start += length
        except BaseException:
            block.free()
            raise
        return RamSlab(block)


def find_device(device: str) -> torch.device:
    """Return torch's device for the id of a device: ``cpu``, ``cuda-N``, or ``sim-N`` (in RAM)."""
    kind, _, index = device.partition("-")
    return torch.device("cuda", int(index)) if kind == "cuda" else torch.device("cpu")


def make_device(device: str) -> Device | None:
    """Return the device of an id; None for ``cpu``, whose models are in the host arena itself."""
    kind, _, index = device.partition("-")
    if kind == "cuda":
        from modelhostd.worker.image.cuda import CudaDevice

        return CudaDevice(int(index))
    return None if kind == "cpu" else RamDevice()
