"""An existing client, tritonclient, unchanged, against the daemon's services and a real worker process."""

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from tritonclient.utils import InferenceServerException

from modelhostd.adapters.workers import ProcessWorkers, WorkersConfig
from tests.api.oip_scene import OipScene, oip_scene
from tests.host.support import World

ROOT = Path(__file__).resolve().parents[2]
Array = npt.NDArray[Any]

TENSORS: dict[str, Array] = {
    "BOOL": np.array([[True, False, True]]),
    "INT8": np.array([[-128, 127]], np.int8),
    "INT16": np.array([[-(2**15), 2**15 - 1]], np.int16),
    "INT32": np.array([[-(2**31), 2**31 - 1]], np.int32),
    "INT64": np.array([[1, -(2**63)]], np.int64),
    "UINT8": np.array([[0, 255]], np.uint8),
    "UINT16": np.array([[0, 65535]], np.uint16),
    "UINT32": np.array([[0, 2**32 - 1]], np.uint32),
    "UINT64": np.array([[0, 2**64 - 1]], np.uint64),
    "FP16": np.array([[0.5, -2.0]], np.float16),
    "FP32": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
    "FP64": np.array([[np.pi]]),
    "BYTES": np.array([[b"one", b"", "zw\xf6lf".encode()]], np.object_),
}


@pytest.fixture
async def at(tmp_path: Path) -> AsyncIterator[OipScene]:
    workers = ProcessWorkers(WorkersConfig(backends=("identity",), arena_bytes=2**20))
    async with oip_scene(World(tmp_path), real_workers=workers) as scene:
        await scene.run.have("a", backend="identity")
        yield scene


def inputs(tensors: dict[str, Array], module: Any) -> list[Any]:
    made = []
    for name, array in tensors.items():
        tensor = module.InferInput(name, list(array.shape), name)
        tensor.set_data_from_numpy(array)
        made.append(tensor)
    return made


def same(got: Array | None, sent: Array) -> bool:
    return got is not None and got.dtype == sent.dtype and np.array_equal(got, sent)


def sync_client_does_everything(target: str) -> None:
    """Run in a thread: what a program with the synchronous client does from start to end."""
    with triton.InferenceServerClient(target) as client:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.get_server_metadata().name == "modelhost"
        client.unregister_system_shared_memory()
        client.unregister_cuda_shared_memory()
        assert [m.name for m in client.get_model_repository_index().models] == ["a"]
        client.load_model("a")
        assert client.is_model_ready("a")
        assert client.is_model_ready("a", "1")
        metadata = client.get_model_metadata("a", as_json=True)
        assert (metadata["name"], metadata["versions"]) == ("a", ["1"])
        assert client.get_model_config("a").config.backend == "identity"
        answer = client.infer("a", inputs(TENSORS, triton), request_id="x", timeout=5_000_000)
        assert answer.get_response().id == "x"
        for name, array in TENSORS.items():
            assert same(answer.as_numpy(name), array), name
        some = client.infer(
            "a",
            inputs(TENSORS, triton),
            outputs=[triton.InferRequestedOutput("FP32")],
            compression_algorithm="gzip",
            client_timeout=30.0,
            headers={"x-anything": "goes"},
        )
        assert same(some.as_numpy("FP32"), TENSORS["FP32"])
        assert some.as_numpy("INT8") is None
        (statistics,) = client.get_inference_statistics("a").model_stats
        assert statistics.inference_stats.success.count == 2
        assert statistics.inference_stats.queue.count == 2
        with pytest.raises(InferenceServerException) as unknown:
            client.infer("nobody", inputs(TENSORS, triton))
        assert unknown.value.status() == "StatusCode.NOT_FOUND"
        assert "Request for unknown model: 'nobody' is not found" in unknown.value.message()
        client.unload_model("a")
        assert client.get_model_repository_index().models[0].state == "UNAVAILABLE"


