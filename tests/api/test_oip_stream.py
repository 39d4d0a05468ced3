"""ModelStreamInfer over a real socket and fake workers: order, errors in band, and ends."""

import asyncio
from pathlib import Path

import grpc
import pytest

from modelhost.oip import open_inference_pb2 as oip
from modelhostd.api import oip_stream
from modelhostd.api.inference import InferenceOptions
from modelhostd.core.errors import ModelhostError, Reason
from tests.api.oip_scene import Stream, oip_scene, request
from tests.api.serving import info_of
from tests.host.support import World
from tests.support import DEADLINE_S, wait_until_async

PATH = "/inference.GRPCInferenceService/ModelStreamInfer"


@pytest.fixture
async def world(tmp_path: Path) -> World:
    return World(tmp_path)


async def test_answers_come_in_the_order_of_requests(world: World) -> None:
    """Many requests to a fast and a slow model: one answer each, in order, each marked as final."""
    async with oip_scene(world) as at:
        await at.run.have("a")
        await at.run.have("b")
        await at.run.load("a")
        slow = at.run.workers.load_gate("b")
        slow.close()
        stream = Stream(at)
        await stream.send(request("b", id="0"), *(request("a", id=str(i)) for i in range(1, 20)))
        await wait_until_async(
            lambda: [verb for verb, *_ in at.run.workers.log].count("infer") == 19
        )
        slow.open()
        for number in range(20):
            answer = await stream.next()
            assert not answer.error_message
            assert answer.infer_response.id == str(number)
            assert answer.infer_response.raw_output_contents == [b"\1\2\3\4"]
            assert answer.infer_response.parameters["triton_final_response"].bool_param
        await stream.call.done_writing()
        assert await stream.ended()


async def test_a_bad_request_is_answered_in_band_and_the_stream_goes_on(world: World) -> None:
    """Errors carry the request's id where it could be read, and concern that request alone."""
    async with oip_scene(world) as at:
        await at.run.have("a")
        await at.run.have("worse")
        at.run.workers.infer_errors["worse"] = ModelhostError(Reason.INVALID_ARGUMENT, "bad shape")
        stream = Stream(at)
        await stream.send(
            request("nobody", id="1"),
            request("a", id="2"),
            request("worse", id="3"),
            request(id="4"),
        )
        first, second, third, fourth = [await stream.next() for _ in range(4)]
        assert "Request for unknown model: 'nobody' is not found" in first.error_message
        assert (third.error_message, third.infer_response.id) == ("bad shape", "3")
        assert first.infer_response.id == "1"
        assert [second.infer_response.id, fourth.infer_response.id] == ["2", "4"]
        assert not second.error_message
        assert not fourth.error_message


async def test_bytes_that_are_no_request_are_answered_in_band(world: World) -> None:
    """A message that cannot be read gets its error, and the next message its answer."""
    async with oip_scene(world) as at:
        await at.run.have("a")
        call = at.channel.stream_stream(PATH)()
        await call.write(b"\xff\xff")
        await call.write(b"\x3a\0" * 5000)
        await call.write(request(id="ok").SerializeToString())
        answers = [oip.ModelStreamInferResponse.FromString(await call.read()) for _ in range(3)]
        assert "not a ModelInferRequest" in answers[0].error_message
        assert "1024" in answers[1].error_message
        assert answers[2].infer_response.id == "ok"


async def test_a_client_may_ask_for_errors_as_status(world: World) -> None:
    """With the header the first error ends the stream with its status and details."""
    async with oip_scene(world) as at:
        await at.run.have("a")
        stream = Stream(at, ("triton_grpc_error", "true"))
        await stream.send(request(id="1"), request("nobody"))
        assert (await stream.next()).infer_response.id == "1"
        error = await stream.fail()
        assert error.code() is grpc.StatusCode.NOT_FOUND
        assert info_of(error).reason == "MODEL_NOT_FOUND"


