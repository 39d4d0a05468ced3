"""Loads that fail: what can never load is tried once, the rest ever less often, and what changed is tried again."""

from dataclasses import replace
from pathlib import Path

import pytest

from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.resources import ModelConfig
from tests.host.support import Running, World
from tests.support import DEADLINE_S


@pytest.fixture
async def world(tmp_path: Path) -> World:
    return World(tmp_path)


def loads(run: Running, model: str = "a") -> int:
    """How many loads of a model the workers were asked for."""
    return sum(verb == "load" and name == model for verb, _, name, _ in run.workers.log)


async def refused(run: Running, model: str = "a") -> ModelhostError:
    """Return what a request is refused with."""
    with pytest.raises(ModelhostError) as caught:
        await run.infer(model, DEADLINE_S)
    return caught.value


def failing(run: Running, reason: Reason) -> None:
    run.workers.load_errors["a"] = ModelhostError(reason, "no such luck", {"model": "a"})


@pytest.mark.parametrize("reason", [Reason.UNSUPPORTED_MODEL, Reason.BACKEND_NOT_AVAILABLE])
async def test_what_can_never_load_is_tried_once(world: World, reason: Reason) -> None:
    """Requests to a model that no backend can load get the error of its one load, for as long as they ask."""
    async with world.host() as run:
        await run.have("a")
        failing(run, reason)
        for _ in range(5):
            error = await refused(run)
            assert error.reason is reason
            assert error.message == "no such luck"
            await world.clock.advance(100.0)
        assert loads(run) == 1
        assert not run.host.inference.ready("a")
        await run.end(await run.host.residency.unload("a"))
        assert not run.host.inference.ready("a")
        assert (await refused(run)).reason is reason


@pytest.mark.parametrize("what", ["config", "files", "LoadModel", "unblock"])
async def test_what_changed_is_tried_again(world: World, what: str) -> None:
    """Another config, other files and an operator's word bring the next try; the model then serves."""
    async with world.host() as run:
        await run.have("a")
        failing(run, Reason.UNSUPPORTED_MODEL)
        await refused(run)
        run.workers.load_errors.clear()
        match what:
            case "config":
                await run.host.models.update(
                    "a", lambda s: replace(s, config=ModelConfig(backend="identity"))
                )
            case "files":
                content = {"model.safetensors": b"another"}
                world.downloads.add("hf://org/a", content, predicted_bytes=400)
                await run.end(await run.host.transfers.download("a", refresh=True))
            case "LoadModel":
                await run.load("a")
            case "unblock":
                await run.host.residency.unblock("a")
        assert await run.infer("a", DEADLINE_S) == b"x"


async def test_a_failed_load_is_tried_ever_less_often(world: World) -> None:
    """After a load that failed requests are refused at once, with the time to come again, for 1, 2, 4 ... s."""
    async with world.host() as run:
        await run.have("a")
        failing(run, Reason.LOAD_FAILED)
        for number, delay in enumerate((1.0, 2.0, 4.0), start=1):
            assert (await refused(run)).reason is Reason.LOAD_FAILED
            error = await refused(run)
            assert error.retry_delay_s == delay
            assert loads(run) == number
            await world.clock.advance(delay)
        for _ in range(10):
            await refused(run)
            await world.clock.advance(60.0)
        assert (await refused(run)).reason is Reason.LOAD_FAILED
        run.workers.load_errors.clear()
        await world.clock.advance(60.0)
        assert await run.infer("a", DEADLINE_S) == b"x"


async def test_a_load_without_memory_is_tried_again_after_an_eviction(world: World) -> None:
    """A load that takes more than predicted and finds no memory evicts others, and is tried once more."""
    async with world.host(budget=1000) as run:
        for model in ("a", "b"):
            await run.have(model)
        await run.load("b")
        failing(run, Reason.OUT_OF_DEVICE_MEMORY)
        gate = run.workers.unload_gate("b")
        gate.close()
        operation = await run.host.residency.load("a")
        await gate.reached()
        run.workers.load_errors.clear()
        gate.open()
        await run.end(operation)
        assert set(run.workers.resident) == {"a"}
        assert loads(run) == 2


async def test_the_second_try_evicts_no_more_than_it_must(world: World) -> None:
    """One small model that found no memory takes the place of one other, not of everyone on a small device."""
    async with world.host(budget=10_000) as run:
        for model in "abcde":
            await run.have(model)
        for model in "bcde":
            await run.load(model)
            await world.clock.advance(1.0)
        failing(run, Reason.OUT_OF_DEVICE_MEMORY)
        await refused(run)
        assert set(run.workers.resident) == {"c", "d", "e"}


async def test_a_load_that_never_finds_memory_ends(world: World) -> None:
    """Tried twice, with everything evicted that could be, it is refused with a type."""
    async with world.host(budget=1000) as run:
        for model in ("a", "b"):
            await run.have(model)
        await run.load("b")
        failing(run, Reason.OUT_OF_DEVICE_MEMORY)
        assert (await refused(run)).reason is Reason.OUT_OF_DEVICE_MEMORY
        assert loads(run) == 2
        assert not run.workers.resident
        assert run.host.occupancy.ledger.used("sim-0") == 0


@pytest.mark.parametrize("what", ["budget", "config", "pin"])
async def test_a_corrected_estimate_refuses_nothing(world: World, what: str) -> None:
    """What a load that found no memory is taken to need is no more than it can be given, and is of that config only."""
    async with world.host(budget=1000) as run:
        for model in ("a", "b"):
            await run.have(model)
        if what == "pin":
            await run.load("b")
            await run.host.models.pin("b", pinned=True)
        failing(run, Reason.OUT_OF_DEVICE_MEMORY)
        await refused(run)
        run.workers.load_errors.clear()
        if what == "budget":
            await run.host.residency.set_budget("sim-0", 800)
        elif what == "config":
            await run.load("b")
            await run.host.models.pin("b", pinned=True)
            await run.host.models.update(
                "a", lambda s: replace(s, config=replace(s.config, precision="fp16"))
            )
        await run.load("a")
