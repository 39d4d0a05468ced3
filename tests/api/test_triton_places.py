"""Places at a model, with an existing client and a real worker: taken, refused when there are none, and freed."""

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from tritonclient.utils import InferenceServerException

from modelhost.oip import open_inference_pb2 as oip
from modelhostd.adapters.workers import ProcessWorkers
from tests.api.oip_scene import PATH, OipScene, oip_scene
from tests.host.support import World
from tests.support import wait_until_async
from tests.worker.harness import CONFIG, started

PLACES = 2


@pytest.fixture
def workers() -> ProcessWorkers:
    """Workers with three places, of which one model has two."""
    return ProcessWorkers(dataclasses.replace(CONFIG, queue_limit=PLACES + 1))


@pytest.fixture
async def at(tmp_path: Path, workers: ProcessWorkers) -> AsyncIterator[OipScene]:
    """A model that has two places: at one of them it works, at the other a request waits."""
    async with oip_scene(World(tmp_path), real_workers=workers) as scene:
        await scene.run.have("a", backend="trouble")
        await scene.run.load("a")
        yield scene


@pytest.fixture
async def client(at: OipScene) -> AsyncIterator[triton_aio.InferenceServerClient]:
    async with triton_aio.InferenceServerClient(at.serving.target) as made:
        yield made


def inputs(module: Any) -> list[Any]:
    tensor = module.InferInput("x", [1], "FP32")
    tensor.set_data_from_numpy(np.zeros(1, np.float32))
    return [tensor]


def send(client: triton_aio.InferenceServerClient, gate: Path) -> "asyncio.Task[Any]":
    """Send a request that works until ``gate`` is there."""
    parameters = {"do": f"wait:{gate}"}
    return asyncio.ensure_future(client.infer("a", inputs(triton_aio), parameters=parameters))


async def is_full(client: triton_aio.InferenceServerClient, gate: Path) -> bool:
    """Whether one request more is refused; ``gate`` is open."""
    try:
        await client.infer("a", inputs(triton_aio), parameters={"do": f"wait:{gate}"})
    except InferenceServerException as error:
        return bool(error.status() == "StatusCode.RESOURCE_EXHAUSTED")
    return False


def idle(at: OipScene, workers: ProcessWorkers) -> bool:
    """Whether neither the host nor the worker, which hears of an end a moment later, has a request."""
    return not (at.run.host.inference.in_flight or workers._workers()[0].in_flight)


async def test_who_gives_up_frees_its_place_in_the_worker(
    at: OipScene,
    workers: ProcessWorkers,
    client: triton_aio.InferenceServerClient,
    tmp_path: Path,
) -> None:
    """At work and waiting, by cancellation and by deadline: the next request finds the place free."""
    shut, opened = tmp_path / "shut", tmp_path / "open"
    opened.touch()
    at_work = send(client, shut)
    await wait_until_async(lambda: started(shut) == 1)
    waits = send(client, shut)
    await wait_until_async(lambda: at.run.host.inference.in_flight == PLACES)
    assert await is_full(client, opened)
    waits.cancel()

    async def gives_up() -> None:
        """Wait no longer than its deadline for a model that is at work for ever."""
        status = "StatusCode.RESOURCE_EXHAUSTED"
        while status == "StatusCode.RESOURCE_EXHAUSTED":  # until the place before it is free
            with pytest.raises(InferenceServerException) as caught:
                await client.infer("a", inputs(triton_aio), client_timeout=0.3)
            status = caught.value.status()
        assert status == "StatusCode.DEADLINE_EXCEEDED"

    await gives_up()
    await gives_up()
    # The one at work, which nobody else could end: its gate stays shut.
    at_work.cancel()
    await wait_until_async(lambda: idle(at, workers))
    assert not await is_full(client, opened)
    assert started(shut) == 1


async def test_a_synchronous_client_that_times_out_frees_its_place(
    at: OipScene,
    workers: ProcessWorkers,
    client: triton_aio.InferenceServerClient,
    tmp_path: Path,
) -> None:
    """The deadline of a call reaches the worker: what it was at work on is given up."""
    shut, opened = tmp_path / "shut", tmp_path / "open"
    opened.touch()

    def program() -> str:
        with triton.InferenceServerClient(at.serving.target) as own:
            parameters = {"do": f"wait:{shut}"}
            with pytest.raises(InferenceServerException) as caught:
                own.infer("a", inputs(triton), client_timeout=0.5, parameters=parameters)
            return str(caught.value.status())

    statuses = await asyncio.gather(*(asyncio.to_thread(program) for _ in range(PLACES)))
    assert set(statuses) == {"StatusCode.DEADLINE_EXCEEDED"}
    await wait_until_async(lambda: idle(at, workers))
    assert not await is_full(client, opened)


async def test_a_full_model_says_when_to_come_again(
    at: OipScene, client: triton_aio.InferenceServerClient, tmp_path: Path
) -> None:
    """RESOURCE_EXHAUSTED with reason QUEUE_FULL and RetryInfo; never UNAVAILABLE, which some clients repeat."""
    shut = tmp_path / "shut"
    taken = [send(client, shut) for _ in range(PLACES)]
    await wait_until_async(lambda: at.run.host.inference.in_flight == PLACES)
    request = oip.ModelInferRequest(model_name="a")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await at.channel.unary_unary(PATH)(request.SerializeToString())
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    status = rpc_status.from_call(caught.value)
    retry = error_details_pb2.RetryInfo()
    assert any(detail.Unpack(retry) for detail in status.details)
    assert retry.retry_delay.ToMilliseconds() > 0
    shut.touch()
    await asyncio.gather(*taken)