async def test_half_close_finishes_what_is_outstanding(world: World) -> None:
    """When the client has sent its last request, every answer still comes, then the stream ends well."""
    async with oip_scene(world) as at:
        await at.run.have("a")
        await at.run.load("a")
        gate = at.run.workers.infer_gate("a")
        gate.close()
        stream = Stream(at)
        await stream.send(*(request(id=str(i)) for i in range(10)))
        await stream.call.done_writing()
        await gate.reached(10)
        gate.open()
        assert [(await stream.next()).infer_response.id for _ in range(10)] == [
            str(i) for i in range(10)
        ]
        assert await stream.ended()
        assert await stream.call.code() is grpc.StatusCode.OK


async def test_an_empty_stream_ends_well(world: World) -> None:
    """A stream without a request ends with OK at once."""
    async with oip_scene(world) as at:
        stream = Stream(at)
        await stream.call.done_writing()
        assert await stream.ended()


async def test_what_is_at_work_is_bounded(world: World) -> None:
    """Of a client that sends without end, only so many requests are read before the first is answered."""
    async with oip_scene(world) as at:
        await at.run.have("a")
        await at.run.load("a")
        gate = at.run.workers.infer_gate("a")
        gate.close()
        stream = Stream(at)
        count = oip_stream.OUTSTANDING_MAX + 20
        await stream.send(*(request(id=str(i)) for i in range(count)))
        await gate.reached(oip_stream.OUTSTANDING_MAX)
        assert at.run.workers.in_flight() <= oip_stream.OUTSTANDING_MAX + 1
        gate.open()
        ids = [(await stream.next()).infer_response.id for _ in range(count)]
        assert ids == [str(i) for i in range(count)]
        assert at.service.budget.used == 0


async def test_a_cancelled_stream_gives_up_its_requests(world: World) -> None:
    """When the client goes away nothing of the stream stays in worker, budget or tasks."""
    async with oip_scene(world) as at:
        await at.run.have("a")
        await at.run.load("a")
        before = len(asyncio.all_tasks())
        gate = at.run.workers.infer_gate("a")
        gate.close()
        stream = Stream(at)
        await stream.send(*(request() for _ in range(8)))
        await gate.reached(8)
        stream.call.cancel()
        await wait_until_async(lambda: at.run.workers.in_flight() == 0)
        assert await at.serving.calls.wait_idle(DEADLINE_S)
        await wait_until_async(lambda: len(asyncio.all_tasks()) <= before + 1)
        assert at.service.budget.used == 0


async def test_a_lost_worker_costs_its_requests_not_the_stream(world: World) -> None:
    """Requests in a worker that dies fail in band; the next one is answered by its replacement."""
    async with oip_scene(world) as at:
        await at.run.have("a")
        await at.run.load("a")
        gate = at.run.workers.infer_gate("a")
        gate.close()
        stream = Stream(at)
        await stream.send(request(id="1"), request(id="2"))
        await gate.reached(2)
        at.run.workers.crash("sim-0")
        gate.open()
        for number in ("1", "2"):
            answer = await stream.next()
            assert answer.infer_response.id == number
            assert "signal SIGKILL" in answer.error_message
        await stream.send(request(id="3"))
        assert not (await stream.next()).error_message


async def test_draining_answers_what_was_read_and_ends_the_stream(world: World) -> None:
    """When the daemon stops, requests at work are answered, then the stream ends with SHUTTING_DOWN."""
    async with oip_scene(world) as at:
        await at.run.have("a")
        await at.run.load("a")
        gate = at.run.workers.infer_gate("a")
        gate.close()
        stream = Stream(at)
        await stream.send(request(id="1"))
        await gate.reached(1)
        at.serving.calls.draining.set()
        gate.open()
        assert (await stream.next()).infer_response.id == "1"
        error = await stream.fail()
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert info_of(error).reason == "SHUTTING_DOWN"


async def test_large_requests_of_one_stream_wait_for_each_other(world: World) -> None:
    """A stream of requests that together are above the budget is slowed down, not refused."""
    mib = 1024 * 1024
    options = InferenceOptions(message_bytes_max=32 * mib, in_flight_bytes_max=128 * mib)
    async with oip_scene(world, options=options) as at:
        await at.run.have("a")
        stream = Stream(at)
        large = oip.ModelInferRequest(model_name="a", raw_input_contents=[b"\0" * 20 * mib])
        sending = asyncio.ensure_future(stream.send(*[large] * 12))
        for _ in range(12):
            assert not (await stream.next()).error_message
        await sending
