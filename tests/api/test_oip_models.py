"""What the protocol says of models, over a real socket: readiness, metadata, statistics, the repository."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import grpc
import pytest

from modelhost.oip import open_inference_pb2 as oip
from modelhostd.api.inference import InferenceOptions
from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.resources import OperationState
from modelhostd.ports import TensorSpec
from tests.api.oip_scene import OipScene, oip_scene, request
from tests.api.serving import info_of
from tests.fakes.devices import cuda
from tests.host import support as host_support
from tests.host.support import World
from tests.support import DEADLINE_S


@pytest.fixture
async def world(tmp_path: Path) -> World:
    return World(tmp_path)


async def refused(call: Awaitable[object]) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


async def ready(at: OipScene, name: str, version: str = "") -> bool:
    answer = await at.stub.ModelReady(oip.ModelReadyRequest(name=name, version=version))
    return bool(answer.ready)


async def index(at: OipScene, *, ready_only: bool = False) -> dict[str, tuple[str, str, str]]:
    answer = await at.stub.RepositoryIndex(oip.RepositoryIndexRequest(ready=ready_only))
    return {m.name: (m.version, m.state, m.reason) for m in answer.models}


async def statistics(at: OipScene, name: str = "", version: str = "") -> list[oip.ModelStatistics]:
    asked = oip.ModelStatisticsRequest(name=name, version=version)
    return list((await at.stub.ModelStatistics(asked)).model_stats)


# --- the server -----------------------------------------------------------------------------------


async def test_the_server_is_live_and_ready_while_it_serves(world: World) -> None:
    """Live and ready; ready no more once the host stops, still live."""
    async with oip_scene(world) as at:
        assert (await at.stub.ServerLive(oip.ServerLiveRequest())).live
        assert (await at.stub.ServerReady(oip.ServerReadyRequest())).ready
        at.run.host.inference.stop()
        assert not (await at.stub.ServerReady(oip.ServerReadyRequest())).ready
        assert (await at.stub.ServerLive(oip.ServerLiveRequest())).live


async def test_the_server_names_itself_as_configured(world: World) -> None:
    """Name and version are the operator's, and no extension is claimed that is not there."""
    options = InferenceOptions(server_name="triton", server_version="9.8")
    async with oip_scene(world, options=options) as at:
        answer = await at.stub.ServerMetadata(oip.ServerMetadataRequest())
        assert (answer.name, answer.version) == ("triton", "9.8")
        assert {"statistics", "model_configuration", "model_repository"} <= set(answer.extensions)
        for missing in (
            "system_shared_memory",
            "cuda_shared_memory",
            "trace",
            "logging",
            "sequence",
        ):
            assert missing not in answer.extensions


# --- readiness ------------------------------------------------------------------------------------


async def test_ready_answers_whether_a_request_would_be_served(world: World) -> None:
    """False while not on disk, true from then on, loaded or not; false again where it may not load."""
    async with oip_scene(world) as at:
        await at.run.add("a")
        assert not await ready(at, "a")
        await at.run.end(await at.run.host.transfers.download("a"))
        assert await ready(at, "a")
        assert await ready(at, "a", "1")
        assert not await ready(at, "a", "2")
        await at.run.load("a")
        assert await ready(at, "a")
        await at.run.have("b", load_on_demand=False)
        assert not await ready(at, "b")
        await at.run.load("b")
        assert await ready(at, "b")
        error = await refused(ready(at, "nobody"))
        assert error.code() is grpc.StatusCode.NOT_FOUND


# --- metadata and configuration -------------------------------------------------------------------


async def test_metadata_says_what_to_send(world: World) -> None:
    """Inputs and outputs with their types and shapes, under the name that requests take."""
    async with oip_scene(world) as at:
        await at.run.have("a")
        at.run.workers.inputs["a"] = (TensorSpec("text", "BYTES", (-1,)),)
        at.run.workers.outputs["a"] = (TensorSpec("embedding", "FP32", (-1, 384)),)
        answer = await at.stub.ModelMetadata(oip.ModelMetadataRequest(name="a"))
        assert (answer.name, list(answer.versions), answer.platform) == ("a", ["1"], "fake")
        (given,), (got,) = answer.inputs, answer.outputs
        assert (given.name, given.datatype, list(given.shape)) == ("text", "BYTES", [-1])
        assert (got.name, got.datatype, list(got.shape)) == ("embedding", "FP32", [-1, 384])
        assert answer.name in at.run.workers.resident


