"""Gives an arena more memory when it is needed: in a thread, before it is used up, and nobody waits for it.

What comes before there is more goes by frames. Where the machine has none to give, that stays so.
"""

import asyncio
import logging
from collections.abc import Callable

from modelhostd.adapters.workers.arenas import Shared
from modelhostd.worker.wire.arena import EXTENT_BYTES

log = logging.getLogger("modelhostd.workers")

AHEAD_BYTES = EXTENT_BYTES // 4
"""What shall be allocated beyond the slots in use; 16 requests of 1 MiB at a time do with the first extent."""
RETRY_S = 10.0
"""After the machine had no memory."""


class Growth:
    """How far one arena has memory. Loop thread only; ``grown`` is told ``ready`` whenever it changes."""

    def __init__(self, shared: Shared, grown: Callable[[int], None]) -> None:
        self.ready = 0
        self._shared = shared
        self._grown = grown
        self._loop = asyncio.get_running_loop()
        self._task: asyncio.Task[None] | None = None
        self._not_before = 0.0

    def begin(self) -> None:
        """Note that the first extent is there."""
        self._is(min(self._shared.size, EXTENT_BYTES))

    def used(self, end: int) -> None:
        """Note a slot that ends at ``end``."""
        if end + AHEAD_BYTES > self.ready:
            self._grow(end + AHEAD_BYTES)

    def missed(self, length: int) -> None:
        """Note that there was no room for a slot of ``length`` bytes."""
        if length <= self._shared.size:
            self._grow(self.ready + length)

    def _grow(self, need: int) -> None:
        """Have ``need`` bytes or, where the arena is smaller, all of it."""
        if self._task is not None or self.ready == self._shared.size:
            return
        if self._loop.time() >= self._not_before:
            end = min(-(-need // EXTENT_BYTES) * EXTENT_BYTES, self._shared.size)
            self._task = self._loop.create_task(self._extend(end))

    async def _extend(self, end: int) -> None:
        try:
            await self._loop.run_in_executor(None, self._shared.extend, self.ready, end)
        except OSError as error:
            self._not_before = self._loop.time() + RETRY_S
            missing = (end - self.ready) >> 20
            log.warning("no %d MiB more for large messages: %s", missing, error.strerror)
        else:
            self._is(end)
        finally:
            self._task = None

    def _is(self, ready: int) -> None:
        self.ready = ready
        self._grown(ready)
