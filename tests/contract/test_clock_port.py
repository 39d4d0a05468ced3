"""What every implementation of the clock port does: the kernel's and the fake's."""

import asyncio

import pytest

from modelhostd.adapters.clock import SystemClock
from modelhostd.ports import Clock
from tests.fakes.clock import FakeClock, settle


@pytest.fixture(params=[SystemClock, FakeClock], ids=lambda made: str(made.__name__))
def clock(request: pytest.FixtureRequest) -> Clock:
    """Return an implementation."""
    made: Clock = request.param()
    return made


async def test_time_does_not_go_back(clock: Clock) -> None:
    """Both readings are seconds; the monotonic one never falls."""
    before = clock.monotonic()
    assert clock.time() > 1_500_000_000
    await clock.sleep(0)
    assert clock.monotonic() >= before


async def test_a_sleep_lasts_at_least_its_time(clock: Clock) -> None:
    """When a sleep ends, the monotonic clock has moved on by its length."""
    before = clock.monotonic()
    task = asyncio.create_task(_sleep(clock, 0.01))
    if isinstance(clock, FakeClock):
        await clock.advance(0.01)
    assert await task >= before + 0.01 - 1e-6


async def test_a_sleep_can_be_cancelled(clock: Clock) -> None:
    """A cancelled sleep ends at once."""
    task = asyncio.create_task(_sleep(clock, 3600))
    await settle()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_the_fake_wakes_sleepers_in_the_order_of_their_time() -> None:
    """Each sleeper wakes at its own time, and what it starts is woken on the way too."""
    clock = FakeClock()
    began = clock.monotonic()
    woken: list[tuple[str, float]] = []

    async def sleeper(name: str, *delays: float) -> None:
        for delay in delays:
            await clock.sleep(delay)
            woken.append((name, round(clock.monotonic() - began, 3)))

    tasks = [
        asyncio.create_task(sleeper("a", 3.0)),
        asyncio.create_task(sleeper("b", 1.0, 1.0, 5.0)),
    ]
    await clock.wait_for_sleepers(2)
    await clock.advance(4.0)
    assert woken == [("b", 1.0), ("b", 2.0), ("a", 3.0)]
    assert clock.sleepers == 1
    clock.jump(-3600)
    await clock.advance(3.0)
    assert woken[-1] == ("b", 7.0)
    await asyncio.gather(*tasks)


async def _sleep(clock: Clock, seconds: float) -> float:
    await clock.sleep(seconds)
    return clock.monotonic()
