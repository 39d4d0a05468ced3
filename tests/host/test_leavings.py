"""What a lost worker leaves in host memory: WARM to the host, adopted when it is wanted, and under the same rules."""

from dataclasses import replace
from pathlib import Path

import pytest

from modelhostd.core.host_tier import HEADROOM_BYTES, HOST
from modelhostd.core.resources import (
    Device,
    DeviceKind,
    Event,
    Health,
    InstanceState,
    Isolation,
    Kind,
    ModelConfig,
    Settings,
    Tier,
)
from modelhostd.core.state import Edit
from tests.fakes.clock import settle
from tests.host.support import Running, World
from tests.host.warm import evicted, state, true, verbs
from tests.support import DEADLINE_S


@pytest.fixture
async def world(tmp_path: Path) -> World:
    return World(tmp_path)


async def told(run: Running, reason: str, start: int) -> dict[str, Event]:
    """Return the last event of a reason since then, by model."""
    await run.host.registry.flush()
    events = await run.host.registry.journal.read(start)
    return {e.key.partition("/")[0]: e for e in events if e.reason == reason}


async def test_what_was_warm_stays_and_what_was_ready_comes_back(world: World) -> None:
    """Both keep instance and generation; the one that was READY is adopted at once, the other when it is wanted."""
    async with world.host(budget=500, host_budget=1000) as run:
        await evicted(run, "a", "b")
        run.workers.leavings.outliving = {"a", "b"}
        before = [run.host.registry.decided.instance_of(model) for model in "ab"]
        start = run.host.registry.journal.last_sequence + 1
        run.workers.crash("sim-0")
        assert state(run, "a") is InstanceState.WARM
        await world.clock.advance(1.0)
        assert state(run, "b") is InstanceState.READY
        true(run)
        crashed = await told(run, "CRASHED", start)
        assert {m: e.details["keptBytes"] for m, e in crashed.items()} == {"a": "400", "b": "400"}
        assert {e.resource.tier for e in crashed.values()} == {Tier.HOST}  # type: ignore[union-attr]
        details = (await told(run, "READY", start))["b"].details
        assert (details["adoptedBytes"], details["sourceTier"]) == ("400", "HOST")
        assert "loadSeconds" in details
        assert await run.infer("a", DEADLINE_S) == b"x"
        after = [run.host.registry.decided.instance_of(model) for model in "ab"]
        ids = [[(i.id, i.generation) for i in each if i] for each in (before, after)]
        assert ids[0] == ids[1]
        assert after[0] is not None
        assert after[0].health is Health.HEALTHY
        true(run)


async def test_what_does_not_hold_is_loaded_from_disk(world: World) -> None:
    """A checksum that does not hold costs a load, and whoever waits does not notice."""
    async with world.host(budget=500, host_budget=1000) as run:
        await evicted(run, "a", "b")
        run.workers.leavings.outliving, run.workers.leavings.damaged = {"a", "b"}, {"a", "b"}
        run.workers.crash("sim-0")
        assert await run.infer("b", DEADLINE_S) == b"x"
        assert await run.infer("a", DEADLINE_S) == b"x"
        for model in "ab":
            assert verbs(run, model)[-3:].count("unload") >= 1
            assert verbs(run, model).count("load") == 2
        true(run)


async def test_who_took_two_workers_down_leaves_nothing(world: World) -> None:
    """The image of a model that bears the blame twice is freed; it is loaded from disk into its own process."""
    async with world.host(budget=900, host_budget=1000) as run:
        for model in "ab":
            await run.have(model)
            await run.load(model)
        run.workers.leavings.outliving = {"a", "b"}
        for crashes in (1, 2):
            start = run.host.registry.journal.last_sequence + 1
            run.workers.crash("sim-0", blamed="a")
            await world.clock.advance(1.0)
            ready = await told(run, "READY", start)
            assert ("adoptedBytes" in ready["a"].details) == (crashes == 1)
            assert "adoptedBytes" in ready["b"].details
            true(run)
        instance = run.host.registry.decided.instance_of("a")
        assert instance is not None
        assert instance.isolation is Isolation.PROCESS
        assert not run.workers.leavings.left
        for _ in range(3):
            run.workers.crash("sim-0", model="a", blamed="a")
            await world.clock.advance(1.0)
        assert state(run, "a") is InstanceState.BLOCKED
        assert not run.workers.leavings.left
        true(run)


