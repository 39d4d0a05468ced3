"""The real clock."""

import asyncio
import time


class SystemClock:
    """A :class:`modelhostd.ports.Clock` that the kernel keeps."""

    # The functions themselves: each request asks several times.
    monotonic = staticmethod(time.monotonic)
    time = staticmethod(time.time)

    async def sleep(self, delay_s: float) -> None:
        """Wait ``delay_s`` seconds."""
        await asyncio.sleep(delay_s)
