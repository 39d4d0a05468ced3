"""What is used of ``torch.cuda``, on the CPU: every call is noted in ``log``, in order."""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any


class FakeCuda:
    """Stands for ``torch.cuda``. ``refuse_after`` registrations, the next ones fail."""

    def __init__(self, refuse_after: int = 1_000) -> None:
        self.log: list[str] = []
        self.registered: dict[int, int] = {}
        self.refuse_after = refuse_after
        self.pools = 0
        self.registrars: set[int] = set()
        """Threads that registered memory, which keep the error of a registration that failed."""
        self._chosen = threading.local()

    def cudart(self) -> "FakeCuda":
        """Return the runtime."""
        return self

    def cudaHostRegister(self, address: int, length: int, flags: int) -> int:  # noqa: N802
        """Note a registration; return its code."""
        assert self._chosen.device is not None, "this makes a context on the first GPU"
        self.registrars.add(threading.get_ident())
        if len(self.registered) >= self.refuse_after:
            return 2
        assert address % 4096 == 0
        assert flags == 0
        self.registered[address] = length
        self.log.append("register")
        return 0

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
        """Note that memory is not registered any more."""
        del self.registered[address]
        self.log.append("unregister")
        return 0

    def Stream(self, device: object) -> "_Stream":  # noqa: N802
        """Return the stream for copies."""
        return _Stream(self, "copies")

    def default_stream(self, device: object) -> "_Stream":
        """Return the stream of computations."""
        return _Stream(self, "default")

    def Event(self) -> "_Event":  # noqa: N802
        """Return an event."""
        return _Event(self)

    def MemPool(self) -> "_Pool":  # noqa: N802
        """Return a pool."""
        return _Pool(self)

    @contextlib.contextmanager
    def use_mem_pool(self, pool: object, device: object) -> Iterator[None]:
        """Have what is allocated come of a pool."""
        self.log.append("allocate")
        yield

    @contextlib.contextmanager
    def stream(self, stream: "_Stream") -> Iterator[None]:
        """Have what is queued be queued in a stream."""
        self.log.append(f"copy in {stream.name}")
        yield

    @contextlib.contextmanager
    def device(self, device: object) -> Iterator[None]:
        """Have a device be the current one."""
        self._chosen.device = device
        yield
        self._chosen.device = None


class _Stream:
    def __init__(self, cuda: FakeCuda, name: str) -> None:
        self._cuda = cuda
        self.name = name

    def wait_event(self, event: "_Event") -> None:
        self._cuda.log.append(f"{self.name} waits for {event.recorded}")


class _Event:
    def __init__(self, cuda: FakeCuda) -> None:
        self._cuda = cuda
        self.recorded = ""

    def record(self, stream: Any) -> None:
        self.recorded = stream.name

    def synchronize(self) -> None:
        self._cuda.log.append(f"synchronised with {self.recorded}")


class _Pool:
    def __init__(self, cuda: FakeCuda) -> None:
        self._cuda = cuda
        cuda.pools += 1

    def __del__(self) -> None:
        self._cuda.pools -= 1
