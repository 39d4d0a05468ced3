"""Where slabs are: RAM that stands for a GPU, or a GPU."""

import ctypes
from typing import Protocol

import torch

from modelhostd.worker.image.arena import Block, HostArena, only_holder
from modelhostd.worker.wire.images import SPACE_BYTES


class Slab(Protocol):
    """Memory of a device that a part of one model's weights is in."""

    @property
    def tensor(self) -> torch.Tensor:
        """All of it, as uint8."""

    def copy(self, start: int, source: torch.Tensor) -> None:
        """Have bytes of the host copied to ``start``. They may still be on their way when it returns."""

    def ready(self) -> None:
        """Have whatever is computed on the device from now on see all copies."""

    def wait(self) -> None:
        """Wait until all copies are done, and their sources may go."""

    def free(self, views: int = 0) -> bool:
        """Give it back when what runs on it has ended; False: something still holds a view of it.

        Beside so many ``views``, of which nobody makes use any more: their memory is gone.
        """


class Device(Protocol):
    """A device that images are swapped into."""

    @property
    def torch_device(self) -> torch.device:
        """What torch calls it."""

    @property
    def extents_at_once(self) -> int:
        """How many extents one copy of a swap-in may be of."""

    def slab(self, size: int) -> Slab:
        """Return memory for ``size`` bytes. Raises ``MemoryError``, or torch's own error."""

    def pin(self, memory: torch.Tensor) -> None:
        """Prepare memory of the host for copies at the bus's rate, once; may be slow, never fails."""

    def unpin(self, memory: torch.Tensor) -> None:
        """Undo ``pin`` of the same memory; harmless where there was none."""


class RamSlab:
    """A slab of ``devices/sim-0``."""

    def __init__(self, block: Block) -> None:
        self._block = block

    @property
    def tensor(self) -> torch.Tensor:
        """All of it, as uint8."""
        return self._block.tensor

    def copy(self, start: int, source: torch.Tensor) -> None:
        """Copy bytes; they are there when it returns."""
        length = source.numel()
        self._block.prepare(start, length)
        # One memmove: torch's copy takes threads for it, which slow each other down.
        ctypes.memmove(self.tensor.data_ptr() + start, source.data_ptr(), length)

    def ready(self) -> None:
        """Do nothing: copies on the CPU are done when they return."""

    def wait(self) -> None:
        """Do nothing, for the same reason."""

    def free(self, views: int = 0) -> bool:
        """Give it back; False: something else still holds a view of it."""
        if not only_holder(self.tensor, views):
            return False
        self._block.leave()
        return True


class RamDevice:
    """``devices/sim-0``: slabs in RAM. As a GPU's, its memory is there already, so what was freed is kept."""

    extents_at_once = 8
    """glibc writes past the caches only what is larger than three quarters of them (240 MiB where it was
    measured): 11.7 GB/s instead of 8.6."""

    def __init__(self) -> None:
        self.torch_device = torch.device("cpu")
        self.arena = HostArena("modelhost-sim", SPACE_BYTES)

    def slab(self, size: int) -> RamSlab:
        """Return memory for ``size`` bytes."""
        return RamSlab(self.arena.take(size))

    def pin(self, memory: torch.Tensor) -> None:
        """Do nothing: a copy on the CPU needs no pinning."""

    def unpin(self, memory: torch.Tensor) -> None:
        """Do nothing."""


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
