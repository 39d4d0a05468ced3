"""Loads that wait for memory beside others: who may go first, and who must not."""

import asyncio
from pathlib import Path

import pytest

from modelhostd.core.resources import OperationState
from tests.fakes.clock import settle
from tests.host.support import Running, World


@pytest.fixture
async def world(tmp_path: Path) -> World:
    return World(tmp_path)


async def busy(run: Running, *models: str) -> "list[asyncio.Task[bytes]]":
    """Load models and keep each busy with a request that does not end yet."""
    requests = []
    for model in models:
        await run.load(model)
        gate = run.workers.infer_gate(model)
        gate.close()
        requests.append(run.infer(model))
        await gate.reached()
    return requests


async def test_a_load_that_fits_beside_one_that_waits_begins_at_once(world: World) -> None:
    """What the first does without when the busy model has gone is free for the second, before anybody is drained."""
    async with world.host(budget=600) as run:
        for model, size in (("a", 400), ("b", 400), ("small", 200)):
            await run.have(model, size)
        requests = await busy(run, "a")
        waits = await run.host.residency.load("b")
        await run.load("small")
        assert run.host.routes.get("a") is not None
        assert run.host.operations.get(waits.id).state is OperationState.QUEUED
        run.workers.infer_gate("a").open()
        await asyncio.gather(*requests)
        await world.clock.advance(1.0)
        assert await run.ended(waits.id) is OperationState.SUCCEEDED
        assert set(run.workers.resident) == {"b", "small"}


async def test_what_a_waiting_load_needs_is_for_no_other(world: World) -> None:
    """Memory that is free but not enough for the first is not given to a smaller one that came later."""
    async with world.host(budget=600) as run:
        for model, size in (("a", 200), ("c", 200), ("b", 400), ("small", 100)):
            await run.have(model, size)
        requests = await busy(run, "a", "c")
        first = await run.host.residency.load("b")
        second = await run.host.residency.load("small")
        await settle()
        assert run.host.operations.get(second.id).state is OperationState.QUEUED
        run.workers.infer_gate("a").open()
        await world.clock.advance(1.0)
        assert await run.ended(first.id) is OperationState.SUCCEEDED
        run.workers.infer_gate("c").open()
        await asyncio.gather(*requests)
        await world.clock.advance(1.0)
        assert await run.ended(second.id) is OperationState.SUCCEEDED
