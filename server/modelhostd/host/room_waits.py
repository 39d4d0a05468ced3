"""Downloads that wait for room on disk: PAUSED, and going on by themselves when there is some.

Which they are stands in the registry, so that a restart forgets none; how often each has tried, in memory.
"""

from collections.abc import Awaitable, Callable

from modelhostd.core.artifacts import waiting_for_room
from modelhostd.core.resources import FINAL_STATES, Operation
from modelhostd.host.registry import Registry

LOOK_S = 5.0
LOOK_MAX_S = 600.0


class RoomWaits:
    """Looks for room for those that wait, in the order of the queue; one that is too large lets others pass."""

    def __init__(
        self,
        registry: Registry,
        make_room: Callable[[int, str], Awaitable[bool]],
        go_on: Callable[[str], Awaitable[Operation]],
    ) -> None:
        self._registry = registry
        self._make_room = make_room
        self._go_on = go_on
        self._tries: dict[str, tuple[int, float]] = {}

    def refused(self, key: str) -> tuple[int, float]:
        """Note that a download found no room; return how often so far, and the seconds to the next look.

        They double: where the disk says that there is room and there is none (a quota), it must not try
        for ever as fast as it can.
        """
        count = self._tries.get(key, (0, 0.0))[0] + 1
        delay_s = min(LOOK_S * 2.0 ** min(count - 1, 30), LOOK_MAX_S)
        self._tries[key] = count, self._registry.clock.monotonic() + delay_s
        return count, delay_s

    async def look(self) -> None:
        """Let those go on for which there is room. Raises STORAGE_ERROR."""
        decided, now = self._registry.decided, self._registry.clock.monotonic()
        for key in list(self._tries):
            operation = decided.operations.get(key)
            if operation is None or operation.state in FINAL_STATES:
                del self._tries[key]
        given = 0
        for operation, needed in waiting_for_room(decided):
            if now < self._tries.get(operation.id, (0, 0.0))[1]:
                continue
            if await self._make_room(given + needed, operation.model):
                given += needed
                await self._go_on(operation.id)
