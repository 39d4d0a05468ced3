"""The daemon's book of what is in flight in one worker, against answers that a worker should not give."""

import time

import pytest

from modelhostd.adapters.workers.calls import Calls
from modelhostd.worker.v1 import worker_pb2
from modelhostd.worker.wire import frames
from modelhostd.worker.wire.arena import Arena, create
from modelhostd.worker.wire.frames import Frame, Kind
from tests.worker.harness import CONFIG, spec

ARENA_BYTES = 1 << 20
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
    arenas = [Arena(create("test", ARENA_BYTES), ARENA_BYTES, writable=True) for _ in range(2)]
    made = Calls(CONFIG, "cpu", *arenas, lambda request: None)
    made.stream = Sent()
    return made


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
