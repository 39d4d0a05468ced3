"""Warm copies: what leaves its device stays in host memory while it may, and comes back from there."""

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.host_tier import HEADROOM_BYTES, HOST
from modelhostd.core.resources import (
    Device,
    DeviceKind,
    Instance,
    InstanceState,
    Isolation,
    Kind,
    ModelConfig,
    Settings,
    Tier,
)
from modelhostd.core.state import Edit
from tests.fakes.clock import settle
from tests.fakes.workers import not_loaded, worker_lost
from tests.host.support import World
from tests.host.warm import evicted, state, true, verbs
from tests.support import DEADLINE_S


@pytest.fixture
async def world(tmp_path: Path) -> World:
    return World(tmp_path)


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
        assert await run.infer("a", DEADLINE_S) == b"x"
        after = run.host.registry.decided.instance_of("a")
        assert after is not None
        assert (after.id, after.generation) == (before.id, before.generation)
        assert (after.state, after.tier) == (InstanceState.READY, Tier.DEVICE)
        assert verbs(run, "a") == ["load", "demote", "promote"]
        assert set(run.workers.warm) == {"b"}
        true(run)


async def test_an_eviction_says_where_its_victim_went(world: World) -> None:
    """One event names victim, cause, bytes, policy, who stays, and the tier after it; another that the memory is free."""
    async with world.host(budget=900, host_budget=900) as run:
        await evicted(run, "a", "b", "c")
        events = run.host.registry.journal._ring.read(1, 10_000) or ()
        found = [e for e in events if "EVICTED" in (e.reason, e.details.get("cause"))]
        states = [e.resource.state for e in found if isinstance(e.resource, Instance)]
        assert states == [InstanceState.DRAINING, InstanceState.WARM]
        expected = {"for": "c", "freedBytes": "400", "policy": "lru", "kept": "b"}
        assert {**expected, "tierAfter": "HOST"}.items() <= found[0].details.items()
        assert found[1].details == {"cause": "EVICTED", "tierAfter": "HOST", "hostBytes": "400"}
        assert [e.key.partition("/")[0] for e in found] == ["a", "a"]
        await evicted(run, "d")
        dropped = [
            e
            for e in run.host.registry.journal._ring.read(1, 10_000) or ()
            if "EVICTED_FROM_HOST" in (e.reason, e.details.get("cause"))
        ]
        assert [e.details["tierAfter"] for e in dropped] == ["DISK"] * 4
        told = [(e.reason, e.details.get("for"), e.resource is None) for e in dropped]
        whole = [("EVICTED_FROM_HOST", "c", False), ("DRAINED", None, True)]
        assert told == [*whole, ("EVICTED_FROM_HOST", "d", False), ("DRAINED", None, True)]


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
        assert await run.infer("a", DEADLINE_S) == b"x"
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
        assert await run.infer("a", DEADLINE_S) == b"x"


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


async def test_a_copy_that_was_lost_and_cannot_be_replaced_leaves_nothing_queued(
    world: World,
) -> None:
    """A swap-in that loses its worker while the budget shrank below the model is refused; no instance waits for ever."""
    async with world.host(budget=500, host_budget=1000) as run:
        await evicted(run, "a", "b")
        gate = run.workers.promote_gate("a")
        gate.close()
        request = run.infer("a", 30.0)
        await gate.reached()
        await run.host.residency.set_budget("sim-0", 200)
        run.workers.crash("sim-0")
        with pytest.raises(ModelhostError) as caught:
            await request
        assert caught.value.reason is Reason.MODEL_TOO_LARGE
        assert state(run, "a") in (None, InstanceState.FAILED)
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
            await run.infer("a", DEADLINE_S)
        assert caught.value.reason is Reason.OUT_OF_DEVICE_MEMORY
        assert state(run, "a") is InstanceState.WARM
        true(run)


async def test_no_memory_is_held_for_a_copy_that_is_not_kept(world: World) -> None:
    """A model whose `host_keep_alive` is 0 has no copy in host memory from the start, and displaces none."""
    async with world.host(budget=500, host_budget=800) as run:
        await evicted(run, "a", "b")
        await run.have("c", host_keep_alive_s=0.0)
        await run.load("c")
        assert set(run.workers.warm) == {"a", "b"}
        assert run.workers.image_bytes == 800
        true(run)


async def test_the_machine_has_the_last_word(world: World) -> None:
    """Memory that other processes and models on the CPU take shrinks what copies may: the oldest go."""
    gib = 1 << 30
    async with world.host(budget=500, host_budget=1200) as run:
        cpu = Device("cpu", DeviceKind.CPU, "cpu", "cpu", total_bytes=4 * gib, budget_bytes=gib)
        run.host.registry.record([Edit(Kind.DEVICE, "cpu", cpu, "FOUND")])
        for model in "abc":
            await run.have(model, device="sim-0")
        await evicted(run, "a", "b", "c")
        host = run.host.occupancy.host
        assert host.capacity_bytes == host.budget_bytes == 1200
        run.host.occupancy.foreign["cpu"] = 4 * gib - HEADROOM_BYTES - 900
        assert host.capacity_bytes == 900
        run.host.residency.enforce_budgets()
        await settle()
        assert set(run.workers.warm) == {"b"}
        true(run)


async def test_a_copy_belongs_to_its_own_worker(world: World) -> None:
    """A crash takes along the copies of that worker alone: not of a model that has a process of its own."""
    async with world.host(host_budget=2000) as run:
        await run.have("own", isolation=Isolation.PROCESS)
        await run.have("shared")
        for model in ("own", "shared"):
            await run.load(model)
            await run.end(await run.host.residency.unload(model, keep_warm=True))
        run.workers.crash("sim-0")
        await settle()
        assert set(run.host.occupancy.host.warm) == {"own"}
        true(run)
        run.workers.crash("sim-0", model="own")
        await settle()
        assert not run.host.occupancy.host.warm
        true(run)
        assert await run.infer("own", DEADLINE_S) == b"x"
