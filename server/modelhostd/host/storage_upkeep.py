"""What the storage needs now and then: downloads that wait for room, last uses, the policies' limits."""

import asyncio
from collections.abc import Awaitable, Callable

import structlog

from modelhostd.core.errors import ModelhostError
from modelhostd.host.room_waits import LOOK_S, RoomWaits
from modelhostd.host.space import Space
from modelhostd.host.uses import Uses
from modelhostd.ports import Clock

log = structlog.get_logger(__name__)

MINUTE_S = 60.0


class StorageUpkeep:
    """The ticker of all that."""

    def __init__(self, clock: Clock, waits: RoomWaits, space: Space, uses: Uses) -> None:
        self._clock = clock
        self._waits = waits
        self._space = space
        self._uses = uses
        self._ticker: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Take up the last uses, and begin."""
        self._space.settings_changed()
        await _guarded(self._uses.open)
        self._ticker = asyncio.create_task(self._tick(), name="storage upkeep")

    async def stop(self) -> None:
        """End, and store the last uses."""
        if self._ticker is not None:
            self._ticker.cancel()
            await asyncio.wait([self._ticker])
        await self._space.stop()
        await _guarded(self._uses.store)

    async def _tick(self) -> None:
        minute = self._clock.monotonic()
        while True:
            await self._clock.sleep(LOOK_S)
            await _guarded(self._waits.look)
            if self._clock.monotonic() - minute >= MINUTE_S:
                minute = self._clock.monotonic()
                await _guarded(self._uses.store)
                await _guarded(self._space.enforce)


async def _guarded(work: Callable[[], Awaitable[None]]) -> None:
    """Do it; the next tick does what failed in this one."""
    try:
        await work()
    except ModelhostError as error:
        log.warning("the storage's upkeep failed", reason=error.reason, message=error.message)
    except Exception:
        log.exception("the storage's upkeep failed unexpectedly")
