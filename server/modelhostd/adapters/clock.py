"""The real clock."""

import asyncio
import time


class SystemClock:
    """A :class:`modelhostd.ports.Clock` that the kernel keeps."""

    def time(self) -> float:
        """Return seconds since the epoch."""
        return time.time()

    def monotonic(self) -> float:
        """Return seconds that never go back."""
        return time.monotonic()

    async def sleep(self, delay_s: float) -> None:
        """Wait ``delay_s`` seconds."""
        await asyncio.sleep(delay_s)
