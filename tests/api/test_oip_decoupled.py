"""ModelStreamInfer: what its client does not read, and models that answer a request several times."""

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from modelhost.oip import open_inference_pb2 as oip
from modelhostd.api import oip_stream
from modelhostd.api.inference import InferenceOptions
from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.ports import LoadSpec
from tests.api.oip_scene import Stream, oip_scene, request
from tests.host.support import World
from tests.support import DEADLINE_S, wait_until_async


@pytest.fixture
async def world(tmp_path: Path) -> World:
    return World(tmp_path)


# --- what is not read -----------------------------------------------------------------------------


async def test_answers_that_are_not_read_are_counted_and_bounded(world: World) -> None:
    """A client that sends and does not read holds counted bytes, up to a bound; when it reads, all of them go."""
    mib = 1024 * 1024
    async with oip_scene(world) as at:
        await at.run.have("a")
        await at.run.load("a")
        stream = Stream(at)
        large = oip.ModelInferRequest(model_name="a", raw_input_contents=[b"\0" * 8 * mib])
        sending = asyncio.ensure_future(stream.send(*[large] * 30))
        bound = oip_stream.OUTSTANDING_BYTES_MAX
        await wait_until_async(lambda: at.service.unread.used >= bound - 8 * mib)
        await wait_until_async(lambda: at.service.budget.used == 0)
        assert at.service.unread.used <= bound + 2 * 9 * mib
        for _ in range(30):
            assert not (await stream.next()).error_message
        await sending
        await wait_until_async(lambda: at.service.unread.used == 0)


async def test_beyond_the_budget_an_answer_fails_in_band_and_the_stream_goes_on(
    world: World,
) -> None:
    """All streams together hold no more than the budget: one answer too many is QUEUE_FULL for its request."""
    mib = 1024 * 1024
    options = InferenceOptions(message_bytes_max=16 * mib, in_flight_bytes_max=16 * mib)
    async with oip_scene(world, options=options) as at:
        await at.run.have("a")
        at.service.unread.take(15 * mib, "somebody else")
        stream = Stream(at)
        large = oip.ModelInferRequest(model_name="a", raw_input_contents=[b"\0" * 2 * mib])
        await stream.send(large, request(id="small"))
        first = await stream.next()
        assert "not read" in first.error_message
        assert (await stream.next()).infer_response.id == "small"
        at.service.unread.give_back(15 * mib)
        await stream.send(large)
        assert not (await stream.next()).error_message
        await wait_until_async(lambda: at.service.unread.used == 0)


async def test_a_stream_that_is_cancelled_counts_its_answers_out(world: World) -> None:
    """What nobody will read any more does not stay in the budget."""
    async with oip_scene(world) as at:
        await at.run.have("a")
        stream = Stream(at)
        large = oip.ModelInferRequest(model_name="a", raw_input_contents=[b"\0" * 2**22])
        sending = asyncio.ensure_future(stream.send(*[large] * 8))
        await wait_until_async(lambda: at.service.unread.used > 2**23)
        stream.call.cancel()
        await asyncio.gather(sending, return_exceptions=True)
        assert await at.serving.calls.wait_idle(DEADLINE_S)
        await wait_until_async(lambda: at.service.unread.used == 0)


# --- decoupled models -----------------------------------------------------------------------------


def pieces(count: int) -> Callable[[LoadSpec, bytes], list[bytes]]:
    """Return what answers a request with ``count`` numbered responses."""

    def answer(spec: LoadSpec, payload: bytes) -> list[bytes]:
        asked = oip.ModelInferRequest.FromString(payload)
        made = []
        for number in range(count):
            one = oip.ModelInferResponse(model_name=asked.model_name, id=asked.id)
            one.parameters["number"].int64_param = number
            made.append(one.SerializeToString())
        return made

    return answer


def told(answer: oip.ModelStreamInferResponse) -> tuple[str, int, bool]:
    """Return the id, number and final flag of a decoupled response."""
    parameters = answer.infer_response.parameters
    assert parameters["triton_final_response"].HasField("bool_param")
    final = parameters["triton_final_response"].bool_param
    number = parameters["number"].int64_param if "number" in parameters else -1
    return answer.infer_response.id, number, final


