"""Requests that wait for a model, give up, come at the wrong time; what is counted of them."""

import asyncio
from pathlib import Path

import pytest

from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.resources import (
    Health,
    OperationState,
)
from tests.fakes.clock import settle
from tests.host.support import World
from tests.support import DEADLINE_S


@pytest.fixture
async def world(tmp_path: Path) -> World:
    return World(tmp_path)


async def test_requests_that_gave_up_take_no_place(world: World) -> None:
    """Requests whose deadline passed in the queue do not count against its limit."""
    async with world.host() as run:
        await run.have("a", queue_limit=3)
        run.workers.load_gate("a").close()
        patient = run.infer("a")
        for _ in range(5):
            for impatient in [run.infer("a") for _ in range(2)]:
                await settle()
                impatient.cancel()
            await settle()
        last = run.infer("a")
        await settle()
        run.workers.load_gate("a").open()
        assert [await patient, await last] == [b"x", b"x"]


async def test_a_cancelled_request_leaves_nothing_counted(world: World) -> None:
    """A request that is cancelled in the queue, at its turn or in flight is counted out again."""
    async with world.host() as run:
        await run.have("a")
        run.workers.load_gate("a").close()
        queued, at_its_turn = run.infer("a"), run.infer("a")
        await run.workers.load_gate("a").reached()
        queued.cancel()
        at_its_turn.cancel()
        run.workers.load_gate("a").open()
        await run.load("a")
        run.workers.infer_gate("a").close()
        in_flight = run.infer("a")
        await run.workers.infer_gate("a").reached()
        in_flight.cancel()
        await settle()
        route = run.host.routes.get("a")
        assert route is not None
        assert (route.in_flight, run.host.inference.in_flight) == (0, 0)
        assert route.idle.is_set()


async def test_a_wrong_version_loads_nothing(world: World) -> None:
    """A request for a version that is not there is refused before anything is loaded for it."""
    async with world.host() as run:
        await run.have("a")
        with pytest.raises(ModelhostError) as caught:
            await run.host.inference.infer("a", "7", b"x", DEADLINE_S)
        assert caught.value.reason is Reason.MODEL_NOT_FOUND
        assert not run.workers.log
        assert (await run.host.inference.infer("a", "1", b"x", DEADLINE_S)).payload == b"x"


async def test_without_load_on_demand_a_drain_is_an_end(world: World) -> None:
    """With load_on_demand off a request that comes during an unload does not bring the model back."""
    async with world.host() as run:
        await run.have("a", load_on_demand=False)
        await run.load("a")
        gate = run.workers.unload_gate("a")
        gate.close()
        unload = await run.host.residency.unload("a")
        await gate.reached()
        with pytest.raises(ModelhostError) as caught:
            await run.host.inference.infer("a", "", b"x", DEADLINE_S)
        assert caught.value.reason is Reason.MODEL_NOT_LOADED
        gate.open()
        await run.end(unload)
        assert not run.workers.resident


async def test_a_stopping_host_refuses_and_ends_every_wait(world: World) -> None:
    """When the host stops, requests in queues and new ones end SHUTTING_DOWN, running loads too."""
    async with world.host() as run:
        for model in "ab":
            await run.have(model)
        await run.load("b")
        run.workers.load_gate("a").close()
        load = await run.host.residency.load("a")
        waiting = run.infer("a")
        await run.workers.load_gate("a").reached()
        run.workers.unload_gate("b").close()
        await run.host.residency.unload("b")
        behind_a_drain = run.infer("b")
        await run.workers.unload_gate("b").reached()
        await run.host.stop(grace_s=1.0)
        for request in (waiting, behind_a_drain, run.infer("b")):
            with pytest.raises(ModelhostError) as caught:
                await request
            assert caught.value.reason is Reason.SHUTTING_DOWN
        with pytest.raises(ModelhostError) as caught:
            await run.host.residency.load("a")
        assert caught.value.reason is Reason.SHUTTING_DOWN
        assert await run.ended(load.id) is OperationState.FAILED


async def test_a_deleted_model_leaves_no_figures(world: World) -> None:
    """Nothing is kept of deleted models: crashes, last use, measured bytes, queues, figures."""
    async with world.host() as run:
        for _ in range(3):
            await run.have("a")
            await run.load("a")
            await run.host.inference.infer("a", "", b"x", DEADLINE_S)
            run.workers.crash("sim-0", blamed="a")
            await run.load("a")
            await run.end(await run.host.models.delete("a", force=True))
        assert not run.host.routes.last_used_time
        assert not run.host.routes._queues
        assert not run.host.inference.figures
        assert not run.host.occupancy.learned.measured
        assert run.host.residency._crashes.count("a") == 0


async def test_a_health_check_is_of_its_own_instance(world: World) -> None:
    """The verdict of a check that ends after its instance has gone says nothing of the next one."""
    async with world.host() as run:
        await run.have("a")
        await run.load("a")
        checked, go = asyncio.Event(), asyncio.Event()
        real = run.workers.check

        async def slow(device: str, instance: str, generation: int) -> object:
            verdict = await real(device, instance, generation)
            checked.set()
            await go.wait()
            return verdict

        run.workers.check = slow  # type: ignore[assignment,method-assign]
        run.workers.healths["a"] = (Health.UNHEALTHY, "bad")
        check = asyncio.ensure_future(run.host.health.check("a"))
        await checked.wait()
        await run.end(await run.host.residency.unload("a"))
        await run.load("a")
        go.set()
        await check
        assert "HEALTH" not in run.reasons("instances")
