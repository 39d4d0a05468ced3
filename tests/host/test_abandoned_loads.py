"""Loads on demand whose requests gave up while they waited for memory."""

import asyncio
from pathlib import Path

import pytest

from modelhostd.core.residency import BUSY_GRACE_S
from modelhostd.core.resources import InstanceState, OperationState
from modelhostd.host.wanted import ABANDONED_S
from tests.fakes.clock import settle
from tests.host.support import Running, World
from tests.support import DEADLINE_S


@pytest.fixture
async def world(tmp_path: Path) -> World:
    return World(tmp_path)


async def busy(run: Running) -> "asyncio.Task[bytes]":
    """Have ``a`` on disk, and ``b`` at work in all the memory there is."""
    for model in "ab":
        await run.have(model)
    await run.load("b")
    gate = run.workers.infer_gate("b")
    gate.close()
    request = run.infer("b")
    await gate.reached()
    return request


def state(run: Running, model: str) -> InstanceState | None:
    found = run.host.registry.decided.instance_of(model)
    return found.state if found is not None else None


async def test_a_load_that_nobody_waits_for_drains_nobody(world: World) -> None:
    """Once the last request for it has given up, a load on demand leaves busy models alone, and then it ends."""
    async with world.host(budget=500) as run:
        request = await busy(run)
        impatient = run.infer("a")
        await settle()
        (load,) = [
            o for o in run.host.operations.list() if o.model == "a" and o.kind.value == "LOAD"
        ]
        impatient.cancel()
        await world.clock.advance(2 * BUSY_GRACE_S)
        assert state(run, "b") is InstanceState.READY
        assert state(run, "a") is InstanceState.QUEUED
        await world.clock.advance(ABANDONED_S)
        assert state(run, "a") is None
        done = run.host.operations.get(load.id)
        assert done.state is OperationState.CANCELLED
        assert done.error is not None
        assert "gave up" in done.error.message
        run.workers.infer_gate("b").open()
        assert await request == b"x"


async def test_one_that_comes_again_has_not_lost_its_place(world: World) -> None:
    """Requests of a second each, one after the other, get a busy model drained as one long one would."""
    async with world.host(budget=500) as run:
        request = await busy(run)
        for _ in range(int(BUSY_GRACE_S) + 1):
            impatient = run.infer("a")
            await world.clock.advance(1.0)
            impatient.cancel()
            await world.clock.advance(0.5)
        assert state(run, "b") is InstanceState.DRAINING
        run.workers.infer_gate("b").open()
        assert await request == b"x"
        assert await run.infer("a", DEADLINE_S) == b"x"


async def test_one_that_a_client_asked_for_goes_on(world: World) -> None:
    """A load that LoadModel asked for, first or later, does not depend on requests."""
    async with world.host(budget=500) as run:
        request = await busy(run)
        impatient = run.infer("a")
        await settle()
        load = await run.host.residency.load("a")
        impatient.cancel()
        await world.clock.advance(2 * BUSY_GRACE_S)
        assert state(run, "b") is InstanceState.DRAINING
        run.workers.infer_gate("b").open()
        assert await request == b"x"
        await run.end(load)


async def test_an_idle_model_stays_for_it(world: World) -> None:
    """Nor does it evict a model that becomes idle: it would be for nobody."""
    async with world.host(budget=500) as run:
        request = await busy(run)
        impatient = run.infer("a")
        await settle()
        impatient.cancel()
        run.workers.infer_gate("b").open()
        assert await request == b"x"
        await world.clock.advance(ABANDONED_S + 1.0)
        assert set(run.workers.resident) == {"b"}
