"""Health of instances: canaries, requests, reloads of the sick."""

import asyncio
import contextlib
from collections import Counter
from pathlib import Path

import pytest

from modelhostd.core.errors import ModelhostError, Reason, invalid
from modelhostd.core.health import RELOAD_WINDOW_S, WINDOW_MIN
from modelhostd.core.resources import Health, Instance, InstanceState
from tests.fakes.clock import settle
from tests.fakes.devices import FakeDevices
from tests.host.support import BUDGET, Running, World
from tests.support import DEADLINE_S, wait_until_async

INTERVAL_S = 60.0
FAULT = ModelhostError(Reason.INFERENCE_FAILED, "no", {"model": "a"})


@pytest.fixture
async def world(tmp_path: Path) -> World:
    return World(tmp_path)


def instance(run: Running, model: str = "a") -> Instance:
    found = run.host.registry.decided.instance_of(model)
    assert found is not None
    return found


def count_canaries(run: Running) -> Counter[str]:
    """Count the checks that workers are asked for, by instance."""
    seen: Counter[str] = Counter()
    check = run.workers.check

    async def counted(device: str, name: str, generation: int) -> tuple[Health, str]:
        seen[name] += 1
        return await check(device, name, generation)

    run.workers.check = counted  # type: ignore[method-assign]
    return seen


async def told(run: Running, reason: str) -> list[dict[str, str]]:
    """Return the details of the events of a reason."""
    await run.host.registry.flush()
    events = await run.host.registry.journal.read(1)
    return [dict(e.details) for e in events if e.reason == reason]


async def requests(run: Running, count: int) -> None:
    """Send requests, whatever becomes of them."""
    for _ in range(count):
        with contextlib.suppress(ModelhostError):
            await run.host.inference.infer("a", "", b"x", DEADLINE_S)


async def test_idle_instances_get_canaries_and_that_is_no_use(world: World) -> None:
    """One about each interval; last use stays, and keep_alive ends an instance that had nothing else."""
    async with world.host() as run:
        await run.have("a", keep_alive_s=10 * INTERVAL_S)
        await run.load("a")
        seen = count_canaries(run)
        last_used = run.host.routes.get("a").last_used  # type: ignore[union-attr]
        await world.clock.advance(5 * INTERVAL_S)
        assert 4 <= sum(seen.values()) <= 6
        assert run.host.routes.get("a").last_used == last_used  # type: ignore[union-attr]
        await world.clock.advance(5 * INTERVAL_S + 1.0)
        assert run.host.routes.get("a") is None
        assert not await told(run, "HEALTH")


async def test_no_interval_means_no_canary(world: World) -> None:
    """0 switches the schedule off; CheckInstance works all the same."""
    async with world.host(health_interval_s=0.0) as run:
        await run.have("a")
        await run.load("a")
        seen = count_canaries(run)
        await world.clock.advance(10 * INTERVAL_S)
        assert not seen
        assert (await run.host.health.check("a"))[0] is Health.HEALTHY
        assert sum(seen.values()) == 1


async def test_a_busy_instance_is_left_to_its_requests(world: World) -> None:
    """While a request is in flight in it and nobody knows what a canary takes, none is sent."""
    async with world.host() as run:
        await run.have("a")
        await run.load("a")
        seen = count_canaries(run)
        gate = run.workers.infer_gate("a")
        gate.close()
        request = run.infer("a")
        await gate.reached()
        await world.clock.advance(5 * INTERVAL_S)
        assert not seen
        gate.open()
        await request
        await world.clock.advance(2.0)
        assert sum(seen.values()) == 1


async def test_a_canary_that_stood_behind_a_request_says_nothing(world: World) -> None:
    """One without an answer in time is no reason to reload while a long request is in flight."""
    async with world.host(health_interval_s=0.0) as run:
        await run.have("a")
        await run.load("a")
        gate = run.workers.infer_gate("a")
        gate.close()
        request = run.infer("a")
        await gate.reached()

        async def late(device: str, name: str, generation: int) -> tuple[Health, str]:
            await world.clock.sleep(30.0)
            return Health.UNHEALTHY, "The health check was not answered within 30 s."

        run.workers.check = late  # type: ignore[method-assign]
        check = asyncio.ensure_future(run.host.health.check("a"))
        await world.clock.advance(31.0)
        assert (await check)[0] is Health.UNKNOWN
        await world.clock.advance(5.0)
        assert instance(run).health is Health.HEALTHY
        gate.open()
        await request
        check = asyncio.ensure_future(run.host.health.check("a"))
        await world.clock.advance(31.0)
        assert (await check)[0] is Health.UNHEALTHY


