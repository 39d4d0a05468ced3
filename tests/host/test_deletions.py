"""Deletions of models and files: what they wait for, what they keep out, what they leave."""

import asyncio
from pathlib import Path

import pytest

from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.resources import OperationState, Phase
from tests.fakes.clock import settle
from tests.fakes.database import disk_full
from tests.host.support import World, held

PHASES = [Phase.PLANNING, Phase.DOWNLOADING, Phase.VERIFYING, Phase.COMMITTING]
in_each_phase = pytest.mark.parametrize("phase", PHASES, ids=lambda p: p.value)


@pytest.fixture
async def world(tmp_path: Path) -> World:
    return World(tmp_path)


@in_each_phase
async def test_deleted_in_each_phase(world: World, phase: Phase) -> None:
    """Deleting a model that downloads is refused; forced, the download ends and nothing is left."""
    async with world.host() as run:
        await run.add("a")
        operation = await held(run, "a", phase)
        with pytest.raises(ModelhostError) as caught:
            await run.host.models.delete("a", force=False)
        assert caught.value.reason is Reason.WRONG_STATE
        await run.end(await run.host.models.delete("a", force=True))
        assert await run.ended(operation.id) is OperationState.CANCELLED
        assert not world.files.trees
        assert not run.host.models.list()


async def test_a_model_that_is_being_deleted_takes_nothing_new(world: World) -> None:
    """While a model drains for its deletion no load, download, reload or namesake begins."""
    async with world.host() as run:
        await run.have("a")
        await run.load("a")
        gate = run.workers.infer_gate("a")
        gate.close()
        busy = run.infer("a")
        await gate.reached()
        delete = await run.host.models.delete("a", force=True)
        waiting = run.infer("a")
        for command in (
            run.host.residency.load("a"),
            run.host.transfers.download("a", refresh=True),
            run.host.reloads.reload("a"),
            run.host.verification.verify("a"),
            run.add("a"),
            run.infer("a"),
            waiting,
        ):
            with pytest.raises(ModelhostError) as caught:
                await command
            assert caught.value.reason is Reason.CONFLICTING_OPERATION
            assert caught.value.metadata["operation"] == delete.id
        gate.open()
        await busy
        await run.end(delete)
        assert not run.workers.resident
        assert not world.files.trees
        await run.have("a")


async def test_deleting_one_version_leaves_the_others_alone(world: World) -> None:
    """Deleting the files of an old version neither waits for nor refuses loads of the newest one."""
    async with world.host() as run:
        await run.have("a")
        await run.load("a")
        world.downloads.add("hf://org/a", {"model.safetensors": b"new"}, predicted_bytes=3)
        await run.end(await run.host.transfers.download("a", refresh=True))
        with pytest.raises(ModelhostError) as caught:
            await run.host.models.delete("a", force=False, keep_entry=True, version=1)
        assert caught.value.reason is Reason.MODEL_LOADED
        await run.end(await run.host.reloads.reload("a"))
        await run.end(await run.host.models.delete("a", force=False, keep_entry=True, version=1))
        assert list(world.files.trees) == [("a", 2)]
        assert set(run.workers.resident) == {"a"}


async def test_a_deletion_whose_commit_fails_deletes_nothing(world: World) -> None:
    """When the removal of an entry cannot be stored its files stay, and the deletion can be repeated."""
    async with world.host() as run:
        await run.have("a")
        run.database.hold_commits()
        call = asyncio.ensure_future(run.host.models.delete("a", force=False))
        await run.database.wait_for_waiting(1)
        await run.database.release_commits(1)
        operation = await call
        await run.database.wait_for_waiting(1)
        run.database.fail_commits(disk_full(), disk_full())
        await run.database.release_commits()
        await world.clock.advance(5.0)
        await run.failed(operation)
        assert list(world.files.trees) == [("a", 1)]
        assert run.host.models.get("a").available is not None
        await run.end(await run.host.models.delete("a", force=False))
        assert not world.files.trees


async def test_a_deletion_whose_caller_goes_away_goes_on(world: World) -> None:
    """Deleting and verifying are carried out though nobody waits for the answer."""
    async with world.host() as run:
        await run.have("a")
        for command in (
            run.host.verification.verify("a"),
            run.host.models.delete("a", force=False),
        ):
            run.database.hold_commits()
            call = asyncio.ensure_future(command)
            await run.database.wait_for_waiting(1)
            call.cancel()
            await run.database.release_commits()
            await settle()
            for operation in run.host.operations.list():
                await run.end(operation)
        assert not run.host.models.list()