async def test_a_decoupled_model_answers_several_times_and_holds_up_nobody(world: World) -> None:
    """Its responses go out as they come, in their order, between others' answers; the last one says so."""
    async with oip_scene(world) as at:
        at.run.workers.pieces["d"] = pieces(4)
        await at.run.have("d")
        await at.run.have("a")
        await at.run.load("d")
        gate = at.run.workers.piece_gate("d")
        gate.close()
        stream = Stream(at)
        await stream.send(request("d", id="d"), request("a", id="1"), request("a", id="2"))
        got = [(await stream.next()).infer_response for _ in range(3)]
        assert sorted(one.id for one in got) == ["1", "2", "d"]
        gate.open()
        rest = [told(await stream.next()) for _ in range(3)]
        assert rest == [("d", 1, False), ("d", 2, False), ("d", 3, True)]
        await stream.call.done_writing()
        assert await stream.ended()


@pytest.mark.parametrize("known", [True, False], ids=["known", "unknown"])
@pytest.mark.parametrize("wanted", [True, False], ids=["empty-final", "no-empty-final"])
async def test_the_end_of_a_decoupled_request_is_said_once(
    world: World, known: bool, wanted: bool
) -> None:
    """Where the last response is not known as such, an empty final one follows if the client asked for it."""
    async with oip_scene(world) as at:
        at.run.workers.pieces["d"] = pieces(2)
        at.run.workers.last_is_known = known
        await at.run.have("d")
        stream = Stream(at)
        asked = request("d", id="x")
        asked.parameters["triton_enable_empty_final_response"].bool_param = wanted
        await stream.send(asked)
        await stream.call.done_writing()
        want = [("x", 0, False), ("x", 1, known)]
        if wanted and not known:
            want.append(("x", -1, True))
        assert [told(await stream.next()) for _ in want] == want
        assert await stream.ended()


async def test_a_decoupled_request_that_fails_fails_in_band(world: World) -> None:
    """Before its first response or between two, an error is that request's alone."""
    async with oip_scene(world) as at:

        def broken(spec: LoadSpec, payload: bytes) -> list[bytes]:
            raise ModelhostError(Reason.INVALID_ARGUMENT, "no such colour")

        at.run.workers.pieces["d"] = broken
        await at.run.have("d")
        await at.run.have("a")
        stream = Stream(at)
        await stream.send(request("d", id="1"), request("a", id="2"))
        first = await stream.next()
        assert (first.error_message, first.infer_response.id) == ("no such colour", "1")
        assert (await stream.next()).infer_response.id == "2"


async def test_a_decoupled_model_answers_a_plain_request_once(world: World) -> None:
    """ModelInfer of such a model gives its one whole answer."""
    async with oip_scene(world) as at:
        at.run.workers.pieces["d"] = pieces(3)
        await at.run.have("d")
        assert (await at.infer(request("d", id="x"))).id == "x"
        config = (await at.stub.ModelConfig(oip.ModelConfigRequest(name="d"))).config
        assert config.model_transaction_policy.decoupled


async def test_a_decoupled_reader_that_stays_away_is_bounded(world: World) -> None:
    """Without a reader only a window of responses is made; when the client goes, the request is given up."""
    async with oip_scene(world) as at:
        made = []

        def endless(spec: LoadSpec, payload: bytes) -> list[bytes]:
            return Endless(made)  # type: ignore[return-value]

        at.run.workers.pieces["d"] = endless
        await at.run.have("d")
        await at.run.load("d")
        stream = Stream(at)
        await stream.send(request("d"))
        await wait_until_async(lambda: len(made) > 2)
        before = -1
        while before != len(made):
            before = len(made)
            for _ in range(200):
                await asyncio.sleep(0)
        assert len(made) < 200
        stream.call.cancel()
        assert await at.serving.calls.wait_idle(DEADLINE_S)
        await wait_until_async(lambda: at.run.host.inference.in_flight == 0)


class Endless(list[bytes]):
    """Responses of a MiB without end."""

    def __init__(self, made: list[int]) -> None:
        self.made = made

    def __len__(self) -> int:
        return 10**9

    def __iter__(self) -> Iterator[bytes]:
        one = oip.ModelInferResponse(raw_output_contents=[b"\0" * 2**20]).SerializeToString()
        while True:
            self.made.append(1)
            yield one
