"""Warm copies: what leaves its device stays in host memory while it may, and comes back from there."""

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.host_tier import HOST
from modelhostd.core.resources import (
    Instance,
    InstanceState,
    ModelConfig,
    OperationState,
    Settings,
    Tier,
)
from tests.fakes.clock import settle
from tests.fakes.workers import not_loaded, worker_lost
from tests.host.support import Running, World


@pytest.fixture
async def world(tmp_path: Path) -> World:
    return World(tmp_path)


def verbs(run: Running, model: str) -> list[str]:
    """What the workers did with a model, requests left out."""
    return [verb for verb, _, name, _ in run.workers.log if name == model and verb != "infer"]


def state(run: Running, model: str) -> InstanceState | None:
    instance = run.host.registry.decided.instance_of(model)
    return instance.state if instance is not None else None


def true(run: Running) -> None:
    """Assert that the ledger is what the workers hold, of the device and of host memory."""
    ledger = run.host.occupancy.ledger
    assert ledger.used("sim-0") == run.workers.device_bytes("sim-0")
    assert ledger.used(HOST) == run.workers.image_bytes
    assert set(run.host.occupancy.host.warm) == set(run.workers.warm)


async def evicted(run: Running, *models: str) -> None:
    """Have models of which each one that is loaded takes the place of the one before."""
    for model in models:
        if model not in run.host.registry.decided.models:
            await run.have(model)
        await run.load(model)
        await run.world.clock.advance(1.0)


async def test_what_is_evicted_stays_warm_and_comes_back(world: World) -> None:
    """An evicted model keeps its copy, and its next request brings that back: the same instance, no load."""
    async with world.host(budget=500, host_budget=1000) as run:
        await evicted(run, "a")
        before = run.host.registry.decided.instance_of("a")
        await evicted(run, "b")
        warm = run.host.registry.decided.instance_of("a")
        assert before is not None
        assert warm is not None
        assert (warm.state, warm.tier, warm.host_bytes) == (InstanceState.WARM, Tier.HOST, 400)
        true(run)
        assert await run.infer("a", 5.0) == b"x"
        after = run.host.registry.decided.instance_of("a")
        assert after is not None
        assert (after.id, after.generation) == (before.id, before.generation)
        assert (after.state, after.tier) == (InstanceState.READY, Tier.DEVICE)
        assert verbs(run, "a") == ["load", "demote", "promote"]
        assert set(run.workers.warm) == {"b"}
        true(run)


async def test_an_eviction_says_where_its_victim_went(world: World) -> None:
    """The event names victim, cause, bytes, policy, who stayed, and the tier after it."""
    async with world.host(budget=900, host_budget=900) as run:
        await evicted(run, "a", "b", "c")
        events = run.host.registry.journal._ring.read(1, 10_000) or ()
        found = [e for e in events if e.reason == "EVICTED"]
        states = [e.resource.state for e in found if isinstance(e.resource, Instance)]
        assert states == [InstanceState.DRAINING, InstanceState.WARM]
        expected = {"for": "c", "freedBytes": "400", "policy": "lru", "kept": "b"}
        for event in found:
            assert {**expected, "tierAfter": "HOST"}.items() <= event.details.items()
            assert event.key.startswith("a/")
        assert found[-1].details["hostBytes"] == "400"
        await evicted(run, "d")
        dropped = [
            e
            for e in run.host.registry.journal._ring.read(1, 10_000) or ()
            if e.reason == "EVICTED_FROM_HOST"
        ]
        assert [e.details["tierAfter"] for e in dropped] == ["DISK"] * 4
        assert dropped[-1].resource is None
        assert dropped[-1].details["for"] == "d"


async def test_the_least_recently_used_copy_makes_room(world: World) -> None:
    """Host memory short of room loses the copy used longest ago; what is on the device keeps its own."""
    async with world.host(budget=500, host_budget=1200) as run:
        await evicted(run, "a", "b", "c")
        assert set(run.workers.warm) == {"a", "b"}
        await evicted(run, "d")
        assert set(run.workers.warm) == {"b", "c"}
        assert run.host.registry.decided.instance_of("a") is None
        assert run.host.occupancy.ledger.used(HOST) == 1200
        true(run)


