"""The two arenas of one worker, as the daemon holds them."""

import contextlib
import os
import threading

from modelhostd.worker.wire import arena
from modelhostd.worker.wire.arena import Arena
from modelhostd.worker.wire.blackbox import PAGE_BYTES


class Arenas:
    """Both arenas, mapped, with the descriptors that the worker is to inherit."""

    def __init__(self, device: str, size: int) -> None:
        """Make, seal and map them; only the black box behind the responses has its memory yet.

        Takes no time. Raises ``OSError``.
        """
        self._size = size
        # ``fill`` and ``close`` come from threads: nothing is unmapped while it is being filled.
        self._lock = threading.Lock()
        self._closed = False
        with contextlib.ExitStack() as undo:
            self.requests_fd = arena.create(f"modelhost-{device}-requests", size)
            undo.callback(os.close, self.requests_fd)
            self.responses_fd = arena.create(f"modelhost-{device}-responses", size + PAGE_BYTES)
            undo.callback(os.close, self.responses_fd)
            arena.allocate(self.responses_fd, size, PAGE_BYTES)
            self.requests = Arena(self.requests_fd, size, writable=True)
            undo.callback(self.requests.close)
            self.responses = Arena(self.responses_fd, size + PAGE_BYTES, writable=False)
            undo.pop_all()

    def fill(self) -> None:
        """Give both their memory, before the worker is greeted. Takes long: call it in a thread.

        Raises ``OSError`` where there is no memory. The descriptors are closed afterwards: the worker
        has its own.
        """
        with self._lock:
            if self._closed:
                return
            try:
                arena.allocate(self.requests_fd, 0, self._size)
                arena.allocate(self.responses_fd, 0, self._size)
                self.requests.populate()
                self.responses.populate()
            finally:
                self._close_descriptors()

    def close(self) -> None:
        """Let go of everything; waits for ``fill`` to end, so call it in a thread once that has begun."""
        with self._lock:
            self._closed = True
            self._close_descriptors()
            self.requests.close()
            self.responses.close()

    def _close_descriptors(self) -> None:
        for descriptor in (self.requests_fd, self.responses_fd):
            if descriptor >= 0:
                os.close(descriptor)
        self.requests_fd = self.responses_fd = -1
