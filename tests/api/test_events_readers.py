"""Many watchers: those that read get everything, those that do not cost little and delay nobody."""

import asyncio
from pathlib import Path

import grpc
import pytest

from modelhostd.api.event_batches import BATCHES_CACHED_BYTES, EVENTS_CACHED_BYTES
from tests import event_validators as validate
from tests.api.event_scene import scene
from tests.api.serving import info_of
from tests.host.support import World
from tests.support import wait_until_async

READERS = 100
NEVER_READERS = 100
EVENTS = 300
# Else a client takes 4 MB into its own memory before its window closes.
SMALL_WINDOW = ("grpc.http2.bdp_probe", 0)


@pytest.fixture
async def world(tmp_path: Path) -> World:
    return World(tmp_path)


async def test_readers_miss_nothing_beside_watchers_that_never_read(world: World) -> None:
    """100 that read get every event in order while 100 never read; publishing waits for none of them."""
    async with scene(world) as at:
        closed = [at.serving.channel(SMALL_WINDOW) for _ in range(2)]
        stuck = [at.watch(closed[i % 2], start_sequence=1) for i in range(NEVER_READERS)]
        readers = [at.watch(start_sequence=1) for _ in range(READERS)]
        await asyncio.gather(*(watch.call.initial_metadata() for watch in stuck))
        await asyncio.gather(*(watch.opened() for watch in readers))
        last = 0
        for _ in range(EVENTS // 10):
            # Were a watcher in the way, this would wait for one that never reads: for ever.
            last = await at.publish(10, padding=800)
        assert EVENTS * 800 > 3 * 64 * 1024, "too little to fill a window"
        streams = await asyncio.gather(*(watch.until(last) for watch in readers))
        for stream in streams:
            validate.check_contiguous(stream.events, 1, last)
        assert at.service.figures.events_sent < (READERS + NEVER_READERS // 2) * last
        assert at.service.watcher_count == READERS + NEVER_READERS
        late = at.watch(start_sequence=1)
        validate.check_same((await late.until(last)).events, streams[0].events)


async def test_events_are_encoded_once_for_all(world: World) -> None:
    """However many watch, each event becomes bytes once, and those who read alike share batches."""
    async with scene(world) as at:
        watches = [at.watch() for _ in range(20)]
        await asyncio.gather(*(watch.opened() for watch in watches))
        last = await at.publish(100)
        await asyncio.gather(*(watch.until(last) for watch in watches))
        figures = at.service.figures
        assert figures.events_encoded == last - watches[0].stream.bookmarks[0].sequence
        assert figures.events_sent == 20 * figures.events_encoded
        assert figures.batches_encoded <= figures.batches_sent / 10


async def test_what_is_kept_encoded_is_bounded(world: World) -> None:
    """However long history is, what is kept of it as bytes stays below its limits."""
    async with scene(world) as at:
        for _ in range(15):
            last = await at.publish(100, padding=10_000)
        watch = at.watch(start_sequence=1)
        await watch.until(last)
        assert at.service.figures.events_encoded == last
        assert at.service._batches._events._bytes <= EVENTS_CACHED_BYTES
        assert at.service._batches._batches._bytes <= BATCHES_CACHED_BYTES
        assert last * 10_000 > EVENTS_CACHED_BYTES > BATCHES_CACHED_BYTES


async def test_a_stream_that_is_not_read_is_given_up(world: World) -> None:
    """After the stall deadline the watcher is gone; a client that reads at last learns that it was."""
    async with scene(world, stall_s=2.0) as at:
        last = await at.publish(300, padding=1000)
        watch = at.watch(at.serving.channel(SMALL_WINDOW), start_sequence=1)
        await watch.call.initial_metadata()
        await wait_until_async(lambda: at.serving.wrapper.stalled_count == 1)
        await wait_until_async(lambda: at.service.watcher_count == 0)
        assert not len(at.serving.calls)
        error = await watch.fail()
        assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert info_of(error).metadata["method"] == "WatchEvents"
        again = at.watch(start_sequence=watch.stream.position + 1)
        validate.check_resumed([watch.stream, await again.until(last)])