async def test_a_copy_that_finds_no_room_is_not_kept(world: World) -> None:
    """A model larger than host memory's budget, or that finds it held, loads without a copy and goes to disk."""
    async with world.host(budget=500, host_budget=300) as run:
        await evicted(run, "a", "b")
        assert not run.workers.warm
        assert state(run, "a") is None
        assert run.host.occupancy.ledger.used(HOST) == 0
        await run.host.update_settings(Settings(host_budget_bytes=400), ["host_budget_bytes"])
        await evicted(run, "a", "b")
        assert set(run.workers.warm) == set()
        await run.host.update_settings(Settings(host_budget_bytes=800), ["host_budget_bytes"])
        await evicted(run, "a", "b")
        assert set(run.workers.warm) == {"a"}
        true(run)


async def test_a_swap_in_waits_for_no_load_from_disk(world: World) -> None:
    """With every place for loads taken, a warm model comes back all the same."""
    async with world.host(budget=1000, host_budget=2000) as run:
        await run.host.update_settings(Settings(max_concurrent_loads=1), ["max_concurrent_loads"])
        await run.have("slow")
        await run.have("next")
        await run.have("a")
        await run.load("a")
        await run.end(await run.host.residency.unload("a", keep_warm=True))
        gate = run.workers.load_gate("slow")
        gate.close()
        loads = [await run.host.residency.load(m) for m in ("slow", "next")]
        await gate.reached()
        assert await run.infer("a", 1.0) == b"x"
        assert state(run, "next") is InstanceState.QUEUED
        gate.open()
        for load in loads:
            await run.end(load)


async def test_requests_wait_for_a_swap_in(world: World) -> None:
    """Requests that come while a model is being swapped in are answered by it, none fails."""
    async with world.host(budget=500, host_budget=1000) as run:
        await evicted(run, "a", "b")
        gate = run.workers.promote_gate("a")
        gate.close()
        requests = [run.infer("a", 30.0) for _ in range(5)]
        await gate.reached()
        assert state(run, "a") is InstanceState.LOADING
        requests += [run.infer("a", 30.0) for _ in range(5)]
        gate.open()
        assert await asyncio.gather(*requests) == [b"x"] * 10
        assert verbs(run, "a").count("promote") == 1


@pytest.mark.parametrize(
    "error", [not_loaded("a"), worker_lost("sim-0", "gone")], ids=["not loaded", "worker lost"]
)
async def test_a_lost_copy_is_loaded_from_disk(world: World, error: ModelhostError) -> None:
    """Where the worker has no copy any more the model comes from disk, and who waits does not notice."""
    async with world.host(budget=500, host_budget=1000) as run:
        await evicted(run, "a", "b")
        before = run.host.registry.decided.instance_of("a")
        run.workers.promote_errors["a"] = error
        assert await run.infer("a", 5.0) == b"x"
        after = run.host.registry.decided.instance_of("a")
        assert before is not None
        assert after is not None
        assert after.generation > before.generation
        assert verbs(run, "a").count("load") == 2
        true(run)


async def test_a_crash_takes_the_warm_copies_along(world: World) -> None:
    """Copies of a worker that died are gone and told of; they are not loaded again, what was READY is."""
    async with world.host(budget=500, host_budget=1000) as run:
        await evicted(run, "a", "b")
        run.workers.crash("sim-0")
        await world.clock.advance(1.0)
        assert state(run, "a") is None
        assert state(run, "b") is InstanceState.READY
        events = run.host.registry.journal._ring.read(1, 10_000) or ()
        crashed = [e.key.partition("/")[0] for e in events if e.reason == "CRASHED"]
        assert sorted(crashed) == ["a", "b"]
        true(run)
        assert await run.infer("a", 5.0) == b"x"