def sync_client_looks_around(target: str) -> None:
    """Run in a thread: what is there of settings and shared memory, and what may not be changed of it."""
    region = "Unable to find {} shared memory region: 'r'"
    with triton.InferenceServerClient(target) as client:
        assert client.get_trace_settings("a").settings["trace_level"].value == ["OFF"]
        assert client.get_log_settings().settings["log_info"].bool_param
        assert not client.get_system_shared_memory_status().regions
        assert not client.get_cuda_shared_memory_status().regions
        client.unregister_system_shared_memory("r")
        client.unregister_cuda_shared_memory("r")
        for asked, code, words in (
            (lambda: client.get_system_shared_memory_status("r"), "NOT_FOUND", region.format("system")),
            (lambda: client.get_cuda_shared_memory_status("r"), "NOT_FOUND", region.format("cuda")),
            (lambda: client.register_system_shared_memory("r", "/r", 8), "UNIMPLEMENTED", "raw"),
            (lambda: client.register_cuda_shared_memory("r", b"AAAA", 0, 8), "UNIMPLEMENTED", "raw"),
            (lambda: client.update_trace_settings("a", {"trace_rate": "1"}), "UNIMPLEMENTED", "trace"),
            (lambda: client.update_log_settings({"log_file": "/x"}), "UNIMPLEMENTED", "log_level"),
            (lambda: client.load_model("a", config="{}", files={"file:x": b"x"}), "PERMISSION_DENIED",
             "register the model by its source"),
            (lambda: client.load_model("a", config='{"x": 1}'), "INVALID_ARGUMENT", "failed"),
            (lambda: client.load_model("b"), "NOT_FOUND", "failed to load 'b'"),
            (lambda: client.get_model_metadata("b"), "NOT_FOUND", "'b' is not found"),
            (lambda: client.get_inference_statistics("b"), "NOT_FOUND", "'b' is not found"),
            (lambda: client.is_model_ready("b"), "NOT_FOUND", "'b' is not found"),
        ):  # fmt: skip
            with pytest.raises(InferenceServerException) as refused:
                asked()
            assert refused.value.status() == f"StatusCode.{code}"
            assert words in refused.value.message()


def sync_client_configures(target: str) -> None:
    """Run in a thread: a config is taken, changed and given back; a batch above its most is refused."""
    with triton.InferenceServerClient(target) as client:
        client.load_model("a")
        config = client.get_model_config("a", as_json=True)["config"]
        client.load_model("a", config=json.dumps({**config, "max_batch_size": 2}))
        assert client.get_model_config("a").config.max_batch_size == 2
        client.infer("a", inputs({"FP32": TENSORS["FP32"]}, triton))
        with pytest.raises(
            InferenceServerException, match="batch-size must be <= 2 for 'a', got 3"
        ):
            client.infer("a", inputs({"FP32": np.zeros((3, 1), np.float32)}, triton))


def sync_client_streams(target: str) -> list[tuple[str, str | None]]:
    """Run in a thread: a stream with a bad request in the middle; returns (id, error) of each answer."""
    got: list[tuple[str, str | None]] = []

    def take(result: triton.InferResult | None, error: InferenceServerException | None) -> None:
        if error is not None:
            got.append(("", error.message()))
        else:
            assert result is not None
            assert same(result.as_numpy("FP32"), TENSORS["FP32"])
            got.append((result.get_response().id, None))

    with triton.InferenceServerClient(target) as client:
        client.start_stream(take)
        for number, model in enumerate(("a", "nobody", "a")):
            client.async_stream_infer(
                model,
                inputs({"FP32": TENSORS["FP32"]}, triton),
                request_id=str(number),
                enable_empty_final_response=True,
            )
        # Joins its reader: returns only when the server ended the stream.
        client.stop_stream()
    return got


async def test_the_synchronous_client_works_unchanged(at: OipScene) -> None:
    """Every call of a program's life: ready, load, metadata, tensors of all types, statistics, unload."""
    await asyncio.to_thread(sync_client_does_everything, at.serving.target)


async def test_what_is_not_offered_is_told_in_known_words(at: OipScene) -> None:
    """Settings and shared memory can be looked at; changes are refused, and what is unknown is not found."""
    await asyncio.to_thread(sync_client_looks_around, at.serving.target)


async def test_a_config_comes_back_changed(at: OipScene) -> None:
    """load_model with the config that get_model_config gave, and another batch size in it."""
    await asyncio.to_thread(sync_client_configures, at.serving.target)


