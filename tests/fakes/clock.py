"""A clock that stands still until a test moves it."""

import asyncio
import heapq
import itertools

from tests.support import DEADLINE_S

SETTLE_ROUNDS = 50


async def settle(rounds: int = SETTLE_ROUNDS) -> None:
    """Let every task that can run do so: give the loop ``rounds`` turns."""
    for _ in range(rounds):
        await asyncio.sleep(0)


class FakeClock:
    """A :class:`modelhostd.ports.Clock` whose time moves only by :meth:`advance`.

    ``advance`` wakes sleepers in the order of their time (then of their call), each at its own time,
    and lets the tasks it woke run before it goes on.
    """

    def __init__(self, time: float = 1_700_000_000.0, monotonic: float = 1_000.0) -> None:
        self._offset = time - monotonic
        self._now = monotonic
        self._order = itertools.count()
        self._sleepers: list[tuple[float, int, asyncio.Future[None]]] = []
        self._added = asyncio.Event()

    def time(self) -> float:
        """Return the fake seconds since the epoch."""
        return self._now + self._offset

    def monotonic(self) -> float:
        """Return the fake monotonic seconds."""
        return self._now

    async def sleep(self, delay_s: float) -> None:
        """Wait until the clock was advanced by ``delay_s``."""
        if delay_s <= 0:
            await asyncio.sleep(0)
            return
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._sleepers, (self._now + delay_s, next(self._order), future))
        self._added.set()
        await future

    @property
    def sleepers(self) -> int:
        """How many tasks sleep on this clock."""
        return sum(not future.done() for _, _, future in self._sleepers)

    async def advance(self, seconds: float) -> None:
        """Move time forward by ``seconds``, waking those whose time comes on the way."""
        end = self._now + seconds
        await settle()
        while self._sleepers and self._sleepers[0][0] <= end:
            when, _, future = heapq.heappop(self._sleepers)
            self._now = max(self._now, when)
            if not future.done():
                future.set_result(None)
                await settle()
        self._now = end
        await settle()

    def jump(self, seconds: float) -> None:
        """Set the wall clock forward or back (an NTP step); monotonic time does not move."""
        self._offset += seconds

    async def wait_for_sleepers(self, count: int, timeout_s: float = DEADLINE_S) -> None:
        """Return when at least ``count`` tasks sleep on this clock."""
        async with asyncio.timeout(timeout_s):
            while self.sleepers < count:
                self._added.clear()
                await self._added.wait()