async def test_a_crash_during_the_swap_in_costs_a_load(world: World) -> None:
    """A worker that dies while it swaps a model in loses that, and the request is served after a load."""
    async with world.host(budget=500, host_budget=1000) as run:
        await evicted(run, "a", "b")
        gate = run.workers.promote_gate("a")
        gate.close()
        request = run.infer("a", 30.0)
        await gate.reached()
        run.workers.crash("sim-0")
        assert await request == b"x"
        await world.clock.advance(1.0)
        true(run)


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
    """UpdateSettings acts at once: copies go, the least recently used first, those on the device stay."""
    async with world.host(budget=500, host_budget=1200) as run:
        await evicted(run, "a", "b", "c")
        await run.host.update_settings(Settings(host_budget_bytes=800), ["host_budget_bytes"])
        await settle()
        assert set(run.workers.warm) == {"b"}
        await run.host.update_settings(Settings(host_budget_bytes=0), ["host_budget_bytes"])
        await settle()
        assert not run.workers.warm
        assert run.workers.image_bytes == 400
        await evicted(run, "b")
        assert not run.workers.warm
        assert run.workers.image_bytes == 0


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


async def test_a_copy_of_something_else_is_no_use(world: World) -> None:
    """A warm copy goes when its model's files or config are others now, and a load takes those."""
    async with world.host(budget=500, host_budget=1000) as run:
        await evicted(run, "a", "b")
        await run.host.models.update(
            "a", lambda s: replace(s, config=ModelConfig(precision="fp16"))
        )
        await run.load("a")
        assert verbs(run, "a")[-1] == "load"
        await evicted(run, "b")
        await run.host.models.update("a", lambda s: replace(s, config=ModelConfig()))
        await world.clock.advance(1.0)
        assert state(run, "a") is None
        assert "OUTDATED" in run.reasons("instances")
        true(run)


async def test_a_reload_of_a_warm_model_is_a_load(world: World) -> None:
    """ReloadModel replaces a warm copy by a load from disk."""
    async with world.host(budget=500, host_budget=1000) as run:
        await evicted(run, "a", "b")
        await run.end(await run.host.reloads.reload("a"))
        assert verbs(run, "a").count("load") == 2
        assert state(run, "a") is InstanceState.READY
        true(run)


async def test_a_deleted_model_leaves_no_copy(world: World) -> None:
    """A forced DeleteModel frees host memory, too."""
    async with world.host(budget=500, host_budget=1000) as run:
        await evicted(run, "a", "b")
        await run.end(await run.host.models.delete("a", force=True))
        assert not run.workers.warm
        true(run)


async def test_a_copy_comes_back_to_its_own_device(world: World) -> None:
    """Of two devices a warm model takes the one that its copy belongs to; asked for elsewhere it is loaded."""
    async with world.host(devices=2, host_budget=2000) as run:
        await run.have("a")
        await run.end(await run.host.residency.load("a", device="sim-1"))
        await run.end(await run.host.residency.unload("a", keep_warm=True))
        await run.load("a")
        assert run.workers.resident["a"][0] == "sim-1"
        await run.end(await run.host.residency.unload("a", keep_warm=True))
        await run.end(await run.host.residency.load("a", device="sim-0"))
        assert run.workers.resident["a"][0] == "sim-0"
        assert not run.workers.warm
        assert run.host.occupancy.ledger.used(HOST) == run.workers.image_bytes


async def test_no_memory_for_a_swap_in_leaves_the_model_warm(world: World) -> None:
    """A swap-in that finds no memory on its device is refused with a type; the copy stays."""
    async with world.host(budget=500, host_budget=1000) as run:
        await evicted(run, "a", "b")
        run.workers.promote_errors["a"] = ModelhostError(
            Reason.OUT_OF_DEVICE_MEMORY, "no", {"model": "a"}
        )
        with pytest.raises(ModelhostError) as caught:
            await run.infer("a", 5.0)
        assert caught.value.reason is Reason.OUT_OF_DEVICE_MEMORY
        assert state(run, "a") is InstanceState.WARM
        true(run)


async def test_a_forced_unload_waits_for_nobody(world: World) -> None:
    """With `force` requests in flight are cancelled; without it they are at the end of the drain timeout."""
    async with world.host() as run:
        await run.have("a")
        for force in (True, False):
            await run.load("a")
            run.workers.infer_gate("a").close()
            request = run.infer("a")
            await run.workers.infer_gate("a").reached()
            unload = await run.host.residency.unload("a", force=force)
            await settle()
            assert request.done() == force
            if not force:
                await world.clock.advance(31.0)
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
