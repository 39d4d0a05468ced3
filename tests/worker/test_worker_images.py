"""A real model in real workers: warm and back, and loads that fail beside it."""

import dataclasses
import os
import shutil

import numpy as np
import pytest

from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.resources import ModelConfig
from modelhostd.ports import LoadSpec
from modelhostd.worker.backend import Tensor
from tests.support import wait_until_async
from tests.worker.harness import CONFIG, decode, encode, ignore, running

pytestmark = pytest.mark.timeout(900)
"""Each worker imports a library for seconds, which on a swamped machine is more than a minute."""

REAL = dataclasses.replace(CONFIG, backends=("transformers",), start_timeout_s=120.0)
TASK = "feature-extraction"


def texts():
    """Return a batch of texts as a tensor."""
    array = np.empty(3, object)
    array[:] = [b"a cat sits on the mat", b"the", b"where is it"]
    return Tensor("BYTES", array)


def spec(folder, generation=1, **config):
    """Return what is loaded."""
    return LoadSpec("m", "m-1", generation, 1, folder, TASK, ModelConfig(**config), 0)


async def embed(workers, device, generation=1):
    """Return the embeddings, to the bit."""
    payload = encode({"text": texts()}, name="m")
    reply = await workers.infer(device, "m-1", generation, payload, timeout_s=None)
    _, arrays = decode(reply.payload)
    return arrays["embedding"].tobytes()


@pytest.mark.parametrize("precision", ["", "bf16"])
async def test_minilm_answers_the_same_bits_after_swaps(minilm, precision):
    """The image is of the file's bytes (half of them as bf16); three swaps later the answers are equal."""
    async with running(REAL) as (workers, _):
        loaded = await workers.load("sim-0", spec(minilm, precision=precision), ignore)
        expected = await embed(workers, "sim-0")
        size = os.path.getsize(minilm / "model.safetensors") // (2 if precision else 1)
        assert abs(loaded.measured_bytes - size) < 0.03 * size
        assert loaded.host_bytes == loaded.measured_bytes
        for _ in range(3):
            assert await workers.demote("sim-0", "m-1", 1) == loaded.host_bytes
            await workers.promote("sim-0", "m-1", 1, ignore)
            assert await embed(workers, "sim-0") == expected


@pytest.mark.parametrize("device", ["cpu", "sim-0"])
async def test_after_a_crash_it_answers_the_same_bits_without_its_weights_file(
    tiny, tmp_path, device
):
    """What the library makes of the adopted weights, converted to bf16 when they were read, is what it made of the file."""
    folder = shutil.copytree(tiny, tmp_path / "model")
    async with running(REAL) as (workers, listener):
        loaded = await workers.load(device, spec(folder, precision="bf16"), ignore)
        expected = await embed(workers, device)
        await wait_until_async(lambda: workers.at_rest(device))
        (worker,) = workers._workers()
        worker.kill("signal SIGKILL")
        await listener.wait(exits=1)
        (folder / "model.safetensors").unlink()
        back = await workers.promote(device, "m-1", 1, ignore)
        assert 0 < back.adopted_bytes <= back.measured_bytes == loaded.measured_bytes
        assert await embed(workers, device) == expected


async def test_a_truncated_file_fails_its_load_alone(tiny, tmp_path):
    """LOAD_FAILED, time and again; the model beside it answers on, and nothing of the other can be demoted."""
    broken = tmp_path / "broken"
    shutil.copytree(tiny, broken)
    path = broken / "model.safetensors"
    os.truncate(path, path.stat().st_size - 100)
    async with running(REAL) as (workers, listener):
        await workers.load("sim-0", spec(tiny), ignore)
        before = await embed(workers, "sim-0")
        for attempt in range(3):
            wrong = dataclasses.replace(spec(broken, attempt + 1), model="b", instance="b-1")
            with pytest.raises(ModelhostError) as caught:
                await workers.load("sim-0", wrong, ignore)
            assert caught.value.reason is Reason.LOAD_FAILED
            assert await workers.demote("sim-0", "b-1", attempt + 1) == 0
        assert await embed(workers, "sim-0") == before
        assert listener.exits == []