@pytest.mark.parametrize("why", ["budget", "keep alive", "unload", "config", "delete"])
async def test_it_goes_as_any_other_copy(world: World, why: str) -> None:
    """A smaller budget, time, an unload, another config or the end of its model free it, and the ledger knows."""
    async with world.host(budget=500, host_budget=1000) as run:
        await evicted(run, "a", "b")
        run.workers.leavings.outliving = {"a"}
        run.workers.crash("sim-0")
        assert state(run, "a") is InstanceState.WARM
        match why:
            case "budget":
                settings = Settings(host_budget_bytes=500)
                await run.host.update_settings(settings, ["host_budget_bytes"])
            case "keep alive":
                settings = Settings(host_keep_alive_s=5.0)
                await run.host.update_settings(settings, ["host_keep_alive_s"])
                await world.clock.advance(6.0)
            case "unload":
                await run.end(await run.host.residency.unload("a"))
            case "config":
                config = ModelConfig(precision="fp16")
                await run.host.models.update("a", lambda s: replace(s, config=config))
            case "delete":
                await run.end(await run.host.models.delete("a", force=True))
        await world.clock.advance(1.0)
        assert not run.workers.leavings.left
        assert run.host.occupancy.host.held_bytes("a") == 0
        true(run)


async def test_on_the_cpu_it_is_counted_once(world: World) -> None:
    """Until it is adopted its bytes are host memory's; from then on the device's, where the weights are views of it."""
    gib = 1 << 30
    async with world.host(host_budget=1000) as run:
        cpu = Device("cpu", DeviceKind.CPU, "cpu", "cpu", total_bytes=4 * gib, budget_bytes=gib)
        run.host.registry.record([Edit(Kind.DEVICE, "cpu", cpu, "FOUND")])
        await run.have("a", device="cpu")
        await run.end(await run.host.residency.load("a", device="cpu"))
        run.workers.leavings.outliving = {"a"}
        ledger, gate = run.host.occupancy.ledger, run.workers.load_gate("a")
        assert (ledger.used("cpu"), ledger.used(HOST)) == (400, 0)
        gate.close()
        run.workers.crash("cpu")
        await settle()
        assert (state(run, "a"), run.workers.unowned_bytes()) == (InstanceState.LOADING, 400)
        assert (ledger.used("cpu"), ledger.used(HOST)) == (400, 0)
        run.host.residency.loads.cancel("a")
        await settle()
        assert (state(run, "a"), run.workers.unowned_bytes()) == (InstanceState.WARM, 400)
        assert (ledger.used("cpu"), ledger.used(HOST)) == (0, 400)
        gate.open()
        assert await run.infer("a", DEADLINE_S) == b"x"
        assert (ledger.used("cpu"), ledger.used(HOST)) == (400, 0)
        assert verbs(run, "a") == ["load", "load", "load"]


@pytest.mark.parametrize("budget", [0, 1000])
async def test_where_the_machine_is_short_of_memory_what_was_left_goes(
    world: World, budget: int
) -> None:
    """Of what a worker left as much goes as the machine has not, whatever the budget; the last used stay and are adopted."""
    async with world.host(devices=1, host_budget=budget) as run:
        total = 4 << 30
        cpu = Device("cpu", DeviceKind.CPU, "cpu", "cpu", total_bytes=total, budget_bytes=1 << 30)
        run.host.registry.record([Edit(Kind.DEVICE, "cpu", cpu, "FOUND")])
        for model in "abc":
            await run.have(model, device="cpu")
            await run.load(model)
            await world.clock.advance(1.0)
        run.workers.leavings.outliving = set("abc")
        run.host.occupancy.foreign["cpu"] = total - HEADROOM_BYTES - 800
        run.workers.crash("cpu")
        await world.clock.advance(1.0)
        assert [verbs(run, model) for model in "bc"] == [["load", "load"]] * 2
        assert run.workers.leavings.taken_models == {"b", "c"}
        details = (await told(run, "OVER_HOST_BUDGET", 1))["a"].details
        assert {"overBytes": "400", "freedBytes": "400"}.items() <= details.items()
        run.host.occupancy.foreign["cpu"] = 0
        assert await run.infer("a", DEADLINE_S) == b"x"
        assert run.workers.leavings.taken_models == {"b", "c"}
        ledger = run.host.occupancy.ledger
        assert (ledger.used("cpu"), ledger.used(HOST)) == (1200, 0)
