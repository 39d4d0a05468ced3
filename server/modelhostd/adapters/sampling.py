"""What runs beside a transfer in the loop: progress is sampled, standing connections are ended."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from modelhostd.adapters.cancel import Canceller
from modelhostd.adapters.connections import Connections
from modelhostd.adapters.progress import Meter
from modelhostd.core.resources import Phase, Progress

TICK_S = 0.1
"""How often progress is sampled and standing connections are looked for."""


def enter(meter: Meter, phase: Phase, report: Callable[[Progress], None]) -> None:
    """Go to the next phase and say so at once: a phase may be over before the next sample."""
    meter.enter(phase)
    report(meter.snapshot(time.monotonic()))


@asynccontextmanager
async def ticking(
    canceller: Canceller,
    connections: Connections,
    meter: Meter | None,
    report: Callable[[Progress], None] | None,
) -> AsyncIterator[None]:
    """Sample progress and end standing connections while the body runs; close everything after it."""
    last: Progress | None = None

    def sample(now: float) -> None:
        nonlocal last
        if meter is not None and report is not None and (new := meter.snapshot(now)) != last:
            last = new
            report(new)

    async def tick() -> None:
        while True:
            now = time.monotonic()
            canceller.expire(now)
            sample(now)
            await asyncio.sleep(TICK_S)

    ticker = asyncio.create_task(tick())
    try:
        yield
    finally:
        ticker.cancel()
        try:
            await asyncio.gather(ticker, return_exceptions=True)
        finally:
            connections.close()
            # How far it came, also when it failed.
            sample(time.monotonic())
