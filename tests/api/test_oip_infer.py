"""ModelInfer over a real socket and fake workers: routing, limits, errors and what clients look for in them."""

import asyncio
from pathlib import Path

import grpc
import pytest

from modelhost.oip import open_inference_pb2 as oip
from modelhostd.api.inference import InferenceOptions
from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.ports import InferReply
from tests.api.oip_scene import OipScene, oip_scene, request
from tests.api.serving import info_of
from tests.host.support import World
from tests.support import DEADLINE_S, wait_until_async

MIB = 1024 * 1024


@pytest.fixture
async def world(tmp_path: Path) -> World:
    return World(tmp_path)


async def refused(at: OipScene, asked: oip.ModelInferRequest | bytes) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        if isinstance(asked, bytes):
            await at.infer_bytes(asked)
        else:
            await at.infer(asked)
    return caught.value


async def test_a_request_is_answered_by_its_model(world: World) -> None:
    """The answer names model, version and id, and carries the tensors raw."""
    async with oip_scene(world) as at:
        await at.run.have("a")
        await at.run.load("a")
        answer = await at.infer(request(id="17"))
        assert (answer.model_name, answer.model_version, answer.id) == ("a", "1", "17")
        assert answer.raw_output_contents == [b"\1\2\3\4"]


async def test_a_model_on_disk_is_loaded_by_its_first_request(world: World) -> None:
    """Requests for a model that is not loaded wait for it; the load happens once."""
    async with oip_scene(world) as at:
        await at.run.have("a")
        answers = await asyncio.gather(*(at.infer(request(id=str(i))) for i in range(10)))
        assert [a.id for a in answers] == [str(i) for i in range(10)]
        assert [verb for verb, *_ in at.run.workers.log].count("load") == 1


async def test_any_known_version_is_taken_and_no_other(world: World) -> None:
    """An empty version and the loaded one are served; another is not found, in the words clients know."""
    async with oip_scene(world) as at:
        await at.run.have("a")
        assert (await at.infer(request(model_version="1"))).model_version == "1"
        error = await refused(at, request(model_version="7"))
        assert error.code() is grpc.StatusCode.NOT_FOUND
        words = "Request for unknown model: 'a' version 7 is not found; version 1 is served"
        assert words in (error.details() or "")
        for version, shown in (("1.0", "1.0"), ("1\n", r"1\n"), ("9" * 500, "9" * 64)):
            error = await refused(at, request(model_version=version))
            assert f"'a' version {shown} is not found" in (error.details() or "")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await at.stub.ModelStatistics(oip.ModelStatisticsRequest(name="a", version="7"))
        assert words in (caught.value.details() or "")


@pytest.mark.parametrize(
    "name",
    [
        *(
            "",
            "b",
            "../x",
            "A",
            "a\0b",
            "a" * 300,
            "org/name",
            "a\nb",
            "\N{CYRILLIC SMALL LETTER A}",
        ),
    ],
    ids=["empty", "unknown", "dots", "upper", "nul", "long", "slash", "newline", "look-alike"],
)
async def test_a_name_that_is_no_model_is_not_found(world: World, name: str) -> None:
    """Whatever the name, the answer is NOT_FOUND in the words clients know, on one line, with details."""
    async with oip_scene(world) as at:
        await at.run.have("a")
        error = await refused(at, request(name))
        assert error.code() is grpc.StatusCode.NOT_FOUND
        text = error.details() or ""
        assert text.startswith("Request for unknown model: '")
        assert "is not found" in text
        assert "\n" not in text
        assert "\0" not in text
        assert info_of(error).reason == "MODEL_NOT_FOUND"


async def test_a_model_that_is_not_on_disk_is_never_downloaded_by_a_request(world: World) -> None:
    """Inference does not download: FAILED_PRECONDITION says what to do."""
    async with oip_scene(world) as at:
        await at.run.add("a")
        error = await refused(at, request())
        assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert info_of(error).reason == "MODEL_NOT_DOWNLOADED"
        assert not world.downloads.jobs


async def test_without_load_on_demand_a_request_does_not_load(world: World) -> None:
    """Where the model says so, a request for it while it is not loaded is refused."""
    async with oip_scene(world) as at:
        await at.run.have("a", load_on_demand=False)
        error = await refused(at, request())
        assert "'a' has no available versions" in (error.details() or "")
        assert info_of(error).reason == "MODEL_NOT_LOADED"


@pytest.mark.parametrize(
    "payload",
    [
        pytest.param(b"\x0a\x01a" + b"\x3a\0" * 2_000_000, id="two-million-empty-fields"),
        pytest.param(b"\x0a\x01a\x22\x84\x80\x80\x02" + b"\x0a\0" * 2_097_154, id="in-a-parameter"),
        pytest.param(b"\x0a\x05a", id="truncated"),
        pytest.param(b"\x0b" * 10_000, id="nested-groups"),
        pytest.param(b"\xff" * 10_000, id="garbage"),
    ],
)
async def test_hostile_bytes_never_reach_a_worker(world: World, payload: bytes) -> None:
    """What is no request is INVALID_ARGUMENT before anything is routed, and the next one is served."""
    async with oip_scene(world) as at:
        await at.run.have("a")
        error = await refused(at, payload)
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert info_of(error).metadata["field"] == "request"
        assert not at.run.workers.log
        assert (await at.infer(request())).model_name == "a"


async def test_of_two_names_the_last_is_routed_to(world: World) -> None:
    """A request that names two models goes to the one that every parser of it reads."""
    async with oip_scene(world) as at:
        await at.run.have("a")
        await at.run.have("b")
        double = b"\x0a\x01a" + request("b").SerializeToString()
        answer = oip.ModelInferResponse.FromString(await at.infer_bytes(double))
        assert answer.model_name == "b"
        assert {model for verb, _, model, _ in at.run.workers.log if verb == "infer"} == {"b"}


