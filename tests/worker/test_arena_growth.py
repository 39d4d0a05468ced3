"""The memory of arenas: a little at the start, more as it is needed, and none at all where the machine has none."""

import asyncio
import dataclasses
import errno
import os
import threading

import numpy as np
import pytest

from modelhostd.adapters.workers.arenas import Arenas, Shared
from modelhostd.adapters.workers.growth import AHEAD_BYTES, Growth
from modelhostd.worker.wire.arena import EXTENT_BYTES
from tests.support import wait_until_async
from tests.worker.harness import CONFIG, DEADLINE_S, decode, encode, ignore, numbers, running, spec

LARGE = dataclasses.replace(CONFIG, arena_bytes=4 * EXTENT_BYTES)
TOO_LARGE_FOR_ONE = EXTENT_BYTES + 2**20


def held(arenas):
    """Return the bytes of memory that two arenas have."""
    return [os.fstat(shared.fd).st_blocks * 512 for shared in (arenas.requests, arenas.responses)]


def arenas_of(workers):
    """Return the arenas of the only worker."""
    (seat,) = workers._seats.values()
    return seat.worker._arenas


async def there_and_back(workers, size):
    """Have a tensor of ``size`` bytes come back as it went."""
    sent = numbers(size // 4)
    reply = await workers.infer("cpu", "m-1", 1, encode({"x": sent}), timeout_s=None)
    assert np.array_equal(decode(reply.payload)[1]["x"], sent)


async def test_memory_comes_when_it_is_needed():
    """A worker starts with an extent each way; a message over it goes by frames, and the next one has its slot."""
    async with running(LARGE) as (workers, _):
        await workers.load("cpu", spec(), ignore)
        arenas = arenas_of(workers)
        assert held(arenas) == [EXTENT_BYTES, EXTENT_BYTES + 4096]
        await there_and_back(workers, TOO_LARGE_FOR_ONE)
        await wait_until_async(lambda: min(held(arenas)) > TOO_LARGE_FOR_ONE)
        calls = next(iter(workers._seats.values())).worker._calls
        await wait_until_async(
            lambda: not (calls._for_requests._task or calls._responses._growth._task)
        )
        before = held(arenas)
        await there_and_back(workers, TOO_LARGE_FOR_ONE)
        assert not calls._inline_bytes
        assert held(arenas) == before


async def test_without_memory_messages_go_by_frames(monkeypatch, caplog):
    """Where the machine has no more to give, large messages still arrive; it is told once, not for each."""
    extend = Shared.extend

    def only_the_first(shared, start, end):
        if start:
            raise OSError(errno.ENOSPC, "No space left on device")
        extend(shared, start, end)

    monkeypatch.setattr(Shared, "extend", only_the_first)
    async with running(LARGE) as (workers, _):
        await workers.load("cpu", spec(), ignore)
        for _ in range(3):
            await there_and_back(workers, TOO_LARGE_FOR_ONE)
        await there_and_back(workers, 2**20)
        assert max(held(arenas_of(workers))) <= EXTENT_BYTES + 4096
    told = [record for record in caplog.records if "for large messages" in record.message]
    assert len(told) == 2


@pytest.fixture
async def growing():
    """Give an arena of four extents with its first, how it grows, and a list of what was told."""
    arenas = Arenas("test", 4 * EXTENT_BYTES)
    arenas.fill()
    told = []
    growth = Growth(arenas.requests, told.append)
    growth.begin()
    yield arenas, growth, told
    arenas.close()


async def test_there_is_memory_ahead_of_what_is_used(growing):
    """The next extent comes before the last is used up, and once however many ask for it."""
    arenas, growth, told = growing
    growth.used(EXTENT_BYTES - AHEAD_BYTES)
    assert growth._task is None
    for end in (EXTENT_BYTES - AHEAD_BYTES + 1, EXTENT_BYTES):
        growth.used(end)
    assert growth.ready == EXTENT_BYTES
    await wait_until_async(lambda: growth._task is None)
    assert told == [EXTENT_BYTES, 2 * EXTENT_BYTES]
    assert held(arenas)[0] == 2 * EXTENT_BYTES


async def test_it_grows_to_its_size_and_not_beyond(growing):
    """What never fits takes no memory; what would fit takes as much as there may be."""
    arenas, growth, told = growing
    growth.missed(4 * EXTENT_BYTES + 1)
    assert growth._task is None
    growth.missed(4 * EXTENT_BYTES)
    await wait_until_async(lambda: growth._task is None)
    assert told[-1] == growth.ready == 4 * EXTENT_BYTES
    growth.used(4 * EXTENT_BYTES)
    assert growth._task is None
    assert held(arenas)[0] == 4 * EXTENT_BYTES


async def test_an_arena_that_is_closed_meanwhile_takes_no_memory(growing, monkeypatch):
    """A worker that dies while its arena grows is let go of, and nothing fails."""
    arenas, growth, _ = growing
    gate = threading.Event()
    extend = Shared.extend

    def slow(shared, start, end):
        gate.wait(DEADLINE_S)
        extend(shared, start, end)

    monkeypatch.setattr(Shared, "extend", slow)
    growth.missed(EXTENT_BYTES)
    task = growth._task
    await asyncio.sleep(0)
    arenas.close()
    gate.set()
    await task
