"""The faults of the fake database, on which tests of the host rely."""

import asyncio

import pytest

from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.resources import Event, Kind, Slot
from modelhostd.ports import Batch, Change
from tests.fakes.database import FakeDatabase

SLOT = Slot("image-gen", "minilm", 1.0)


def batch(sequence: int) -> Batch:
    """Return a batch with one event."""
    return Batch(
        (Change(Kind.SLOT, SLOT.id, SLOT),), (Event(sequence, 1.0, Kind.SLOT, SLOT.id, SLOT),)
    )


async def test_a_held_commit_is_stored_when_it_is_released() -> None:
    """Held commits wait in order; releasing one stores one."""
    database = FakeDatabase()
    await database.open()
    database.hold_commits()
    tasks = [asyncio.create_task(database.commit(batch(n))) for n in (1, 2, 3)]
    await database.wait_for_waiting(3)
    assert database.committed == []
    await database.release_commits(1)
    await tasks[0]
    assert [b.events[0].sequence for b in database.committed] == [1]
    assert not tasks[1].done()
    await database.release_commits()
    await asyncio.gather(*tasks)
    assert database.disk.last_sequence == 3


async def test_a_crash_loses_what_was_held_and_keeps_what_was_stored() -> None:
    """After a crash the disk has the acknowledged commits and no others."""
    database = FakeDatabase()
    await database.open()
    await database.commit(batch(1))
    database.hold_commits()
    held = asyncio.create_task(database.commit(batch(2)))
    await database.wait_for_waiting(1)
    await database.crash()
    with pytest.raises(asyncio.CancelledError):
        await held
    stored = await FakeDatabase(database.disk).open()
    assert stored.last_sequence == 1


async def test_failures_come_once_each_and_store_nothing() -> None:
    """Each error is raised by one commit; the next one works with the same sequence."""
    database = FakeDatabase()
    await database.open()
    database.fail_commits()
    with pytest.raises(ModelhostError) as caught:
        await database.commit(batch(1))
    assert caught.value.reason is Reason.INSUFFICIENT_DISK_SPACE
    assert database.disk.last_sequence == 0
    await database.commit(batch(1))
    assert await database.read_events(1, 10) == list(batch(1).events)