async def test_bytes_in_flight_are_bounded(world: World) -> None:
    """Above the budget of bytes a request is QUEUE_FULL with a delay; an answer makes room again."""
    options = InferenceOptions(message_bytes_max=MIB, in_flight_bytes_max=2 * MIB)
    async with oip_scene(world, options=options) as at:
        await at.run.have("a")
        await at.run.load("a")
        large = oip.ModelInferRequest(model_name="a", raw_input_contents=[b"\0" * 900_000])
        gate = at.run.workers.infer_gate("a")
        gate.close()
        held = [asyncio.ensure_future(at.infer(large)) for _ in range(2)]
        await gate.reached(2)
        error = await refused(at, large)
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert info_of(error).reason == "QUEUE_FULL"
        small = asyncio.ensure_future(at.infer(request()))
        await gate.reached(3)
        gate.open()
        await asyncio.gather(small, *held)
        assert at.service.budget.used == 0
        assert (await at.infer(large)).model_name == "a"


async def test_a_message_above_the_limit_is_refused_with_the_limit(world: World) -> None:
    """One request has a largest size, told in the error."""
    options = InferenceOptions(message_bytes_max=MIB)
    async with oip_scene(world, options=options) as at:
        await at.run.have("a")
        error = await refused(at, b"\x0a\x01a\x3a" + b"\x80\x80\x80\x01" + b"\0" * 2 * MIB)
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        info = info_of(error)
        assert info.reason == "MESSAGE_TOO_LARGE"
        assert info.metadata["limitBytes"] == str(MIB)


async def test_deadline_and_timeout_reach_the_worker(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker is told the lesser of the call's deadline and the request's own timeout, and its priority."""
    async with oip_scene(world) as at:
        await at.run.have("a")
        await at.run.load("a")
        told: list[tuple[float | None, int]] = []
        send = at.run.workers.infer

        def infer(
            *args: object, timeout_s: float | None, priority: int, **rest: object
        ) -> "asyncio.Future[InferReply]":
            told.append((timeout_s, priority))
            return send(*args, timeout_s=timeout_s, priority=priority, **rest)  # type: ignore[arg-type, return-value]

        monkeypatch.setattr(at.run.workers, "infer", infer)
        await at.infer(request())
        await at.infer(request(), timeout=100.0)
        urgent = request()
        urgent.parameters["timeout"].int64_param = 500_000
        urgent.parameters["priority"].uint64_param = 1
        await at.infer(urgent, timeout=100.0)
        await at.infer(urgent)
        patient = request()
        patient.parameters["priority"].uint64_param = 2**63
        await at.infer(patient)
        assert told[0] == (None, 0)
        assert told[1][0] is not None
        # gRPC rounds deadlines up on their way.
        assert 0 < told[1][0] <= 110.0
        assert told[2] == told[3] == (0.5, 99)
        assert told[4][1] < 0


async def test_a_cancelled_call_frees_its_place(world: World) -> None:
    """When the client goes away the request leaves the worker, the route and the budget."""
    async with oip_scene(world) as at:
        await at.run.have("a")
        await at.run.load("a")
        gate = at.run.workers.infer_gate("a")
        gate.close()
        call = at.stub.ModelInfer(request())
        await gate.reached(1)
        call.cancel()
        await wait_until_async(lambda: at.run.workers.in_flight() == 0)
        await wait_until_async(lambda: at.service.budget.used == 0)
        route = at.run.host.routes.get("a")
        assert route is not None
        assert route.in_flight == 0
        assert await at.serving.calls.wait_idle(DEADLINE_S)


async def test_a_deadline_in_the_queue_of_a_load_ends_the_request_alone(world: World) -> None:
    """A request whose deadline passes while its model loads gets DEADLINE_EXCEEDED; the load goes on."""
    async with oip_scene(world) as at:
        await at.run.have("a")
        gate = at.run.workers.load_gate("a")
        gate.close()
        hasty = request()
        hasty.parameters["timeout"].int64_param = 50_000
        error = await refused(at, hasty)
        assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert info_of(error).reason == "DEADLINE_EXCEEDED"
        gate.open()
        assert (await at.infer(request())).model_name == "a"
        assert [verb for verb, *_ in at.run.workers.log].count("load") == 1


async def test_a_lost_worker_is_told_with_a_delay_and_the_model_comes_back(world: World) -> None:
    """What was in flight gets UNAVAILABLE with RetryInfo; the next request is served by the replacement."""
    async with oip_scene(world) as at:
        await at.run.have("a")
        await at.run.load("a")
        gate = at.run.workers.infer_gate("a")
        gate.close()
        call = asyncio.ensure_future(at.infer(request()))
        await gate.reached(1)
        at.run.workers.crash("sim-0")
        gate.open()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert info_of(caught.value).reason == "WORKER_LOST"
        assert (await at.infer(request())).model_name == "a"


async def test_a_worker_s_error_comes_with_its_details(world: World) -> None:
    """An error that the worker raises reaches the client as it is."""
    async with oip_scene(world) as at:
        await at.run.have("a")
        at.run.workers.infer_errors["a"] = ModelhostError(
            Reason.INVALID_ARGUMENT, "bad shape", {"field": "inputs[INPUT0].shape"}
        )
        error = await refused(at, request())
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert error.details() == "bad shape"
        assert info_of(error).metadata["field"] == "inputs[INPUT0].shape"
