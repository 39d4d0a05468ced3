"""Text generation and batches with an existing client, tritonclient, unchanged, on a real worker."""

import asyncio
import json
import queue
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from tritonclient.utils import InferenceServerException

from modelhostd.adapters.workers import ProcessWorkers, WorkersConfig
from modelhostd.core.resources import OperationState
from tests.api.oip_scene import OipScene, oip_scene
from tests.host.support import World
from tests.worker.generation_models import expected, save_model

# One worker for all of them: it takes seconds to import its libraries.
pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(540)]

TOKENS = 24


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def at(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[OipScene]:
    folder = tmp_path_factory.mktemp("world")
    workers = ProcessWorkers(
        WorkersConfig(backends=("text-generation", "identity"), arena_bytes=2**20)
    )
    world = World(folder)
    async with oip_scene(world, real_workers=workers) as scene:
        model_dir = Path(world.files.model_dir("g", 1))
        model_dir.mkdir(parents=True, exist_ok=True)
        save_model(model_dir)
        scene.folder = model_dir  # type: ignore[attr-defined]
        await scene.run.have("g", backend="text-generation")
        await scene.run.have("i", backend="identity", max_batch_size=8)
        for model in ("g", "i"):
            load = await scene.run.host.residency.load(model)
            done = await scene.run.host.operations.wait(load.id, timeout_s=150)
            assert done.state is OperationState.SUCCEEDED, done
        yield scene


def inputs(prompt: str, module: Any = triton, **more: object) -> list[Any]:
    """Return the inputs of a request as a client of Triton's backend for vLLM makes them."""
    made = []
    for name, value, datatype in (
        ("text_input", prompt.encode(), "BYTES"),
        *((n, v, "BOOL" if isinstance(v, bool) else "BYTES") for n, v in more.items()),
    ):
        tensor = module.InferInput(name, [1], datatype)
        dtype = np.bool_ if datatype == "BOOL" else np.object_
        tensor.set_data_from_numpy(np.array([value], dtype))
        made.append(tensor)
    return made


def sync_program(target: str) -> tuple[bytes, list[tuple[bytes, bool]], list[str]]:
    """Run in a thread: the whole text, the pieces with their final flags, and errors of a stream."""
    sampling = json.dumps({"temperature": "0", "max_tokens": str(TOKENS)}).encode()
    answers: queue.Queue[Any] = queue.Queue()
    with triton.InferenceServerClient(target) as client:
        config = client.get_model_config("g").config
        assert config.model_transaction_policy.decoupled
        assert {one.name for one in config.input} >= {"text_input", "stream", "sampling_parameters"}
        result = client.infer("g", inputs("hello", sampling_parameters=sampling))
        whole = result.as_numpy("text_output")[0]
        assert result.as_numpy("num_input_tokens")[0] == 5
        client.start_stream(lambda result, error: answers.put((result, error)))
        client.async_stream_infer(
            "g",
            inputs("hello", stream=True, sampling_parameters=sampling),
            request_id="1",
            outputs=[triton.InferRequestedOutput("text_output")],
            enable_empty_final_response=True,
        )
        client.async_stream_infer("g", inputs("hello"), request_id="2", parameters={"n": 4})
        client.stop_stream()
    pieces, errors = [], []
    while not answers.empty():
        result, error = answers.get()
        if error is not None:
            errors.append(str(error.message()))
            continue
        response = result.get_response()
        assert response.id == "1"
        final = response.parameters["triton_final_response"].bool_param
        pieces.append((result.as_numpy("text_output")[0], final))
        assert result.as_numpy("finish_reason") is None
    return whole, pieces, errors


async def test_the_synchronous_client_reads_a_text_whole_and_in_pieces(at: OipScene) -> None:
    """Text, pieces, final flags and an in-band error are what a client of Triton's expects."""
    want, _ = await asyncio.to_thread(golden, at, "hello")
    whole, pieces, errors = await asyncio.to_thread(sync_program, at.serving.target)
    assert whole == want
    assert b"".join(piece for piece, _ in pieces) == want
    assert [final for _, final in pieces] == [False] * (len(pieces) - 1) + [True]
    (error,) = errors
    assert "parameters[n]" in error


def golden(at: OipScene, prompt: str) -> tuple[bytes, int]:
    """Return the library's own text."""
    import transformers

    folder = at.folder  # type: ignore[attr-defined]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    return expected(model, folder, prompt, TOKENS)


async def test_the_asyncio_client_streams_several_texts_at_once(at: OipScene) -> None:
    """Pieces of several texts come interleaved, each text with its request's id, each the right one."""
    prompts = {"a": "hello", "b": "a much longer prompt", "c": "x"}
    want = {number: (await asyncio.to_thread(golden, at, p))[0] for number, p in prompts.items()}

    async def requests() -> AsyncIterator[dict[str, Any]]:
        for number, prompt in prompts.items():
            yield {
                "model_name": "g",
                "inputs": inputs(prompt, triton_aio, stream=True),
                "request_id": number,
                "parameters": {"max_tokens": TOKENS},
            }

    got: dict[str, bytes] = dict.fromkeys(prompts, b"")
    order = []
    async with triton_aio.InferenceServerClient(at.serving.target) as client:
        async for result, error in client.stream_infer(requests()):
            assert error is None
            number = result.get_response().id
            got[number] += result.as_numpy("text_output")[0]
            order.append(number)
    assert got == want
    assert len(set(order[: len(order) // 2])) > 1


async def test_a_cancelled_stream_frees_the_model(at: OipScene) -> None:
    """When a client cancels, the text ends in the worker; the statistics count what was answered."""
    async with triton_aio.InferenceServerClient(at.serving.target) as client:

        async def requests() -> AsyncIterator[dict[str, Any]]:
            yield {
                "model_name": "g",
                "inputs": inputs("hello", triton_aio, stream=True),
                "parameters": {"max_tokens": 80, "ignore_eos": "true"},
            }

        responses = client.stream_infer(requests())
        async for _ in responses:
            responses.cancel()
            break
        before = (await client.get_inference_statistics("g")).model_stats[0]
        await client.infer("g", inputs("hello", triton_aio), parameters={"max_tokens": 3})
        after = (await client.get_inference_statistics("g")).model_stats[0]
        assert after.inference_count == before.inference_count + 1


@pytest.mark.parametrize(
    ("prompt", "parameters", "field"),
    [("x" * 500, {}, "text_input"), ("x", {"colour": "red"}, "parameters[colour]")],
    ids=["too-long", "unknown"],
)
async def test_bad_requests_are_named(
    at: OipScene, prompt: str, parameters: dict[str, Any], field: str
) -> None:
    """INVALID_ARGUMENT with what was expected, as a status for single requests."""
    async with triton_aio.InferenceServerClient(at.serving.target) as client:
        with pytest.raises(InferenceServerException) as caught:
            await client.infer("g", inputs(prompt, triton_aio), parameters=parameters)
    assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"
    assert field in caught.value.message()


async def test_batches_are_in_the_statistics(at: OipScene) -> None:
    """Items, executions and batch sizes add up, whatever ran together."""
    counts = [1, 2, 3, 1, 4, 1, 2, 8]

    def rows(count: int) -> list[Any]:
        tensor = triton_aio.InferInput("x", [count, 2], "FP32")
        tensor.set_data_from_numpy(np.full((count, 2), count, np.float32))
        return [tensor]

    async with triton_aio.InferenceServerClient(at.serving.target) as client:
        config = (await client.get_model_config("i")).config
        assert (config.max_batch_size, config.HasField("dynamic_batching")) == (8, True)
        answers = await asyncio.gather(*(client.infer("i", rows(count)) for count in counts * 4))
        for count, answer in zip(counts * 4, answers, strict=True):
            assert answer.as_numpy("x").tolist() == [[count, count]] * count
        (statistics,) = (await client.get_inference_statistics("i")).model_stats
    assert statistics.inference_count == sum(counts) * 4
    assert statistics.inference_stats.success.count == len(counts) * 4
    batches = {one.batch_size: one.compute_infer.count for one in statistics.batch_stats}
    assert sum(size * count for size, count in batches.items()) == sum(counts) * 4
    assert sum(batches.values()) == statistics.execution_count
    assert max(batches) == 8


async def test_a_client_asks_for_the_highest_classes(at: OipScene) -> None:
    """``class_count`` gives texts of value and index in place of the tensor, for each item."""
    values = np.array([[0.5, -1.0, 3.0], [2.0, 2.0, 1.0]], np.float32)
    tensor = triton_aio.InferInput("x", [2, 3], "FP32")
    tensor.set_data_from_numpy(values)
    async with triton_aio.InferenceServerClient(at.serving.target) as client:
        assert "classification" in (await client.get_server_metadata()).extensions
        wanted = [triton_aio.InferRequestedOutput("x", class_count=2)]
        answer = await client.infer("i", [tensor], outputs=wanted)
    assert answer.as_numpy("x").tolist() == [
        [b"3.000000:2", b"0.500000:0"],
        [b"2.000000:0", b"2.000000:1"],
    ]