@pytest.mark.parametrize("batch", [0, 8])
async def test_configuration_and_metadata_agree(world: World, batch: int) -> None:
    """With a batch, dimensions leave it out; without, they are the shape. Names are the same in both."""
    async with oip_scene(world) as at:
        await at.run.have("a", max_batch_size=batch or None)
        at.run.workers.inputs["a"] = (TensorSpec("text", "BYTES", (-1, 1)),)
        at.run.workers.outputs["a"] = (TensorSpec("embedding", "FP32", (-1, 384)),)
        metadata = await at.stub.ModelMetadata(oip.ModelMetadataRequest(name="a"))
        config = (await at.stub.ModelConfig(oip.ModelConfigRequest(name="a", version="1"))).config
        assert (config.name, config.max_batch_size, config.backend) == ("a", batch, "identity")
        pairs = [
            *zip(metadata.inputs, config.input, strict=True),
            *zip(metadata.outputs, config.output, strict=True),
        ]
        assert len(pairs) == 2
        for told, configured in pairs:
            assert told.name == configured.name
            skipped = 1 if batch else 0
            assert list(told.shape)[skipped:] == list(configured.dims)
        assert [i.data_type for i in config.input] == [13]
        for absent in ("model_transaction_policy", "dynamic_batching", "sequence_batching"):
            assert not config.HasField(absent)


@pytest.mark.parametrize("method", ["ModelMetadata", "ModelConfig"])
async def test_what_is_not_known_is_refused_as_a_request_would_be(
    world: World, method: str
) -> None:
    """Unknown name, unknown version, not on disk, not to be loaded: the errors of a request."""
    async with oip_scene(world) as at:
        asked = getattr(oip, f"{method}Request")
        call: Callable[[object], Awaitable[object]] = getattr(at.stub, method)
        await at.run.have("a")
        await at.run.add("b")
        await at.run.have("c", load_on_demand=False)
        wanted = [
            (asked(name="nobody"), "MODEL_NOT_FOUND", "is not found"),
            (asked(name="org/name"), "MODEL_NOT_FOUND", "unknown model: 'org/name' is not found"),
            (asked(name="a\nb"), "MODEL_NOT_FOUND", "unknown model: 'a\\nb' is not found"),
            (asked(name="a", version="7"), "MODEL_NOT_FOUND", "'a' version 7 is not found"),
            (asked(name="b"), "MODEL_NOT_DOWNLOADED", "b"),
            (asked(name="c"), "MODEL_NOT_LOADED", "has no available versions"),
        ]
        for message, reason, text in wanted:
            error = await refused(call(message))
            assert info_of(error).reason == reason
            assert text in (error.details() or "")


# --- statistics -----------------------------------------------------------------------------------


async def test_statistics_rise_with_traffic_and_never_fall(world: World) -> None:
    """Counts go up by what was done, errors apart; an unload and a load again take nothing back."""
    async with oip_scene(world) as at:
        await at.run.have("a")
        await at.run.load("a")
        (before,) = await statistics(at, "a", "1")
        assert (before.name, before.version, before.inference_count) == ("a", "1", 0)
        assert before.memory_usage[0].byte_size == 400
        assert before.memory_usage[0].type == "CPU"
        await asyncio.gather(*(at.infer(request()) for _ in range(5)))
        at.run.workers.infer_errors["a"] = ModelhostError(Reason.INVALID_ARGUMENT, "bad")
        await refused(at.infer(request()))
        del at.run.workers.infer_errors["a"]
        (after,) = await statistics(at, "a")
        assert (after.inference_count, after.execution_count) == (5, 5)
        assert after.inference_stats.success.count == after.inference_stats.queue.count == 5
        assert after.inference_stats.fail.count == 1
        assert after.last_inference > 0
        await at.run.end(await at.run.host.residency.unload("a"))
        (unloaded,) = await statistics(at, "a")
        assert not unloaded.memory_usage
        await at.infer(request())
        (again,) = await statistics(at, "a")
        assert again.inference_count == 6