async def test_a_sick_instance_is_reloaded_and_its_events_say_why(world: World) -> None:
    """HEALTH tells the canary's words, UNHEALTHY takes it out of service, a new one is READY; none is refused."""
    async with world.host() as run:
        await run.have("a")
        await run.load("a")
        old = instance(run)
        run.workers.healths["a"] = (Health.UNHEALTHY, "wrong numbers")
        gate = run.workers.load_gate("a")
        gate.close()
        await world.clock.advance(2 * INTERVAL_S)
        assert instance(run).state is not InstanceState.READY
        waiting = run.infer("a", 30.0)
        del run.workers.healths["a"]
        gate.open()
        assert await waiting == b"x"
        assert instance(run).generation > old.generation
        assert instance(run).health is Health.HEALTHY
        assert (await told(run, "HEALTH"))[0]["why"] == "wrong numbers"
        assert (await told(run, "UNHEALTHY"))[0]["why"] == "wrong numbers"


async def test_what_a_reload_does_not_heal_is_left_after_three(world: World) -> None:
    """Three reloads in ten minutes, then it stays UNHEALTHY, says so, and ModelReady says no."""
    async with world.host() as run:
        await run.have("a")
        await run.load("a")
        run.workers.healths["a"] = (Health.UNHEALTHY, "wrong numbers")
        await world.clock.advance(RELOAD_WINDOW_S)
        left = await told(run, "LEFT_UNHEALTHY")
        assert len(left) == 1
        assert left[0]["reloads"] == "3 of 3"
        generation = instance(run).generation
        assert sum(verb == "load" for verb, *_ in run.workers.log) == 4
        await world.clock.advance(RELOAD_WINDOW_S * 2)
        found = instance(run)
        assert (found.generation, found.health) == (generation, Health.UNHEALTHY)
        assert "wrong numbers" in found.health_message
        assert not run.host.inference.ready("a")
        run.workers.healths.pop("a")
        await world.clock.advance(2 * INTERVAL_S)
        assert instance(run).health is Health.HEALTHY
        assert run.host.inference.ready("a")


async def test_a_model_that_fails_where_it_did_not_is_reloaded(world: World) -> None:
    """After a normal without faults, requests that all fail make it UNHEALTHY; callers' mistakes do not."""
    async with world.host() as run:
        await run.have("a")
        await run.load("a")
        generation = instance(run).generation
        for _ in range(4):
            await requests(run, WINDOW_MIN)
            await world.clock.advance(1.0)
        run.workers.infer_errors["a"] = invalid("inputs", "a tensor", "none")
        await requests(run, 5 * WINDOW_MIN)
        await world.clock.advance(1.0)
        assert instance(run).health is Health.HEALTHY
        run.workers.infer_errors["a"] = FAULT
        await requests(run, WINDOW_MIN)
        await world.clock.advance(1.0)
        await wait_until_async(lambda: instance(run).generation > generation)
        assert "100%" in (await told(run, "UNHEALTHY"))[0]["why"]


async def test_some_faults_only_degrade(world: World) -> None:
    """DEGRADED is told and nothing is done; it ends with the faults."""
    async with world.host() as run:
        await run.have("a")
        await run.load("a")
        for _ in range(4):
            await requests(run, WINDOW_MIN)
            await world.clock.advance(1.0)
        await requests(run, WINDOW_MIN)
        run.workers.infer_errors["a"] = FAULT
        await requests(run, WINDOW_MIN // 2)
        await world.clock.advance(1.0)
        assert instance(run).health is Health.DEGRADED
        assert run.host.inference.ready("a")
        del run.workers.infer_errors["a"]
        await requests(run, WINDOW_MIN)
        await world.clock.advance(1.0)
        assert instance(run).health is Health.HEALTHY
        assert [d["why"] for d in await told(run, "HEALTH")][1] == ""


async def test_one_that_could_not_come_back_is_kept(world: World) -> None:
    """An instance whose model would be refused now is not drained for its health: it says why."""
    async with world.host() as run:
        await run.have("a")
        await run.load("a")
        run.workers.measured_bytes["a"] = BUDGET + 1
        run.host.occupancy.learned.measured.clear()
        await run.host.models.pin("a", pinned=True)
        devices = run.host.foreign._devices
        assert isinstance(devices, FakeDevices)
        devices.foreign["sim-0"] = 9_900
        run.workers.healths["a"] = (Health.UNHEALTHY, "wrong numbers")
        await world.clock.advance(2 * INTERVAL_S)
        assert instance(run).state is InstanceState.READY
        assert "cannot be loaded anew" in (await told(run, "LEFT_UNHEALTHY"))[0]["left"]


async def test_a_canary_that_ends_after_its_instance_says_nothing(world: World) -> None:
    """An instance that is unloaded while its canary runs is not sick, and neither is the next one."""
    async with world.host() as run:
        await run.have("a")
        await run.load("a")
        run.workers.healths["a"] = (Health.UNHEALTHY, "bad")
        check = run.host.health.check("a")
        task = asyncio.ensure_future(check)
        await run.end(await run.host.residency.unload("a"))
        await task
        del run.workers.healths["a"]
        await run.load("a")
        await settle()
        assert instance(run).health is Health.HEALTHY
