"""Copies in host memory of models that are on a device: they go when host memory is short, and the models serve on."""

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest

from modelhostd.core.host_tier import HEADROOM_BYTES, HOST
from modelhostd.core.resources import (
    Device,
    DeviceKind,
    Event,
    Instance,
    InstanceState,
    Kind,
    Settings,
    Tier,
)
from modelhostd.core.state import Edit
from tests.fakes.clock import settle
from tests.host.support import Running, World
from tests.host.warm import evicted, state, true, verbs


@pytest.fixture
async def world(tmp_path: Path) -> World:
    return World(tmp_path)


async def shrink(run: Running, size: int) -> None:
    """Set host memory's budget, and let what is begun for it end."""
    await run.host.update_settings(Settings(host_budget_bytes=size), ["host_budget_bytes"])
    await settle()


async def told(run: Running, reason: str) -> Sequence[Event]:
    """Return the events of a reason so far."""
    await run.host.registry.flush()
    return [e for e in run.host.registry.journal._ring.read(1, 10_000) or () if e.reason == reason]


async def test_the_copy_goes_and_its_model_answers_on(world: World) -> None:
    """A budget that became smaller takes the copy used longest ago; its model stays READY, and the event says all of it."""
    async with world.host(budget=1000, host_budget=800) as run:
        await evicted(run, "a", "b")
        gate = run.workers.infer_gate("a")
        gate.close()
        request = run.infer("a")
        await gate.reached()
        await run.infer("b")
        await shrink(run, 400)
        gate.open()
        assert await request == b"x"
        assert state(run, "a") is InstanceState.READY
        assert verbs(run, "a") == ["load", "drop_copy"]
        (event,) = await told(run, "OVER_HOST_BUDGET")
        expected = {"overBytes": "400", "freedBytes": "400", "policy": "lru", "kept": "b"}
        assert {**expected, "tierAfter": "DEVICE"}.items() <= event.details.items()
        assert isinstance(event.resource, Instance)
        assert (event.resource.model, event.resource.host_bytes) == ("a", 0)
        assert event.resource.tier is Tier.DEVICE
        assert run.host.occupancy.ledger.used(HOST) == 400
        true(run)


async def test_without_its_copy_a_model_leaves_its_device_for_disk(world: World) -> None:
    """PlanLoad, the eviction's event and what happens say the same; the next load from disk makes a copy again."""
    async with world.host(budget=500, host_budget=800) as run:
        await evicted(run, "a")
        await run.have("b")
        assert run.host.residency.loads.preview("b").stays_warm == {"a"}
        await shrink(run, 0)
        await shrink(run, 800)
        assert run.host.residency.loads.preview("b").stays_warm == set()
        await evicted(run, "b")
        assert state(run, "a") is None
        assert {e.details["tierAfter"] for e in await told(run, "EVICTED")} == {"DISK"}
        await evicted(run, "a")
        assert verbs(run, "a") == ["load", "drop_copy", "unload", "load"]
        assert set(run.workers.warm) == {"b"}
        assert run.workers.image_bytes == 800
        true(run)


async def test_a_copy_makes_room_for_a_more_recent_one(world: World) -> None:
    """A load that fits on its device takes the place in host memory of the copy used longest ago, and says for whom."""
    async with world.host(budget=1500, host_budget=800) as run:
        await evicted(run, "a", "b")
        await run.have("c")
        assert list(run.host.residency.loads.preview("c").dropped) == ["a"]
        gate = run.workers.copy_gate("a")
        gate.close()
        load = await run.host.residency.load("c")
        await gate.reached()
        assert state(run, "c") is InstanceState.QUEUED
        assert await run.infer("a", 1.0) == b"x"
        gate.open()
        await run.end(load)
        (event,) = await told(run, "EVICTED_FROM_HOST")
        assert {"for": "c", "neededBytes": "400"}.items() <= event.details.items()
        assert event.key.startswith("a/")
        assert run.host.occupancy.ledger.of(HOST) == {"b": 400, "c": 400}
        true(run)


async def test_pins_and_leases_hold_what_is_warm_and_not_what_is_beside(world: World) -> None:
    """A pinned or leased model keeps its device, so its copy may go; pinned on no device, it keeps its copy."""
    async with world.host(budget=1000, host_budget=1200) as run:
        await evicted(run, "a", "b")
        await run.host.models.pin("a", pinned=True)
        await run.host.leases.acquire("b", 60.0, "me")
        await shrink(run, 0)
        assert run.workers.image_bytes == 0
        assert set(run.workers.resident) == {"a", "b"}
        true(run)
        await shrink(run, 1200)
        await run.host.models.pin("a", pinned=False)
        await run.end(await run.host.residency.unload("a"))
        await evicted(run, "a")
        await run.end(await run.host.residency.unload("a", keep_warm=True))
        await run.host.models.pin("a", pinned=True)
        await evicted(run, "c", "d")
        assert set(run.workers.warm) == {"a", "c"}
        await shrink(run, 400)
        assert set(run.workers.warm) == {"a"}
        true(run)


