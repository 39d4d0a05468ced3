"""Workers that end or answer as they should not, at each moment of a load and of a drain."""

from pathlib import Path

import pytest

from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.resources import (
    InstanceState,
)
from tests.fakes.clock import settle
from tests.host.support import Running, World
from tests.support import wait_until_async


@pytest.fixture
async def world(tmp_path: Path) -> World:
    return World(tmp_path)


async def test_a_worker_lost_twice_during_a_load_fails_it(world: World) -> None:
    """A load survives one loss of its worker; at the second it fails with WORKER_LOST."""
    async with world.host() as run:
        await run.have("a")
        gate = run.workers.load_gate("a")
        gate.close()
        operation = await run.host.residency.load("a")
        for _ in range(2):
            await gate.reached()
            run.workers.crash("sim-0")
            await settle()
        done = await run.failed(operation)
        assert done.error is not None
        assert done.error.reason == "WORKER_LOST"
        assert run.host.occupancy.ledger.used("sim-0") == 0
        gate.open()
        await run.load("a")


async def test_a_model_that_crashes_while_loading_is_blocked(world: World) -> None:
    """A model blamed for its worker's end at each load is BLOCKED at the fifth, not loaded again."""
    async with world.host() as run:
        await run.have("a")
        gate = run.workers.load_gate("a")
        gate.close()
        crashes = 0
        while run.host.residency._crashes.blocked("a") is None:
            await run.host.residency.load("a")
            await gate.reached()
            run.blame("a")
            crashes += 1
            await settle()
        assert crashes == 5
        instance = run.host.registry.decided.instance_of("a")
        assert instance is not None
        assert instance.state is InstanceState.BLOCKED
        with pytest.raises(ModelhostError) as caught:
            await run.host.residency.load("a")
        assert caught.value.reason is Reason.MODEL_BLOCKED


async def test_a_crash_during_a_drain_frees_the_model(world: World) -> None:
    """A worker that dies while one of its models drains ends the drain; requests load it again."""
    async with world.host() as run:
        await run.have("a")
        await run.load("a")
        run.workers.infer_gate("a").close()
        first = run.infer("a")
        await run.workers.infer_gate("a").reached()
        unload = await run.host.residency.unload("a")
        await settle()
        second = run.infer("a", 30.0)
        await settle()
        run.workers.crash("sim-0", blamed="a")
        run.workers.infer_gate("a").open()
        with pytest.raises(ModelhostError):
            await first
        await run.end(unload)
        assert await second == b"x"


async def test_an_unload_that_raises_keeps_no_model_away(world: World) -> None:
    """Whatever a worker answers to an unload, the model can be loaded again."""
    async with world.host() as run:
        await run.have("a")
        await run.load("a")
        unload = run.workers.unload

        async def broken(device: str, instance: str, generation: int) -> None:
            await unload(device, instance, generation)
            raise RuntimeError("bug")

        run.workers.unload = broken  # type: ignore[method-assign]
        await run.end(await run.host.residency.unload("a"))
        await run.load("a")


async def test_a_load_that_raises_fails(world: World) -> None:
    """An exception that no worker promises fails the load and leaves nothing behind."""
    async with world.host() as run:
        await run.have("a")

        async def broken(*args: object) -> None:
            raise RuntimeError("bug")

        works, run.workers.load = run.workers.load, broken  # type: ignore[assignment,method-assign]
        done = await run.failed(await run.host.residency.load("a"))
        assert done.error is not None
        assert done.error.reason == "LOAD_FAILED"
        run.workers.load = works  # type: ignore[method-assign]
        await run.load("a")


@pytest.mark.parametrize("outliving", ["", "abc"])
async def test_models_come_back_by_last_use_also_after_the_second_crash(
    world: World, outliving: str
) -> None:
    """Coming back is no use: what was used last is first again, however often the worker ends meanwhile."""
    async with world.host(host_budget=1000) as run:
        run.workers.leavings.outliving = set(outliving)
        for model in ("a", "b", "c"):
            await run.have(model, size=100)
            await run.load(model)
        for model in ("b", "c", "a"):
            await world.clock.advance(1.0)
            await run.infer(model)
        for _ in range(2):
            await world.clock.advance(1.0)
            start = run.host.registry.journal.last_sequence + 1
            gates = {model: run.workers.load_gate(model) for model in ("a", "c", "b")}
            for gate in gates.values():
                gate.close()
            run.workers.crash("sim-0")
            for model, gate in gates.items():
                await world.clock.advance(1.0)
                gate.open()
                await wait_until_async(lambda model=model: _open(run, model))
            await run.host.registry.flush()
            events = await run.host.registry.journal.read(start)
            for reason in ("CRASHED", "LOADING"):
                told = [e.key.split("/")[0] for e in events if e.reason == reason]
                assert told == ["a", "c", "b"]


def _open(run: Running, model: str) -> bool:
    route = run.host.residency.routes.get(model)
    return route is not None and route.open


async def test_the_last_words_are_told_with_the_model_that_bears_the_blame(world: World) -> None:
    """CRASHED says how the worker ended, and with the blamed model the end of what it wrote."""
    async with world.host() as run:
        for model in ("a", "b"):
            await run.have(model)
            await run.load(model)
        start = run.host.registry.journal.last_sequence + 1
        tail = "x" * 5_000 + "last words"
        run.workers.crash("sim-0", exit="exit code 1", blamed="a", stderr_tail=tail)
        await settle()
        events = await run.host.registry.journal.read(start)
        told = {e.key.split("/")[0]: e.details for e in events if e.reason == "CRASHED"}
        assert {d["exit"] for d in told.values()} == {"exit code 1"}
        assert told["a"]["stderr"] == tail[-2_000:]
        assert "stderr" not in told["b"]
