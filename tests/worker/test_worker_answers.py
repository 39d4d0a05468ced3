"""What a worker says on its control socket: read in type, or the end of that worker; never anything else."""

import asyncio
import math

from google.protobuf.message import DecodeError
from hypothesis import example, given, settings
from hypothesis import strategies as st

from modelhostd.adapters.workers import errors as worker_errors
from modelhostd.adapters.workers.commands import BYTES_MAX
from modelhostd.adapters.workers.control import Control
from modelhostd.adapters.workers.images import Leavings
from modelhostd.adapters.workers.streams import FrameStream
from modelhostd.api import convert_values, errors
from modelhostd.core import operations
from modelhostd.core.errors import REASONS, ModelhostError, Reason
from modelhostd.core.resources import Progress
from modelhostd.ports import Loaded
from modelhostd.worker.v1 import worker_pb2
from modelhostd.worker.wire import frames
from modelhostd.worker.wire.frames import Kind, ProtocolError
from tests.worker.harness import CONFIG, spec

NUMBERS = st.one_of(st.integers(0, 2**64 - 1), st.sampled_from([0, 1, 2**50, 2**63, 2**64 - 1]))
SECONDS = st.floats() | st.sampled_from([0.0, -1.0, 1e63, math.inf, math.nan])
ANSWERS = (
    *(Kind.HELLO, Kind.LOADED, Kind.UNLOADED, Kind.CHECKED, Kind.ERROR, Kind.LOAD_PROGRESS),
    *(Kind.KEPT, Kind.DEMOTED, Kind.COPY_DROPPED),
)

loaded = st.builds(
    worker_pb2.LoadedHeader, backend=st.text(max_size=5), measured_bytes=NUMBERS, load_s=SECONDS
)
progress = st.builds(
    worker_pb2.LoadProgressHeader,
    phase=st.sampled_from(["LOADING", "x"]), done_bytes=NUMBERS, total_bytes=NUMBERS,
)  # fmt: skip
error = st.builds(
    worker_pb2.ErrorHeader,
    reason=st.sampled_from([*Reason.__members__, "", "x"]),
    message=st.text(max_size=9),
    metadata=st.dictionaries(st.sampled_from(["model", "field", "x", ""]), st.text(max_size=5)),
    retry_delay_s=SECONDS,
)
kept = st.builds(
    worker_pb2.KeptHeader,
    instance=st.just("m-1"),
    **dict.fromkeys(("weights_offset", "description_offset"), NUMBERS | st.just(4096)),
    **dict.fromkeys(("weights_length", "description_length"), NUMBERS),
    checksum=st.binary(max_size=70),
)
copies = st.builds(worker_pb2.CopyDroppedHeader, found=st.booleans(), host_bytes=NUMBERS)
headers = st.binary(max_size=60) | (loaded | progress | error | kept | copies).map(
    lambda header: header.SerializeToString()
)
frame = st.tuples(st.sampled_from(ANSWERS), st.integers(0, 5), st.integers(0, 2), headers)


class Sink:
    """Takes what is sent to the worker, and tells when the stream was given up."""

    def __init__(self) -> None:
        self.aborted = False

    def set_write_buffer_limits(self, *, high: int) -> None:
        """Have no limits."""

    def write(self, data: bytes) -> None:
        """Take it."""

    def abort(self) -> None:
        """Note it."""
        self.aborted = True


def check_contract(error: ModelhostError) -> None:
    """Fail unless an error can be told to a caller, and be stored."""
    assert errors.status_of(error).code
    assert error.metadata.keys() <= set(REASONS[error.reason].keys)
    assert convert_values.error(operations.stored(error)).reason


GARBAGE = b"\xff\xff\xff"


@settings(max_examples=300)
@given(st.lists(frame, max_size=5))
@example([(Kind.LOADED, 1, 1, GARBAGE)])
@example(
    [(Kind.LOADED, 1, 1, worker_pb2.LoadedHeader(measured_bytes=2**64 - 1).SerializeToString())]
)
@example([(Kind.ERROR, 1, 1, worker_pb2.ErrorHeader(reason="X", retry_delay_s=math.nan)
          .SerializeToString())])  # fmt: skip
@example([(Kind.LOAD_PROGRESS, 1, 1, worker_pb2.LoadProgressHeader(
    phase="LOADING", done_bytes=2**63).SerializeToString())])  # fmt: skip
@example([(Kind.COPY_DROPPED, 5, 1, worker_pb2.CopyDroppedHeader(
    found=True, host_bytes=2**63).SerializeToString())])  # fmt: skip
def test_any_answer_is_read_or_ends_the_worker(frames_: list[tuple[Kind, int, int, bytes]]) -> None:
    """Each command gets an answer, an error of the contract, or fails with its worker."""

    async def talk() -> None:
        leavings = Leavings()
        leavings.begin(("m-1", 1))
        leavings.loaded(("m-1", 1), 2**30)
        control = Control(lambda _: None, leavings.told)
        lost: list[Exception | None] = []
        stream = FrameStream(frames.CONTROL_FROM_WORKER, control.take, lost.append)
        stream.connection_made(sink := Sink())  # type: ignore[arg-type]
        control.stream = stream
        told: list[object] = []
        _, load = control.load(spec(), told.append)
        greeting = asyncio.ensure_future(control.hello(CONFIG, "cpu", {}))
        checking = asyncio.ensure_future(control.check("m-1", 1, 20.0))
        moves = [asyncio.ensure_future(f("m-1", 1)) for f in (control.demote, control.drop_copy)]
        await asyncio.sleep(0)
        for kind, request, generation, header in frames_:
            stream.data_received(frames.encode(kind, frames.FINAL, request, generation, header))
        if sink.aborted:
            stream.connection_lost(None)
            assert isinstance(lost[0], ProtocolError)
        control.fail_all(lambda model: worker_errors.lost("cpu", model, "gone"))
        for answer in (load, greeting, checking):
            try:
                found = await answer
            except ModelhostError as refused:
                check_contract(refused)
            else:
                if isinstance(found, Loaded):
                    assert 0 <= found.measured_bytes <= BYTES_MAX
                    assert convert_values.duration(found.load_s) is not None
        assert all(0 <= left <= BYTES_MAX for left in await asyncio.gather(*moves))
        for image in leavings.of([("m-1", 1)], {}).values():
            assert image.sound(2**30)
        assert all(0 <= p.done_bytes <= BYTES_MAX for p in told if isinstance(p, Progress))

    asyncio.run(talk())


@given(headers)
def test_any_error_is_one_of_the_contract(data: bytes) -> None:
    """Whatever an ERROR frame holds, it is no header, or an error that can be told and stored."""
    try:
        told = worker_errors.from_header(data)
    except DecodeError:
        return
    check_contract(told)