async def test_what_others_take_of_the_machine_is_taken_from_copies(world: World) -> None:
    """Where other processes need the memory copies go within a moment, as many as must; nothing stops, nothing is unloaded."""
    async with world.host(budget=1000, host_budget=800) as run:
        total = 4 << 30
        cpu = Device("cpu", DeviceKind.CPU, "cpu", "cpu", total_bytes=total, budget_bytes=1 << 30)
        run.host.registry.record([Edit(Kind.DEVICE, "cpu", cpu, "FOUND")])
        for model in "ab":
            await run.have(model, device="sim-0")
        await evicted(run, "a", "b")
        for left, copies in ((799, {"b": 400}), (0, {})):
            run.host.occupancy.foreign["cpu"] = total - HEADROOM_BYTES - left
            await world.clock.advance(0.5)
            assert run.host.occupancy.ledger.of(HOST) == copies
        assert {state(run, model) for model in "ab"} == {InstanceState.READY}
        assert [verbs(run, model) for model in "ab"] == [["load", "drop_copy"]] * 2
        true(run)


async def test_a_copy_that_would_not_be_kept_goes_at_once(world: World) -> None:
    """A `host_keep_alive` that becomes 0 takes the copy of a model on its device as well as a warm one."""
    async with world.host(budget=500, host_budget=800) as run:
        await evicted(run, "a", "b")
        settings = Settings(host_keep_alive_s=0.0)
        await run.host.update_settings(settings, ["host_keep_alive_s"])
        await world.clock.advance(1.0)
        assert (state(run, "a"), state(run, "b")) == (None, InstanceState.READY)
        assert run.workers.image_bytes == 0
        event = (await told(run, "HOST_KEEP_ALIVE"))[-1]
        assert event.key.startswith("b/")
        assert {"freedBytes": "400", "tierAfter": "DEVICE"}.items() <= event.details.items()
        true(run)


async def test_an_eviction_meanwhile_takes_all(world: World) -> None:
    """A model that is to leave its device while its copy goes is unloaded whole, whichever ends first."""
    async with world.host(budget=500, host_budget=800) as run:
        await evicted(run, "a")
        gate = run.workers.copy_gate("a")
        gate.close()
        await shrink(run, 0)
        await gate.reached()
        assert run.host.occupancy.ledger.used(HOST) == 400
        await evicted(run, "b")
        assert state(run, "a") is None
        assert verbs(run, "a") == ["load", "unload"]
        gate.open()
        await settle()
        assert run.workers.image_bytes == run.host.occupancy.ledger.used(HOST) == 0
        true(run)


async def test_a_crash_meanwhile_leaves_nothing_to_adopt(world: World) -> None:
    """A copy on its way out does not outlive its worker: the model comes back from disk, and the books are true."""
    async with world.host(budget=1000, host_budget=800) as run:
        await evicted(run, "a", "b")
        run.workers.leavings.outliving = {"a", "b"}
        gate = run.workers.copy_gate("a")
        gate.close()
        await shrink(run, 400)
        await gate.reached()
        run.workers.crash("sim-0")
        gate.open()
        await world.clock.advance(1.0)
        assert verbs(run, "a") == ["load", "load"]
        assert run.workers.image_bytes <= 400
        assert {state(run, m) for m in "ab"} == {InstanceState.READY}
        true(run)


async def test_a_crash_before_the_worker_is_told_leaves_a_copy_as_any_other(world: World) -> None:
    """It is adopted, the model leaves its device for host memory again, and the copy may go later."""
    async with world.host(budget=1000, host_budget=800) as run:
        await evicted(run, "a", "b")
        run.workers.leavings.outliving = {"a", "b"}
        run.host.residency._retiring.drop_copy("a", "OVER_HOST_BUDGET", {})
        run.workers.crash("sim-0")
        await world.clock.advance(1.0)
        assert {state(run, m) for m in "ab"} == {InstanceState.READY}
        assert await told(run, "OVER_HOST_BUDGET") == []
        route = run.host.routes.get("a")
        assert route is not None
        assert run.host.occupancy.host.keeps(route)
        true(run)
        await shrink(run, 0)
        assert run.workers.image_bytes == 0
        true(run)


async def test_a_copy_that_something_holds_counts_until_its_model_goes(world: World) -> None:
    """What a worker cannot give back stays in the ledger; it is not asked again, another copy goes in its place."""
    async with world.host(budget=1000, host_budget=800) as run:
        run.workers.stuck = {"a"}
        await evicted(run, "a", "b")
        await shrink(run, 400)
        await world.clock.advance(2.0)
        assert run.host.occupancy.ledger.of(HOST) == {"a": 400}
        assert verbs(run, "b") == ["load", "drop_copy"]
        instance = run.host.registry.decided.instance_of("a")
        assert instance is not None
        assert instance.host_bytes == 400
        true(run)
        await shrink(run, 0)
        await evicted(run, "c", "d")
        assert state(run, "a") is None
        assert run.host.occupancy.ledger.used(HOST) == 0
        true(run)


async def test_many_copies_go_at_a_time_and_none_too_many(world: World) -> None:
    """While enough is on its way out nothing else goes, however long that takes."""
    async with world.host(budget=2000, host_budget=1600) as run:
        await evicted(run, "a", "b", "c", "d")
        for model in "ab":
            run.workers.copy_gate(model).close()
        await shrink(run, 800)
        await world.clock.advance(2.0)
        assert run.workers.image_bytes == 1600
        for model in "ab":
            run.workers.copy_gate(model).open()
        await world.clock.advance(1.0)
        assert run.host.occupancy.ledger.of(HOST) == {"c": 400, "d": 400}
        answers = [run.infer(model, 1.0) for model in "abcd"]
        assert await asyncio.gather(*answers) == [b"x"] * 4
        true(run)