async def test_memory_is_told_for_each_place_that_it_is_in(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a model on a GPU its number and bytes there, and the copy in host memory; of a warm one the copy."""
    monkeypatch.setattr(host_support, "sim", lambda index, _: cuda(index + 1))
    async with oip_scene(world, host_budget=4000) as at:
        await at.run.have("a")
        await at.run.load("a")
        (loaded,) = await statistics(at, "a")
        found = [(m.type, m.id, m.byte_size) for m in loaded.memory_usage]
        assert found == [("GPU", 1, 400), ("CPU", 0, 400)]
        await at.run.end(await at.run.host.residency.unload("a", keep_warm=True))
        (warm,) = await statistics(at, "a")
        assert [(m.type, m.id, m.byte_size) for m in warm.memory_usage] == [("CPU", 0, 400)]


async def test_statistics_of_all_models_and_of_none(world: World) -> None:
    """An empty name is everybody; unknown names and versions are NOT_FOUND; a deleted model is forgotten."""
    async with oip_scene(world) as at:
        await at.run.have("a")
        await at.run.have("b")
        await at.run.add("c")
        await at.infer(request("b"))
        found = await statistics(at)
        assert [(s.name, s.version, s.inference_count) for s in found] == [
            ("a", "1", 0),
            ("b", "1", 1),
        ]
        for name, version in (("nobody", ""), ("a", "7"), ("c", "")):
            error = await refused(statistics(at, name, version))
            assert error.code() is grpc.StatusCode.NOT_FOUND
            assert "Request for unknown model" in (error.details() or "")
        await at.run.end(await at.run.host.models.delete("b", force=True))
        assert [s.name for s in await statistics(at)] == ["a"]
        assert not at.run.host.inference.figures


# --- the repository -------------------------------------------------------------------------------


async def test_the_index_tells_each_model_s_state(world: World) -> None:
    """Every registered model with its state, and why it is not available."""
    async with oip_scene(world) as at:
        await at.run.add("absent")
        await at.run.have("unloaded")
        await at.run.have("ready")
        await at.run.load("ready")
        await at.run.have("broken")
        at.run.workers.load_errors["broken"] = ModelhostError(
            Reason.LOAD_FAILED, "config.json has no model_type", {"model": "broken"}
        )
        await at.run.failed(await at.run.host.residency.load("broken"))
        assert await index(at) == {
            "absent": ("", "UNAVAILABLE", "not downloaded (its files are ABSENT)"),
            "broken": ("", "UNAVAILABLE", "config.json has no model_type"),
            "ready": ("1", "READY", ""),
            "unloaded": ("", "UNAVAILABLE", "unloaded"),
        }
        assert set(await index(at, ready_only=True)) == {"ready"}


async def test_the_index_follows_a_load_and_an_unload(world: World) -> None:
    """LOADING while it loads, UNLOADING while it drains."""
    async with oip_scene(world) as at:
        await at.run.have("a")
        load_gate = at.run.workers.load_gate("a")
        load_gate.close()
        operation = await at.run.host.residency.load("a")
        await load_gate.reached(1)
        await at.run.host.registry.flush()
        assert (await index(at))["a"][1] == "LOADING"
        load_gate.open()
        await at.run.end(operation)
        unload_gate = at.run.workers.unload_gate("a")
        unload_gate.close()
        operation = await at.run.host.residency.unload("a")
        await unload_gate.reached(1)
        await at.run.host.registry.flush()
        assert (await index(at))["a"][1] == "UNLOADING"
        unload_gate.open()
        await at.run.end(operation)


async def test_load_answers_when_loaded_and_unload_when_its_memory_is_free(world: World) -> None:
    """The answer comes after the fact: the model is in memory, respectively nothing of it is."""
    async with oip_scene(world) as at:
        await at.run.have("a")
        gate = at.run.workers.load_gate("a")
        gate.close()
        asked = oip.RepositoryModelLoadRequest(model_name="a")
        loading = asyncio.ensure_future(at.stub.RepositoryModelLoad(asked))
        await gate.reached(1)
        assert not loading.done()
        gate.open()
        await loading
        assert (await index(at))["a"] == ("1", "READY", "")
        await at.stub.RepositoryModelLoad(asked)
        gate = at.run.workers.unload_gate("a")
        gate.close()
        drop = oip.RepositoryModelUnloadRequest(model_name="a")
        drop.parameters["unload_dependents"].bool_param = False
        unloading = asyncio.ensure_future(at.stub.RepositoryModelUnload(drop))
        await gate.reached(1)
        assert not unloading.done()
        gate.open()
        await unloading
        assert at.run.workers.device_bytes("sim-0") == 0
        await at.stub.RepositoryModelUnload(drop)


async def test_a_load_that_fails_says_so_in_known_words(world: World) -> None:
    """Unknown, not on disk, broken and too large: each with its code and the words clients look for."""
    async with oip_scene(world) as at:
        await at.run.add("absent")
        await at.run.have("large", 5000)
        await at.run.have("broken")
        at.run.workers.load_errors["broken"] = ModelhostError(
            Reason.LOAD_FAILED, "no weights", {"model": "broken", "backend": "identity"}
        )
        wanted = [
            ("nobody", grpc.StatusCode.NOT_FOUND, "failed to load 'nobody', failed to poll from"),
            ("absent", grpc.StatusCode.FAILED_PRECONDITION, "load failed for model 'absent'"),
            (
                "broken",
                grpc.StatusCode.FAILED_PRECONDITION,
                "load failed for model 'broken': no we",
            ),
            ("large", grpc.StatusCode.RESOURCE_EXHAUSTED, "load failed for model 'large'"),
        ]
        for name, code, text in wanted:
            asked = oip.RepositoryModelLoadRequest(model_name=name)
            error = await refused(at.stub.RepositoryModelLoad(asked))
            assert error.code() is code
            assert text in (error.details() or "")
            assert info_of(error).domain == "modelhost"


@pytest.mark.parametrize(
    ("key", "code"),
    [
        ("file:../../etc/passwd", grpc.StatusCode.PERMISSION_DENIED),
        ("file:config.json", grpc.StatusCode.PERMISSION_DENIED),
        ("other", grpc.StatusCode.INVALID_ARGUMENT),
    ],
)
async def test_load_parameters_are_refused_before_anything_happens(
    world: World, key: str, code: grpc.StatusCode
) -> None:
    """Files of a caller never, other parameters not silently."""
    async with oip_scene(world) as at:
        await at.run.have("a")
        asked = oip.RepositoryModelLoadRequest(model_name="a")
        asked.parameters["config"].string_param = '{"priority": 1}'  # as clients send it with files
        asked.parameters[key].bytes_param = b"{}"
        error = await refused(at.stub.RepositoryModelLoad(asked))
        assert error.code() is code
        assert not at.run.workers.log


async def test_a_file_that_is_too_large_is_refused_as_a_file(world: World) -> None:
    """What is above the limit of a message is not looked into: the refusal says that files are not taken."""
    async with oip_scene(world) as at:
        await at.run.have("a")
        asked = oip.RepositoryModelLoadRequest(model_name="a")
        asked.parameters["file:1/model.py"].bytes_param = bytes(2**20)
        error = await refused(at.stub.RepositoryModelLoad(asked))
        assert info_of(error).reason == "MESSAGE_TOO_LARGE"
        assert "register the model by its source" in (error.details() or "")


async def test_a_client_that_goes_away_does_not_stop_its_load(world: World) -> None:
    """A load belongs to the daemon: cancelling the call leaves it running to its end."""
    async with oip_scene(world) as at:
        await at.run.have("a")
        gate = at.run.workers.load_gate("a")
        gate.close()
        call = at.stub.RepositoryModelLoad(oip.RepositoryModelLoadRequest(model_name="a"))
        await gate.reached(1)
        call.cancel()
        assert await at.serving.calls.wait_idle(DEADLINE_S)
        gate.open()
        (operation,) = [o for o in at.run.host.operations.list() if o.kind.value == "LOAD"]
        done = await at.run.host.operations.wait(operation.id, DEADLINE_S)
        assert done.state is OperationState.SUCCEEDED


async def test_a_repository_by_name_is_refused(world: World) -> None:
    """There is one repository; another name is a mistake worth telling."""
    async with oip_scene(world) as at:
        for call, asked in (
            (at.stub.RepositoryIndex, oip.RepositoryIndexRequest(repository_name="x")),
            (at.stub.RepositoryModelLoad, oip.RepositoryModelLoadRequest(repository_name="x")),
            (at.stub.RepositoryModelUnload, oip.RepositoryModelUnloadRequest(repository_name="x")),
        ):
            error = await refused(call(asked))
            assert info_of(error).metadata["field"] == "repository_name"
