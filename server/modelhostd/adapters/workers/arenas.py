"""The two arenas of one worker, as the daemon holds them."""

import contextlib
import os
import threading

from modelhostd.worker.wire import arena
from modelhostd.worker.wire.arena import EXTENT_BYTES, Arena
from modelhostd.worker.wire.blackbox import PAGE_BYTES


class Shared:
    """One arena, mapped here; its descriptor is for the worker to inherit, and for memory that is to come."""

    def __init__(self, name: str, size: int, *, beyond: int = 0, writable: bool) -> None:
        """Make, seal and map it: ``size`` bytes without memory, and ``beyond`` them some that have it.

        Takes no time. Raises ``OSError``.
        """
        self.size = size
        # ``extend`` and ``close`` come from threads: nothing is unmapped while it is being filled.
        self._lock = threading.Lock()
        self.fd = arena.create(name, size + beyond)
        try:
            if beyond:
                arena.allocate(self.fd, size, beyond)
            self.memory = Arena(self.fd, size + beyond, writable=writable)
        except BaseException:
            os.close(self.fd)
            raise

    def extend(self, start: int, end: int) -> None:
        """Allocate and map a part that nobody uses yet; nothing once closed. Call it in a thread.

        Raises ``OSError`` where there is no memory.
        """
        with self._lock:
            if self.fd >= 0:
                arena.allocate(self.fd, start, end - start)
                self.memory.populate(start, end - start)

    def close(self) -> None:
        """Let go of it; waits for ``extend`` to end, so call it in a thread once that may have begun."""
        with self._lock:
            if self.fd >= 0:
                os.close(self.fd)
                self.fd = -1
                self.memory.close()


class Arenas:
    """Both arenas. A page behind the responses, which has its memory at once, is the worker's black box."""

    def __init__(self, device: str, size: int) -> None:
        """Make them. Takes no time. Raises ``OSError``."""
        with contextlib.ExitStack() as undo:
            self.requests = Shared(f"modelhost-{device}-requests", size, writable=True)
            undo.callback(self.requests.close)
            self.responses = Shared(
                f"modelhost-{device}-responses", size, beyond=PAGE_BYTES, writable=False
            )
            undo.pop_all()

    def fill(self) -> None:
        """Give both their first extent. Takes long: call it in a thread. Raises ``OSError`` where there is no memory."""
        for shared in (self.requests, self.responses):
            shared.extend(0, min(shared.size, EXTENT_BYTES))

    def close(self) -> None:
        """Let go of both; see :meth:`Shared.close`."""
        self.requests.close()
        self.responses.close()
