"""Slabs on a CUDA device: pinned sources, copies on a stream of their own, memory that goes back whole.

Why as it is (facts in PyTorch's and CUDA's documentation, checked by ``tests/gpu``): pinning runs at a fifth of the
copy's rate, so it is done once per image and not per swap; torch's own pinned allocator rounds to powers of two and keeps
for ever, so the arena's memory is registered as it is; a slab in a pool of its own shares no segment with activations.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch

from modelhostd.worker.backend import Cancelled
from modelhostd.worker.image.arena import Block, only_holder

log = logging.getLogger("modelhostd.worker")

REGISTER_BYTES = 2**30
"""Of one cudaHostRegister: calls of hundreds of GiB fail, and one GiB takes a tenth of a second."""


class CudaSlab:
    """A slab on a GPU."""

    def __init__(self, cuda: Any, device: torch.device, size: int) -> None:
        self._cuda = cuda
        self._device = device
        self._pool = cuda.MemPool()
        # Memory that is made in inference mode cannot be filled again outside of it.
        with torch.inference_mode(mode=False), cuda.use_mem_pool(self._pool, device):
            self.tensor = torch.empty(size, dtype=torch.uint8, device=device)
        self._copied: Any = None

    def copied(self, event: Any) -> None:
        """Note the event after which its copies are done."""
        self._copied = event

    def wait(self) -> None:
        """Wait until what was copied into it is there."""
        if self._copied is not None:
            self._copied.synchronize()

    def free(self) -> bool:
        """Give it back when what runs on it has ended; False: something still holds a view of it."""
        self.wait()
        # Requests are answered with what was copied back, so that this waits for nothing as a rule.
        ended = self._cuda.Event()
        ended.record(self._cuda.default_stream(self._device))
        ended.synchronize()
        if not only_holder(self.tensor):
            return False
        del self.tensor
        # The tensor first: a pool that goes before what was taken from it would free it twice.
        del self._pool
        return True


class CudaDevice:
    """A GPU. ``cuda`` is ``torch.cuda``, or what stands for it in tests."""

    def __init__(self, index: int, cuda: Any = torch.cuda) -> None:
        self.torch_device = torch.device("cuda", index)
        self._cuda = cuda
        self._runtime = cuda.cudart()
        with cuda.device(self.torch_device):
            self._stream = cuda.Stream(self.torch_device)
        self._pinned: dict[int, list[int]] = {}

    def pin(self, block: Block) -> None:
        """Register host memory; without it copies are slower, so that a failure is only logged."""
        if block.size == 0:
            return
        begin = block.tensor.data_ptr()
        done = self._pinned.setdefault(begin, [])
        for start in range(begin, begin + block.size, REGISTER_BYTES):
            length = min(REGISTER_BYTES, begin + block.size - start)
            code = int(self._runtime.cudaHostRegister(start, length, 0))
            if code != 0:
                log.warning("cudaHostRegister of %d bytes failed with code %d", length, code)
                return
            done.append(start)

    def unpin(self, block: Block) -> None:
        """Undo ``pin``."""
        for start in self._pinned.pop(block.tensor.data_ptr(), ()):
            self._runtime.cudaHostUnregister(start)

    def fill(
        self, size: int, sources: Sequence[torch.Tensor], cancelled: Callable[[], bool]
    ) -> CudaSlab:
        """Return a slab with the sources on their way into it; see :class:`Device`.

        The CPU does not wait: the device's default stream does, so that a forward pass may be queued at once.
        """
        if cancelled():
            raise Cancelled
        with self._cuda.device(self.torch_device):
            slab = CudaSlab(self._cuda, self.torch_device, size)
            copied = self._cuda.Event()
            default = self._cuda.default_stream(self.torch_device)
            with self._cuda.stream(self._stream):
                # A slab's memory may have been another's, whose last reader was on the default stream.
                self._stream.wait_stream(default)
                start = 0
                for source in sources:
                    slab.tensor[start : start + source.numel()].copy_(source, non_blocking=True)
                    start += source.numel()
                copied.record(self._stream)
            default.wait_event(copied)
            slab.copied(copied)
        return slab
