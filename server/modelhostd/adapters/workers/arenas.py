"""The two arenas of one worker, as the daemon holds them."""

import contextlib
import os
from dataclasses import dataclass

from modelhostd.worker.wire import arena
from modelhostd.worker.wire.arena import Arena
from modelhostd.worker.wire.blackbox import PAGE_BYTES


@dataclass
class Arenas:
    """Both arenas, mapped, with the descriptors that the worker is to inherit."""

    requests_fd: int
    responses_fd: int
    requests: Arena
    responses: Arena

    @classmethod
    def make(cls, device: str, size: int) -> "Arenas":
        """Make, fault in, seal and map them; takes long, so call it in a thread. Raises ``OSError``."""
        with contextlib.ExitStack() as undo:
            requests_fd = arena.create(f"modelhost-{device}-requests", size)
            undo.callback(os.close, requests_fd)
            responses_fd = arena.create(f"modelhost-{device}-responses", size + PAGE_BYTES)
            undo.callback(os.close, responses_fd)
            requests = Arena(requests_fd, size, writable=True)
            undo.callback(requests.close)
            responses = Arena(responses_fd, size + PAGE_BYTES, writable=False)
            undo.pop_all()
        return cls(requests_fd, responses_fd, requests, responses)

    def close_descriptors(self) -> None:
        """Close the descriptors: the worker has its own, the mappings here stay."""
        for descriptor in (self.requests_fd, self.responses_fd):
            if descriptor >= 0:
                os.close(descriptor)
        self.requests_fd = self.responses_fd = -1

    def close(self) -> None:
        """Let go of everything."""
        self.close_descriptors()
        self.requests.close()
        self.responses.close()
