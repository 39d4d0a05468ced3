"""The log of events over a long time: bounded, read in pages that readers share, overtaking none unheard."""

import asyncio
from collections.abc import Sequence

import pytest

from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.resources import Event
from modelhostd.host.history import COMPACT_EVERY, COMPACT_STEP
from modelhostd.host.registry import History
from tests.fakes.clock import FakeClock, settle
from tests.fakes.database import FakeDisk
from tests.host.registry_desk import Desk, model


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


async def _publish(desk: Desk, count: int) -> None:
    """Publish ``count`` events in batches."""
    edits = [model("a", str(i)) for i in range(100)]
    for _ in range(count // 100):
        await desk.registry.stage(edits)


async def test_history_is_bounded_by_count_in_steps(clock: FakeClock) -> None:
    """The log keeps its count of events; what goes, goes in steps that the disk bears."""
    desk = Desk(FakeDisk(), clock, History(count=500, ring=100))
    await desk.registry.open()
    first = 1
    for _ in range(60):
        await _publish(desk, 100)
        now = desk.registry.journal.first_sequence
        assert now - first <= COMPACT_STEP
        assert min(desk.database.disk.events) == now
        first = now
    assert len(desk.database.disk.events) <= 500 + COMPACT_EVERY
    await desk.registry.close()


async def test_history_is_bounded_by_age(clock: FakeClock) -> None:
    """Events above the age go, though the log is far from its count."""
    desk = Desk(FakeDisk(), clock, History(age_s=3600.0, ring=100))
    await desk.registry.open()
    await _publish(desk, 5000)
    assert desk.registry.journal.first_sequence == 1
    await clock.advance(7200.0)
    await _publish(desk, 1500)
    assert desk.registry.journal.first_sequence == 1 + 2 * COMPACT_STEP
    events = await desk.registry.journal.read(desk.registry.journal.first_sequence)
    assert events[0].sequence == desk.registry.journal.first_sequence
    await desk.registry.close()


async def test_a_reader_that_history_overtakes_is_told(clock: FakeClock) -> None:
    """A reader whose place is compacted away gets OUT_OF_RANGE with the first that can be had."""
    desk = Desk(FakeDisk(), clock, History(count=200, ring=100))
    await desk.registry.open()
    await _publish(desk, 300)
    page = await desk.registry.journal.read(1)
    assert [e.sequence for e in page] == list(range(1, 257))
    await _publish(desk, 3000)
    with pytest.raises(ModelhostError) as caught:
        await desk.registry.journal.read(257)
    assert caught.value.reason is Reason.SEQUENCE_COMPACTED
    assert caught.value.metadata["firstSequence"] == str(desk.registry.journal.first_sequence)
    await desk.registry.close()


async def test_readers_who_lag_together_share_one_read(clock: FakeClock) -> None:
    """Many readers of the same old page cost one read of the database."""
    desk = Desk(FakeDisk(), clock, History(ring=10))
    await desk.registry.open()
    await _publish(desk, 600)
    pages = await asyncio.gather(*(desk.registry.journal.read(1) for _ in range(50)))
    assert all([e.sequence for e in page] == list(range(1, 257)) for page in pages)
    assert desk.database.reads == 1
    await desk.registry.close()


async def test_a_read_that_failed_is_not_kept(clock: FakeClock) -> None:
    """After a failed read of history, also one whose reader has gone, the next reader tries anew."""
    desk = Desk(FakeDisk(), clock, History(ring=10))
    await desk.registry.open()
    await _publish(desk, 600)
    works = desk.database.read_events
    error = ModelhostError(Reason.STORAGE_ERROR, "no", {"path": "p", "cause": "c"})

    async def broken(start: int, limit: int) -> Sequence[Event]:
        await asyncio.sleep(0)
        raise error

    desk.database.read_events = broken  # type: ignore[method-assign]
    reader = asyncio.ensure_future(desk.registry.journal.read(1))
    await asyncio.sleep(0)
    reader.cancel()
    await settle()
    desk.database.read_events = works  # type: ignore[method-assign]
    assert (await desk.registry.journal.read(1))[0].sequence == 1
    await desk.registry.close()
