"""Slabs on a CUDA device: pinned sources, copies on a stream of their own, memory that goes back whole.

Pinning runs at a fifth of the copy's rate, so it is done once per image and not per swap. torch's own pinned allocator rounds
to powers of two and keeps for ever, so the arena's memory is registered as it is. A slab in a pool of its own shares no
segment with activations, and goes back to the driver when the pool does.
"""

import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from modelhostd.worker.image.arena import only_holder

log = logging.getLogger("modelhostd.worker")


class CudaSlab:
    """A slab on a GPU."""

    def __init__(self, cuda: Any, device: torch.device, stream: Any, size: int) -> None:
        self._cuda = cuda
        self._default = cuda.default_stream(device)
        self._stream = stream
        self._copied = cuda.Event()
        self._pool = cuda.MemPool()
        # Memory that is made in inference mode cannot be filled again outside of it.
        with torch.inference_mode(mode=False), cuda.use_mem_pool(self._pool, device):
            self.tensor = torch.empty(size, dtype=torch.uint8, device=device)

    def copy(self, start: int, source: torch.Tensor) -> None:
        """Queue a copy; from memory that is not pinned it is slower, and done when this returns."""
        with self._cuda.stream(self._stream):
            self.tensor[start : start + source.numel()].copy_(source, non_blocking=True)

    def ready(self) -> None:
        """Have the device's default stream wait for the copies; the CPU does not."""
        self._copied.record(self._stream)
        self._default.wait_event(self._copied)

    def wait(self) -> None:
        """Wait until all copies are done."""
        self._copied.record(self._stream)
        self._copied.synchronize()

    def free(self, views: int = 0) -> bool:
        """Give it back when what runs on it has ended; False: something else still holds a view of it."""
        self.wait()
        # Requests are answered with what was copied back, so that this waits for nothing as a rule.
        ended = self._cuda.Event()
        ended.record(self._default)
        ended.synchronize()
        if not only_holder(self.tensor, views):
            return False
        # The memory goes now, whatever views have the storage.
        self.tensor.untyped_storage().resize_(0)
        del self.tensor
        # The tensor first: a pool that goes before what was taken from it would free it twice.
        del self._pool
        return True


class CudaDevice:
    """A GPU. ``cuda`` is ``torch.cuda``, or what stands for it in tests."""

    extents_at_once = 1

    def __init__(self, index: int, cuda: Any = torch.cuda) -> None:
        self.torch_device = torch.device("cuda", index)
        self._cuda = cuda
        self._runtime = cuda.cudart()
        with cuda.device(self.torch_device):
            self._stream = cuda.Stream(self.torch_device)
        self._pinned: set[int] = set()
        self._lock = threading.Lock()
        # The runtime keeps the error of a call for its thread, whose next kernel would then be said to have failed.
        self._registrar = ThreadPoolExecutor(1, "pin")

    def slab(self, size: int) -> CudaSlab:
        """Return memory of the GPU. Raises torch's OutOfMemoryError."""
        with self._cuda.device(self.torch_device):
            return CudaSlab(self._cuda, self.torch_device, self._stream, size)

    def pin(self, memory: torch.Tensor) -> None:
        """Register memory of the host; without that copies are slower, so that a failure is only logged."""
        address, length = memory.data_ptr(), memory.numel()
        with self._lock:
            if not length or address in self._pinned:
                return
            self._pinned.add(address)
        code = self._registrar.submit(self._register, address, length).result()
        if code != 0:
            log.warning("cudaHostRegister of %d bytes failed with code %d", length, code)
            with self._lock:
                self._pinned.discard(address)

    def unpin(self, memory: torch.Tensor) -> None:
        """Undo ``pin`` of the same memory."""
        address = memory.data_ptr()
        with self._lock:
            if address not in self._pinned:
                return
            self._pinned.discard(address)
        self._registrar.submit(self._unregister, address).result()

    def _register(self, address: int, length: int) -> int:
        # Else a thread's first call makes a context on the first GPU, whichever this one is.
        with self._cuda.device(self.torch_device):
            return int(self._runtime.cudaHostRegister(address, length, 0))

    def _unregister(self, address: int) -> None:
        with self._cuda.device(self.torch_device):
            code = int(self._runtime.cudaHostUnregister(address))
        if code != 0:
            log.warning("cudaHostUnregister failed with code %d", code)