async def test_the_asyncio_client_has_the_other_calls_too(at: OipScene) -> None:
    """Each call that the first program of this client did not make."""
    async with triton_aio.InferenceServerClient(at.serving.target) as client:
        await client.load_model("a", config='{"priority": 1}')
        assert (await client.get_server_metadata()).version
        assert (await client.get_model_config("a")).config.name == "a"
        (entry,) = (await client.get_model_repository_index()).models
        assert (entry.name, entry.state) == ("a", "READY")
        one = inputs({"FP32": TENSORS["FP32"]}, triton)
        for algorithm in ("gzip", "deflate", None):
            answer = await client.infer("a", one, compression_algorithm=algorithm)
            assert same(answer.as_numpy("FP32"), TENSORS["FP32"])
        (statistics,) = (await client.get_inference_statistics("a")).model_stats
        assert statistics.inference_count == 3
        trace = await client.get_trace_settings()
        assert trace.settings["trace_level"].value == ["OFF"]
        assert (await client.get_log_settings()).settings["log_error"].bool_param
        assert not (await client.get_system_shared_memory_status()).regions
        assert not (await client.get_cuda_shared_memory_status()).regions
        await client.unregister_system_shared_memory()
        await client.unregister_cuda_shared_memory()
        for refused in (
            client.register_system_shared_memory("r", "/r", 8),
            client.register_cuda_shared_memory("r", b"AAAA", 0, 8),
            client.update_trace_settings(settings={"trace_rate": "1"}),
            client.update_log_settings({"log_file": "/x"}),
        ):
            with pytest.raises(InferenceServerException) as caught:
                await refused
            assert caught.value.status() == "StatusCode.UNIMPLEMENTED"
        await client.unload_model("a", unload_dependents=True)
        index = await client.get_model_repository_index()
        assert index.models[0].state == "UNAVAILABLE"


async def test_the_synchronous_client_streams(at: OipScene) -> None:
    """Answers and an in-band error come in order, and stop_stream returns."""
    got = await asyncio.to_thread(sync_client_streams, at.serving.target)
    assert [number for number, _ in got] == ["0", "", "2"]
    assert "is not found" in (got[1][1] or "")


async def test_the_asyncio_client_works_unchanged(at: OipScene) -> None:
    """The same program with the asyncio client, requests side by side, and a stream."""
    async with triton_aio.InferenceServerClient(at.serving.target) as client:
        assert await client.is_server_live()
        assert await client.is_server_ready()
        assert await client.is_model_ready("a")
        assert (await client.get_model_metadata("a")).platform == "identity"
        answers = await asyncio.gather(
            *(client.infer("a", inputs(TENSORS, triton), request_id=str(i)) for i in range(8))
        )
        for number, answer in enumerate(answers):
            assert answer.get_response().id == str(number)
            assert all(same(answer.as_numpy(name), array) for name, array in TENSORS.items())
        with pytest.raises(InferenceServerException, match="version 9 is not found"):
            await client.infer("a", inputs(TENSORS, triton), model_version="9")

        async def requests() -> AsyncIterator[dict[str, Any]]:
            for number, model in enumerate(("a", "nobody", "a")):
                yield {
                    "model_name": model,
                    "inputs": inputs({"BYTES": TENSORS["BYTES"]}, triton),
                    "request_id": str(number),
                }

        got = [pair async for pair in client.stream_infer(requests())]
        assert [error is None for _, error in got] == [True, False, True]
        assert same(got[0][0].as_numpy("BYTES"), TENSORS["BYTES"])


async def test_a_tensor_of_many_megabytes_comes_back_whole(at: OipScene) -> None:
    """What is larger than a worker's arena and than gRPC's default limit goes through both ways."""
    large = np.arange(4 * 2**20, dtype=np.float32)
    async with triton_aio.InferenceServerClient(at.serving.target) as client:
        answer = await client.infer("a", inputs({"FP32": large}, triton))
        assert same(answer.as_numpy("FP32"), large)


async def test_a_request_that_says_two_names_never_reaches_the_wrong_model(at: OipScene) -> None:
    """Scan and worker read the same name of a message that has two, so the answer is that model's."""
    await at.run.have("b", backend="identity")
    made = triton.InferInput("FP32", [1], "FP32")
    made.set_data_from_numpy(np.zeros(1, np.float32))
    tail = b"\x2a" + bytes([made._get_tensor().ByteSize()]) + made._get_tensor().SerializeToString()
    payload = b"\x0a\x01a\x0a\x01b" + tail + b"\x3a\x04" + b"\0" * 4
    answer = await at.infer_bytes(payload)
    assert answer.startswith(b"\x0a\x01b")


@pytest.mark.parametrize("order", ["modelhost first", "tritonclient first"])
def test_both_import_in_one_process(order: str) -> None:
    """The contract's stubs and tritonclient's, which have the same names, live side by side."""
    ours = "import modelhost; from modelhost.oip import open_inference_pb2 as ours"
    theirs = "import tritonclient.grpc; from tritonclient.grpc import service_pb2 as theirs"
    lines = [ours, theirs] if order.startswith("modelhost") else [theirs, ours]
    use = (
        "a = ours.ModelInferRequest(model_name='x', id='1').SerializeToString(); "
        "assert theirs.ModelInferRequest.FromString(a).model_name == 'x'"
    )
    done = subprocess.run(
        [sys.executable, "-c", "\n".join([*lines, use])],
        env={"PYTHONPATH": f"{ROOT / 'client'}:{ROOT / 'server'}"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
