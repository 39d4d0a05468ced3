"""Loads that wait for their model's files: followed, joined, cancelled, failed, cut off."""

import asyncio
from pathlib import Path

import pytest

from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.resources import (
    FINAL_STATES,
    Operation,
    OperationKind,
    OperationState,
    Phase,
)
from tests.fakes.clock import settle
from tests.host.support import Running, World, release
from tests.support import DEADLINE_S, wait_until_async


@pytest.fixture
async def world(tmp_path: Path) -> World:
    return World(tmp_path)


async def fetching(run: Running, model: str) -> tuple[Operation, Operation]:
    """Return a LOAD whose model's download stands still, and that download."""
    hold = run.world.downloads.hold(f"hf://org/{model}")
    load = await run.host.fetched_loads.load(model)
    await hold.reached.wait()
    found = run.host.operations.list()
    return load, next(o for o in found if o.kind is OperationKind.DOWNLOAD)


async def test_a_load_follows_its_download(world: World) -> None:
    """The LOAD shows the download's bytes, then its own, and ends READY; the download is its own."""
    async with world.host() as run:
        await run.add("a")
        load, download = await fetching(run, "a")

        def followed() -> bool:
            shown = run.host.operations.get(load.id).progress
            return (shown.phase, shown.total_bytes) == (Phase.DOWNLOADING, 400)

        await wait_until_async(followed)
        release(run, "a")
        done = await run.end(load)
        assert done.result["device"] == "sim-0"
        await run.end(download)


async def test_equal_loads_are_one(world: World) -> None:
    """Who asks for the same while it is fetched, or while it loads then, joins the first."""
    async with world.host() as run:
        await run.add("a")
        load, _ = await fetching(run, "a")
        assert (await run.host.fetched_loads.load("a")).id == load.id
        gate = run.workers.load_gate("a")
        gate.close()
        release(run, "a")
        await gate.reached()
        assert (await run.host.residency.load("a")).id == load.id
        assert (await run.host.fetched_loads.load("a")).id == load.id
        gate.open()
        await run.end(load)


async def test_a_request_that_loads_first_ends_both(world: World) -> None:
    """A model that a request loads while the LOAD has not seen its files yet is READY for it too."""
    async with world.host() as run:
        await run.add("a")
        load, download = await fetching(run, "a")
        release(run, "a")
        await run.host.operations.wait(download.id, timeout_s=DEADLINE_S)
        assert await run.infer("a", DEADLINE_S) == b"x"
        await run.end(load)
        assert [verb for verb, *_ in run.workers.log if verb == "load"] == ["load"]


async def test_cancelling_the_load_leaves_the_download(world: World) -> None:
    """A cancelled LOAD loads nothing, and its download goes on."""
    async with world.host() as run:
        await run.add("a")
        load, download = await fetching(run, "a")
        assert (await run.host.operations.cancel(load.id)).state is OperationState.CANCELLED
        release(run, "a")
        await run.end(download)
        await settle()
        assert not run.workers.log


async def test_cancelling_after_the_download_cancels_the_load(world: World) -> None:
    """Once the model loads, cancelling the LOAD stops that."""
    async with world.host() as run:
        await run.add("a")
        load, _ = await fetching(run, "a")
        gate = run.workers.load_gate("a")
        gate.close()
        release(run, "a")
        await gate.reached()
        assert (await run.host.operations.cancel(load.id)).state is OperationState.CANCELLED
        await settle()
        assert not run.workers.resident
        assert run.host.occupancy.ledger.used("sim-0") == 0


@pytest.mark.parametrize("how", ["fails", "is cancelled", "is too large"])
async def test_a_load_ends_with_its_download(world: World, how: str) -> None:
    """A download that fails or is cancelled ends the LOAD with its reason, and so does a refusal."""
    async with world.host() as run:
        await run.add("a", 5000 if how == "is too large" else 400)
        if how == "fails":
            error = ModelhostError(Reason.GATED, "no", {"source": "hf://org/a"})
            world.downloads.fail("hf://org/a", error)
            load = await run.host.fetched_loads.load("a")
        else:
            load, download = await fetching(run, "a")
            if how == "is cancelled":
                await run.host.operations.cancel(download.id)
            release(run, "a")
        done = await run.host.operations.wait(load.id, timeout_s=DEADLINE_S)
        assert done.error is not None
        expected = {
            "fails": "GATED",
            "is cancelled": "CANCELLED",
            "is too large": "MODEL_TOO_LARGE",
        }
        assert done.error.reason == expected[how]


async def test_a_caller_that_goes_away_stops_nothing(world: World) -> None:
    """A LOAD whose caller gave up before its commit fetches and loads all the same."""
    async with world.host() as run:
        await run.add("a")
        run.database.hold_commits()
        call = asyncio.ensure_future(run.host.fetched_loads.load("a"))
        await run.database.wait_for_waiting(1)
        call.cancel()
        await run.database.release_commits()
        await world.clock.advance(1.0)
        assert set(run.workers.resident) == {"a"}
        assert all(o.state is OperationState.SUCCEEDED for o in run.host.operations.list())


async def test_a_load_that_could_not_be_stored_fetches_nothing(world: World) -> None:
    """When its commit fails nothing is downloaded, and the next call does it all."""
    async with world.host() as run:
        await run.add("a")
        run.database.fail_commits()
        with pytest.raises(ModelhostError):
            await run.host.fetched_loads.load("a")
        await settle()
        assert not world.downloads.jobs
        await run.end(await run.host.fetched_loads.load("a"))


async def test_a_deletion_ends_it(world: World) -> None:
    """A forced deletion ends download and LOAD; while it runs no other LOAD begins."""
    async with world.host() as run:
        await run.add("a")
        load, download = await fetching(run, "a")
        delete = await run.host.models.delete("a", force=True)
        with pytest.raises(ModelhostError) as caught:
            await run.host.fetched_loads.load("a")
        assert caught.value.reason is Reason.CONFLICTING_OPERATION
        await run.end(delete)
        for operation in (load, download):
            assert await run.ended(operation.id) in FINAL_STATES
        assert not run.workers.log


async def test_after_a_restart_the_download_goes_on(world: World) -> None:
    """A crash ends the LOAD with DAEMON_RESTARTED; its download is finished by the next daemon."""
    async with world.host() as run:
        await run.add("a")
        load, download = await fetching(run, "a")
        await run.host.registry.flush()
        await run.crash()
    release(run, "a")
    async with world.host() as run:
        done = await run.failed(load)
        assert done.error is not None
        assert done.error.reason == "DAEMON_RESTARTED"
        await run.end(download)
        assert not run.workers.log
