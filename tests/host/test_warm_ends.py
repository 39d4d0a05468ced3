"""Ends of warm copies and of swap-ins: unloaded, forced, timed out, dropped for a budget, deleted, cancelled."""

from pathlib import Path

import pytest

from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.resources import (
    InstanceState,
    OperationState,
    Settings,
)
from tests.fakes.clock import settle
from tests.host.support import World
from tests.host.warm import evicted, state, true, verbs


@pytest.fixture
async def world(tmp_path: Path) -> World:
    return World(tmp_path)


async def test_an_unload_frees_both_tiers(world: World) -> None:
    """UnloadModel of a READY model and of a WARM one leaves no byte, and its operation says how many went."""
    async with world.host(budget=500, host_budget=1000) as run:
        await evicted(run, "a")
        done = await run.end(await run.host.residency.unload("a"))
        assert done.result == {"freed_bytes": 400, "freed_host_bytes": 400, "warm": False}
        assert run.workers.image_bytes == 0
        await evicted(run, "a", "b")
        done = await run.end(await run.host.residency.unload("a"))
        assert done.result == {"freed_bytes": 0, "freed_host_bytes": 400, "warm": False}
        assert state(run, "a") is None
        true(run)


async def test_an_unload_may_leave_the_model_warm(world: World) -> None:
    """With `keep_warm` the device is free and the copy stays; without it the same model goes altogether."""
    async with world.host(budget=500, host_budget=1000) as run:
        await evicted(run, "a")
        for _ in range(2):
            done = await run.end(await run.host.residency.unload("a", keep_warm=True))
            assert done.result["warm"] is True
            assert run.workers.device_bytes("sim-0") == 0
            assert state(run, "a") is InstanceState.WARM
        both = [
            await run.host.residency.unload("a", keep_warm=True),
            await run.host.residency.unload("a"),
        ]
        assert both[0].id != both[1].id
        for each in both:
            await run.end(each)
        assert state(run, "a") is None
        true(run)


async def test_an_unload_ends_a_swap_in(world: World) -> None:
    """A model that is unloaded while it is swapped in holds nothing after it; who waits loads it again."""
    async with world.host(budget=500, host_budget=1000) as run:
        await evicted(run, "a", "b")
        gate = run.workers.promote_gate("a")
        gate.close()
        request = run.infer("a", 30.0)
        await gate.reached()
        unload = await run.host.residency.unload("a")
        await settle()
        gate.open()
        await run.end(unload)
        assert await request == b"x"
        assert verbs(run, "a").count("load") == 2
        true(run)


async def test_a_cancelled_swap_in_leaves_the_model_warm(world: World) -> None:
    """Cancelling the LOAD of a warm model takes it back to where it was; the next load brings it."""
    async with world.host(budget=500, host_budget=1000) as run:
        await evicted(run, "a", "b")
        gate = run.workers.promote_gate("a")
        gate.close()
        operation = await run.host.residency.load("a")
        await gate.reached()
        run.host.residency.loads.cancel("a")
        gate.open()
        assert await run.ended(operation.id) is OperationState.CANCELLED
        assert state(run, "a") is InstanceState.WARM
        true(run)
        await run.load("a")
        assert verbs(run, "a").count("load") == 1


async def test_a_shrunk_budget_drops_copies(world: World) -> None:
    """UpdateSettings acts at once: copies go, the least recently used first, at last that of what stays on the device."""
    async with world.host(budget=500, host_budget=1200) as run:
        await evicted(run, "a", "b", "c")
        await run.host.update_settings(Settings(host_budget_bytes=800), ["host_budget_bytes"])
        await settle()
        assert set(run.workers.warm) == {"b"}
        await run.host.update_settings(Settings(host_budget_bytes=0), ["host_budget_bytes"])
        await settle()
        assert not run.workers.warm
        assert run.workers.image_bytes == 0
        assert state(run, "c") is InstanceState.READY
        await evicted(run, "b")
        assert not run.workers.warm
        assert run.workers.image_bytes == 0
        true(run)


async def test_keep_alive_of_each_tier(world: World) -> None:
    """A model leaves its device after `keep_alive` and host memory after `host_keep_alive`; 0 keeps no copy."""
    async with world.host(host_budget=2000) as run:
        await run.have("a", keep_alive_s=10.0, host_keep_alive_s=20.0)
        await run.have("b", keep_alive_s=10.0, host_keep_alive_s=0.0)
        for model in "ab":
            await run.load(model)
        await world.clock.advance(11.0)
        assert set(run.workers.warm) == {"a"}
        assert state(run, "b") is None
        await world.clock.advance(21.0)
        assert state(run, "a") is None
        assert "HOST_KEEP_ALIVE" in run.reasons("instances")
        true(run)


async def test_a_pinned_copy_stays(world: World) -> None:
    """A pinned model that was unloaded with its copy kept is not dropped for another one."""
    async with world.host(budget=500, host_budget=800) as run:
        await evicted(run, "a")
        await run.host.models.pin("a", pinned=True)
        await run.end(await run.host.residency.unload("a", keep_warm=True))
        await evicted(run, "b", "c")
        assert set(run.workers.warm) == {"a"}
        true(run)


async def test_a_deleted_model_leaves_no_copy(world: World) -> None:
    """DeleteModel frees host memory, too; a model that is only warm needs no `force`."""
    async with world.host(budget=500, host_budget=1000) as run:
        await evicted(run, "a", "b")
        await run.end(await run.host.models.delete("a", force=False))
        assert not run.workers.warm
        await run.end(await run.host.models.delete("b", force=True))
        assert not run.workers.image_bytes
        true(run)


async def test_a_forced_unload_waits_for_nobody(world: World) -> None:
    """With `force` requests in flight are cancelled; without it they are at the end of the drain timeout."""
    async with world.host(drain_timeout_s=3.0) as run:
        await run.have("a")
        for force in (True, False):
            await run.load("a")
            run.workers.infer_gate("a").close()
            request = run.infer("a")
            await run.workers.infer_gate("a").reached()
            unload = await run.host.residency.unload("a", force=force)
            await settle()
            assert request.done() == force
            with pytest.raises(ModelhostError) as caught:
                await request
            assert caught.value.reason is Reason.CANCELLED
            await run.end(unload)
            run.workers.infer_gate("a").open()
            assert not run.workers.resident


async def test_a_drain_is_hurried_on(world: World) -> None:
    """A forced unload of a model that drains already does not wait for its requests either."""
    async with world.host() as run:
        await run.have("a")
        await run.load("a")
        run.workers.infer_gate("a").close()
        request = run.infer("a")
        await run.workers.infer_gate("a").reached()
        first = await run.host.residency.unload("a")
        await settle()
        second = await run.host.residency.unload("a", force=True)
        for each in (first, second):
            await run.end(each)
        with pytest.raises(ModelhostError):
            await request
