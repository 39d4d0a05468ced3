"""A model that took a shared worker down twice gets a process of its own, by itself."""

from dataclasses import replace
from pathlib import Path

import pytest

from modelhostd.core.crashes import WINDOW_S
from modelhostd.core.resources import Instance, Isolation, ModelConfig
from tests.fakes.clock import settle
from tests.host.support import Running, World
from tests.support import wait_until_async


@pytest.fixture
async def world(tmp_path: Path) -> World:
    return World(tmp_path)


def isolation(run: Running, model: str) -> Isolation:
    instance = run.host.registry.decided.instance_of(model)
    assert isinstance(instance, Instance)
    return instance.isolation


async def crash(run: Running) -> None:
    """Have ``a`` end its worker, and wait until whoever was in it is back."""
    lost = [r.model for r in run.host.routes]
    run.blame("a", exit="signal SIGSEGV")
    await settle()
    for name in lost:
        await wait_until_async(lambda name=name: is_open(run, name))


def is_open(run: Running, model: str) -> bool:
    route = run.host.routes.get(model)
    return route is not None and route.open


async def isolated(run: Running) -> None:
    """Have two models, one of which takes the shared worker down twice."""
    for model in ("a", "b"):
        await run.have(model)
        await run.load(model)
    await crash(run)
    assert isolation(run, "a") is Isolation.SHARED
    await crash(run)
    assert isolation(run, "a") is Isolation.PROCESS


async def test_the_second_crash_moves_a_model_and_spares_the_others(world: World) -> None:
    """After two crashes it has its own process, an event says why, and its third hurts nobody."""
    async with world.host() as run:
        await isolated(run)
        assert isolation(run, "b") is Isolation.SHARED
        await run.host.registry.flush()
        events = [e for e in await run.host.registry.journal.read(1) if e.reason == "ISOLATED"]
        assert len(events) == 1
        assert events[0].key.startswith("a/")
        assert events[0].details["exit"] == "signal SIGSEGV"
        assert "2 times" in events[0].details["why"]
        generation = run.host.routes.get("b").generation  # type: ignore[union-attr]
        await crash(run)
        assert run.host.routes.get("b").generation == generation  # type: ignore[union-attr]
        assert isolation(run, "a") is Isolation.PROCESS
        assert await run.infer("a") == b"x"


async def test_it_stays_there_over_evictions_and_time(world: World) -> None:
    """Neither an unload nor the window's end brings it back to the others."""
    async with world.host() as run:
        await isolated(run)
        await run.end(await run.host.residency.unload("a"))
        await world.clock.advance(WINDOW_S * 2)
        await run.load("a")
        assert isolation(run, "a") is Isolation.PROCESS
        measured = run.host.occupancy.learned.measured["a"][1]
        assert run.host.occupancy.learned.needed_bytes(run.host.models.get("a")) == measured


async def test_unblock_brings_it_back_with_the_next_load(world: World) -> None:
    """UnblockModel forgets the crashes: the next load shares the worker, the next crash is the first."""
    async with world.host() as run:
        await isolated(run)
        await run.host.residency.unblock("a")
        await run.end(await run.host.residency.unload("a"))
        await run.load("a")
        assert isolation(run, "a") is Isolation.SHARED
        await crash(run)
        assert isolation(run, "a") is Isolation.SHARED


async def test_a_config_that_needs_a_reload_brings_it_back_a_live_one_does_not(
    world: World,
) -> None:
    """What was changed may have been the cause; how long it is kept was not."""
    async with world.host() as run:
        await isolated(run)

        async def with_config(config: ModelConfig) -> None:
            await run.host.models.update("a", lambda s: replace(s, config=config))
            await run.end(await run.host.reloads.reload("a"))

        await with_config(ModelConfig(keep_alive_s=3600.0))
        assert isolation(run, "a") is Isolation.PROCESS
        await with_config(ModelConfig(keep_alive_s=3600.0, max_batch_size=8))
        assert isolation(run, "a") is Isolation.SHARED


async def test_five_crashes_block_it_wherever_it_ran(world: World) -> None:
    """Two in the shared worker and three in its own make five: BLOCKED, the others stay."""
    async with world.host() as run:
        await isolated(run)
        for _ in range(2):
            await crash(run)
        run.blame("a", stderr_tail="last words")
        await settle()
        why = run.host.residency.loads
        with pytest.raises(Exception, match="5 times") as caught:
            why.check_loadable(run.host.models.get("a"))
        assert caught.value.metadata["stderr"] == "last words"  # type: ignore[attr-defined]
        assert is_open(run, "b")
