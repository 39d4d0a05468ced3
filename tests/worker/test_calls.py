"""The daemon's book of what is in flight in one worker, against answers that a worker should not give."""

import asyncio
import gc
import time
import weakref

import pytest

from modelhostd.adapters.workers import errors
from modelhostd.adapters.workers.arenas import Arenas
from modelhostd.adapters.workers.calls import Calls
from modelhostd.adapters.workers.responses import READ_SHARE
from modelhostd.core.errors import Reason
from modelhostd.worker.v1 import worker_pb2
from modelhostd.worker.wire import frames
from modelhostd.worker.wire.arena import EXTENT_BYTES
from modelhostd.worker.wire.frames import Frame, Kind, ProtocolError
from tests.worker.harness import CONFIG, spec

LARGEST = 2**64 - 1


class Sent:
    """Takes the place of the socket: keeps what is sent."""

    paused = False

    def __init__(self):
        self.data = b""

    def write(self, data):
        """Keep it."""
        self.data += data


@pytest.fixture
async def calls():
    """What is in flight in a worker that nobody started."""
    arenas = Arenas("test", CONFIG.arena_bytes)
    arenas.fill()
    made = Calls(CONFIG, "cpu", arenas, lambda request: None)
    made.stream = Sent()
    made.begin()
    (credit,) = frames.Decoder(frames.DATA_TO_WORKER).feed(made.stream.data)
    ready = worker_pb2.CreditHeader.FromString(credit.header).response_ready_bytes
    assert ready == min(CONFIG.arena_bytes, EXTENT_BYTES)
    made.stream.data = b""
    yield made
    arenas.close()


async def answer(calls, size, offset):
    """Send a request, answer it with a slot, and return what was sent to the worker."""
    calls.stream.data = b""
    reply = calls.infer(spec("m"), "m", b"question", None, 0)
    sent = frames.Decoder(frames.DATA_TO_WORKER).feed(calls.stream.data)
    request = sent[-1]
    header = worker_pb2.ResponseHeader(slot_offset=offset, slot_length=size).SerializeToString()
    flags = frames.FINAL | frames.ARENA
    calls.take(Frame(Kind.RESPONSE, flags, request.request, request.generation, header, b""))
    assert len((await reply).payload) == size
    return sent


def slots_in(frame):
    """Return the slots that a frame gives back."""
    assert frame.kind == Kind.CREDIT
    return list(worker_pb2.CreditHeader.FromString(frame.header).slots)


async def test_slots_that_were_read_go_back_with_the_next_request(calls):
    """The worker is not woken for a slot alone; the request after it brings it."""
    (first,) = await answer(calls, 4096, 8192)
    credit, second = await answer(calls, 4096, 0)
    assert (first.kind, second.kind) == (Kind.REQUEST, Kind.REQUEST)
    assert slots_in(credit) == [8192]


async def test_slots_go_back_by_themselves_before_they_are_many(calls):
    """A worker that is asked nothing more has most of its arena back."""
    size = int(CONFIG.arena_bytes * READ_SHARE) + 1
    (request,) = await answer(calls, size, 4096)
    _, credit = frames.Decoder(frames.DATA_TO_WORKER).feed(calls.stream.data)
    assert slots_in(credit) == [4096]
    (request,) = await answer(calls, 4096, 0)
    assert request.kind == Kind.REQUEST


async def test_a_slot_where_there_is_no_memory_is_refused():
    """A worker that names a part of its arena which has none yet broke the protocol: to read it could be a SIGBUS."""
    arenas = Arenas("test", 2 * EXTENT_BYTES)
    arenas.fill()
    made = Calls(CONFIG, "cpu", arenas, lambda request: None)
    made.stream = Sent()
    made.begin()
    await answer(made, 4096, EXTENT_BYTES // 2)
    with pytest.raises(ProtocolError):
        await answer(made, 4096, EXTENT_BYTES - 4095)
    arenas.close()


async def test_a_worker_cannot_have_taken_longer_than_its_answer_took(calls):
    """The times that a worker tells are cut to what passed here: else one lie would spoil the sums for good."""
    begun = time.monotonic_ns()
    reply = calls.infer(spec("m"), "m", b"question", None, 0)
    (request,) = frames.Decoder(frames.DATA_TO_WORKER).feed(calls.stream.data)
    lie = worker_pb2.ResponseHeader(
        item_count=1,
        batch_size=1,
        queue_ns=LARGEST,
        input_ns=LARGEST,
        infer_ns=LARGEST,
        output_ns=7,
    )
    calls.take(
        Frame(
            Kind.RESPONSE,
            frames.FINAL,
            request.request,
            request.generation,
            lie.SerializeToString(),
            b"answer",
        )
    )
    told = await reply
    passed = time.monotonic_ns() - begun
    assert told.payload == b"answer"
    assert told.output_ns <= 7
    assert 0 < max(told.queue_ns, told.input_ns, told.infer_ns) <= passed


@pytest.fixture
def _without_collector():
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("end", ["answer", "error", "lost", "cancel"])
@pytest.mark.usefixtures("_without_collector")
async def test_an_answer_is_freed_when_nobody_has_it(calls, end):
    """Nothing that was in flight waits for the collector: answers of 16 MiB lay about by the hundred, in ever new memory."""
    reply = calls.infer(spec("m"), "m", b"question", None, 0)
    (request,) = frames.Decoder(frames.DATA_TO_WORKER).feed(calls.stream.data)
    if end == "cancel":
        reply.cancel()
    if end == "lost":
        calls.fail_all(errors.too_late)
    elif end == "error":
        header = worker_pb2.ErrorHeader(reason="MODEL_BUSY", message="busy").SerializeToString()
        frame = Frame(Kind.ERROR, frames.FINAL, request.request, request.generation, header, b"")
        calls.take(frame)
    else:
        frame = Frame(Kind.RESPONSE, frames.FINAL, request.request, request.generation, b"", b"a")
        calls.take(frame)
    await asyncio.gather(reply, return_exceptions=True)
    left = weakref.ref(reply)
    del reply
    await asyncio.sleep(0)
    assert left() is None


async def test_an_answer_before_its_request_was_sent_leaves_nobody_waiting(calls):
    """Who asked is told of the worker's end then, as everybody is."""
    calls.stream.paused = True
    reply = calls.infer(spec("m"), "m", bytes(CONFIG.arena_bytes + 1), None, 0)
    with pytest.raises(ProtocolError, match="before it was sent"):
        calls.take(Frame(Kind.ERROR, frames.FINAL, 1, spec("m").generation, b"", b""))
    calls.fail_all(lambda model: errors.lost("cpu", model, "killed"))
    assert reply.done()
    assert reply.exception().reason is Reason.WORKER_LOST
