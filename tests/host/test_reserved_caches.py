"""What language models remember of their texts is reserved beside their weights."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from modelhostd.core import registry as rules
from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.resources import Source
from tests.host.support import Running, World

# 2 layers of 1 key and value head of 1 number of 2 bytes: 8 bytes a token, and at most 2 texts of 10 tokens.
CONFIG = {
    "num_hidden_layers": 2, "num_attention_heads": 1, "hidden_size": 1, "max_position_embeddings": 10,
    "torch_dtype": "float16",
}  # fmt: skip
CACHE_BYTES = 160


@pytest.fixture
async def world(tmp_path: Path) -> World:
    return World(tmp_path)


async def have(run: Running, model: str, task: str = "text-generation") -> None:
    """Have a model of 400 bytes on disk."""
    content = {"config.json": json.dumps(CONFIG).encode(), "model.safetensors": b"w" * 300}
    run.world.downloads.add(f"hf://org/{model}", content, task=task, predicted_bytes=400)
    config = rules.ModelConfig(backend_options={"max_sequences": 2})
    spec = rules.ModelSpec(source=Source(uri=f"hf://org/{model}"), config=config)
    await run.host.models.create(spec, model)
    await run.end(await run.host.transfers.download(model))


async def test_a_cache_is_reserved_before_the_load_and_stays(world: World) -> None:
    """The ledger has weights and cache from the beginning; the instance tells both, and the device which is which."""
    async with world.host(budget=1000, host_budget=2000) as run:
        await have(run, "a")
        assert run.host.residency.loads.plan("a")[1] == 400 + CACHE_BYTES
        gate = run.workers.load_gate("a")
        gate.close()
        operation = await run.host.residency.load("a")
        await gate.reached()
        assert run.host.occupancy.ledger.used("sim-0") == 560
        gate.open()
        await run.end(operation)
        assert run.host.occupancy.ledger.used("sim-0") == 560
        found = run.host.registry.committed.instance_of("a")
        assert found is not None
        assert (found.predicted_bytes, found.measured_bytes) == (400, 400)
        assert (found.working_bytes, found.host_bytes) == (CACHE_BYTES, 400)
        device = run.host.live_device(run.host.registry.committed.device("sim-0"))
        assert (device.resident_bytes, device.reserved_bytes) == (400, CACHE_BYTES)
        await run.end(await run.host.residency.unload("a", keep_warm=True))
        assert run.host.occupancy.ledger.used("sim-0") == 0
        await run.load("a")
        assert run.host.occupancy.ledger.used("sim-0") == 560


async def test_two_whose_weights_alone_would_fit_do_not(world: World) -> None:
    """What the texts of one take is not given to the weights of another."""
    async with world.host(budget=1000) as run:
        for model in "ab":
            await have(run, model)
            await run.load(model)
        assert set(run.workers.resident) == {"b"}


async def test_one_that_cannot_fit_with_its_cache_says_so(world: World) -> None:
    """The refusal names the bytes that are for requests, and what makes them fewer."""
    async with world.host(budget=500) as run:
        await have(run, "a")
        with pytest.raises(ModelhostError, match="160 of them for its requests") as caught:
            await run.host.residency.load("a")
        assert caught.value.reason is Reason.MODEL_TOO_LARGE
        assert "cache_tokens" in caught.value.message


async def test_it_is_known_after_a_restart_and_of_this_task_only(world: World) -> None:
    """A daemon that starts reads what its models remember; a model of another task remembers nothing."""
    async with world.host(budget=1000) as run:
        await have(run, "a")
        await have(run, "b", "feature-extraction")
    async with world.host(budget=1000) as run:
        assert run.host.residency.loads.plan("a")[1] == 560
        assert run.host.residency.loads.plan("b")[1] == 400


async def test_one_that_an_import_makes_a_language_model_has_a_cache(world: World) -> None:
    """Also after a restart, where what its files tell was not read since it was of another task."""
    async with world.host(budget=1000) as run:
        await have(run, "a", task="feature-extraction")
        document = b"".join([part async for part in run.host.registry_io.export()])
    changed = document.replace(b'"feature-extraction"', b'"text-generation"')
    async with world.host(budget=1000) as run:
        assert run.host.residency.loads.plan("a")[1] == 400
        read = await run.host.registry_io.read(changed)
        done = await run.host.registry_io.apply(
            read, conflict="UPDATE", include_settings=False, dry_run=False
        )
        assert list(done.updated) == ["a"]
        assert run.host.residency.loads.plan("a")[1] == 400 + CACHE_BYTES


async def test_a_model_that_becomes_a_language_model_has_a_cache(world: World) -> None:
    """Also after a restart, at which its task was another: what it remembers is known when its task is told."""
    async with world.host() as run:
        await have(run, "a", task="feature-extraction")
    async with world.host() as run:
        assert run.host.residency.loads.plan("a")[1] == 400
        await run.host.models.update("a", lambda spec: replace(spec, task="text-generation"))
        assert run.host.residency.loads.plan("a")[1] == 400 + CACHE_BYTES
