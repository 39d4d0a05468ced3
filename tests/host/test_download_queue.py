"""Which downloads run, and how fast: places, priority, hosts, limits of bytes a second."""

import asyncio
from pathlib import Path

import pytest

from modelhostd.core import registry as rules
from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.resources import OperationState, Settings, Source
from tests.fakes.clock import settle
from tests.host.support import World, held, release


@pytest.fixture
async def world(tmp_path: Path) -> World:
    return World(tmp_path)


async def test_places_are_few_and_go_by_priority(world: World) -> None:
    """At most the set number of downloads run; the next is the one with the highest priority."""
    async with world.host() as run:
        await run.host.update_settings(
            Settings(max_concurrent_downloads=1), ["max_concurrent_downloads"]
        )
        for model in "abcd":
            await run.add(model)
        first = await held(run, "a")
        rest = [await run.host.transfers.download(m) for m in "bcd"]
        await run.host.transfers.update(rest[2].id, priority=10)
        release(run, "a")
        for operation in (first, *rest):
            await run.end(operation)
        assert [job.model for job in world.downloads.jobs] == ["a", "d", "b", "c"]
        assert world.downloads.active_max == 1


async def test_more_places_are_used_at_once(world: World) -> None:
    """Raising the limit starts what waits, though the caller does not wait for the answer."""
    async with world.host() as run:
        one = Settings(max_concurrent_downloads=1)
        await run.host.update_settings(one, ["max_concurrent_downloads"])
        for model in "ab":
            await run.add(model)
        await held(run, "a")
        waiting = await run.host.transfers.download("b")
        run.database.hold_commits()
        two = Settings(max_concurrent_downloads=2)
        call = asyncio.ensure_future(run.host.update_settings(two, ["max_concurrent_downloads"]))
        await run.database.wait_for_waiting(1)
        call.cancel()
        await run.database.release_commits()
        await run.end(waiting)
        release(run, "a")


async def test_rates_reach_what_runs(world: World) -> None:
    """A download's limit comes with it and can be changed while it runs; so can that of all."""
    async with world.host() as run:
        await run.add("a")
        world.downloads.hold("hf://org/a")
        operation = await run.host.transfers.download("a", rate_limit=500)
        await settle()
        assert world.downloads.rates == {operation.id: 500}
        updated = await run.host.transfers.update(operation.id, rate_limit=700)
        assert updated.rate_limit_bytes_per_second == 700
        assert world.downloads.rates == {operation.id: 700}
        assert run.reasons("operations")[-1] == "RATE_LIMIT_CHANGED"
        limit = Settings(download_rate_limit_bytes_per_second=9000)
        await run.host.update_settings(limit, ["download_rate_limit_bytes_per_second"])
        assert world.downloads.rate == 9000
        paused = await run.host.transfers.pause(operation.id)
        assert world.downloads.rates == {}
        await run.host.transfers.update(paused.id, rate_limit=0)
        release(run, "a")
        await run.host.transfers.resume(paused.id)
        await run.end(operation)
        assert world.downloads.jobs[-1].rate_limit == 0
        with pytest.raises(ModelhostError) as caught:
            await run.host.transfers.update(operation.id, rate_limit=5)
        assert caught.value.reason is Reason.WRONG_STATE


async def test_rates_outlive_the_daemon(world: World) -> None:
    """What was set holds for the next one, of all and of a download that goes on."""
    async with world.host() as run:
        await run.add("a")
        limit = Settings(download_rate_limit_bytes_per_second=9000)
        await run.host.update_settings(limit, ["download_rate_limit_bytes_per_second"])
        operation = await held(run, "a")
        await run.host.transfers.update(operation.id, rate_limit=700)
    world.downloads.rate = 0
    async with world.host() as run:
        await settle()
        assert world.downloads.rate == 9000
        assert world.downloads.rates == {operation.id: 700}
        release(run, "a")
        await run.end(operation)


async def test_a_host_with_no_place_left_lets_others_pass(world: World) -> None:
    """With a limit for each host, a download from another one does not wait behind it."""
    async with world.host(downloads_per_host=1) as run:
        for model in "ab":
            await run.add(model)
        elsewhere = Source("https://other.example/model.safetensors")
        await run.host.models.create(rules.ModelSpec(source=elsewhere), "c")
        await held(run, "a")
        waiting = await run.host.transfers.download("b")
        # It gets its turn; the fake knows no such sources.
        await run.failed(await run.host.transfers.download("c"))
        assert run.host.operations.get(waiting.id).state is OperationState.QUEUED
        release(run, "a")
        await run.end(waiting)
