"""Many watchers of a real daemon: readers miss nothing, those that never read cost little and delay nobody."""

import asyncio
from collections.abc import Iterator, Sequence
from typing import ClassVar

import grpc
import pytest

from bench import attacks
from bench.raw_connection import RawConnection
from modelhost.v1 import event_service_pb2
from modelhostd.api.held import STALL_S
from tests import event_validators as validate
from tests.connections.scene import CALL_S, MIB, OWN, Scene, scene
from tests.support import wait_until_async

READERS = 100
NEVER_READERS = 100
EVENTS = 300
WINDOW = 64 * 1024
NEVER_READER_BYTES = 128 * 1024
CACHES_BYTES = 16 * MIB
"""What the daemon keeps of encoded events for all watchers together, with room for the allocator."""

Response = event_service_pb2.WatchEventsResponse


class Reader:
    """A watcher that keeps the bytes of what it is sent; equal messages are parsed once for all."""

    parsed: ClassVar[dict[bytes, Response]] = {}

    def __init__(self, channel: grpc.aio.Channel) -> None:
        request = event_service_pb2.WatchEventsRequest(start_sequence=1)
        self._call = channel.unary_stream(attacks.WATCH)(request.SerializeToString())
        self._messages: list[Response] = []
        self._last = 0

    async def until(self, sequence: int) -> validate.Stream:
        """Read up to an event, and return all that came."""
        async with asyncio.timeout(CALL_S * 5):
            while self._last < sequence:
                data = await self._call.read()
                assert isinstance(data, bytes), "the stream ended"
                message = self.parsed.setdefault(data, Response.FromString(data))
                self._messages.append(message)
                if message.events:
                    self._last = message.events[-1].sequence
        return validate.take_apart(self._messages)


@pytest.fixture
def at():
    """A daemon and its other client."""
    with scene() as made:
        yield made


@pytest.fixture
def held() -> Iterator[list[RawConnection]]:
    """Connections that are closed at the end, however it comes: what is left open fails another test."""
    made: list[RawConnection] = []
    yield made
    for connection in made:
        connection.close()


def _channels(at: Scene, count: int, *options: tuple[str, int]) -> Sequence[grpc.aio.Channel]:
    return [grpc.aio.insecure_channel(at.tcp, options=[*OWN, *options]) for _ in range(count)]


@pytest.mark.timeout(450)  # 20,000 messages to one test process, beside whatever else runs
async def test_readers_and_publishing_go_on_beside_watchers_that_never_read(
    at: Scene, held: list[RawConnection]
) -> None:
    """100 that read miss nothing beside 100 that never read; changes are acknowledged, memory is bounded."""
    Reader.parsed.clear()
    channels = _channels(at, 2)
    readers = [Reader(channels[n % 2]) for n in range(READERS)]
    first = at.last_sequence()
    await asyncio.gather(*(reader.until(first) for reader in readers))
    before = at.rss_bytes()
    began = asyncio.get_running_loop().time()
    held += await asyncio.to_thread(attacks.never_reading, at.tcp, NEVER_READERS)
    await wait_until_async(lambda: at.subscribers() == READERS + NEVER_READERS)

    # Each of these is answered, or the call's deadline would end the test.
    publishing = asyncio.to_thread(at.publish, EVENTS, padding=800)
    last, *_ = await asyncio.gather(publishing, *(r.until(first + EVENTS) for r in readers))
    assert EVENTS * 800 > 3 * WINDOW, "too little to fill a window"
    assert at.rss_bytes() - before < NEVER_READERS * NEVER_READER_BYTES + CACHES_BYTES

    stalled = at.rss_bytes()
    last = await asyncio.to_thread(at.publish, EVENTS, padding=4000)
    streams = await asyncio.gather(*(reader.until(last) for reader in readers))
    # Who reads nothing has had its share: more events take no more memory.
    assert at.rss_bytes() - stalled < CACHES_BYTES
    watching = at.subscribers()
    if asyncio.get_running_loop().time() - began < STALL_S / 2:
        # Later, as on a slow machine, those that read nothing have been ended, as they should be; how much
        # earlier than after STALL_S depends on how old the time is that the daemon's loop had then.
        assert watching == READERS + NEVER_READERS
    for stream in streams:
        validate.check_contiguous(stream.events, 1, last)
        validate.check_same(streams[0].events, stream.events)
    for connection in held:
        connection.close()
    await asyncio.gather(*(channel.close() for channel in channels))
    await wait_until_async(lambda: at.subscribers() == 0)


async def test_a_watcher_that_reads_late_misses_nothing(at: Scene) -> None:
    """A client that reads nothing while its window fills gets every event in order once it reads."""
    # Without the probe the window stays small: else the client's library reads ahead.
    (channel,) = _channels(at, 1, ("grpc.http2.bdp_probe", 0))
    late = Reader(channel)
    await wait_until_async(lambda: at.subscribers() == 1)
    last = await asyncio.to_thread(at.publish, EVENTS, padding=1500)
    stream = await late.until(last)
    validate.check_contiguous(stream.events, 1, last)
    await channel.close()
