"""What a crash kept from being deleted is gone once the next daemon has started."""

import asyncio
from pathlib import Path

import pytest

from modelhostd.core.errors import ModelhostError, Reason
from tests.fakes.clock import settle
from tests.host.support import Running, World
from tests.support import DEADLINE_S

FILES = {"config.json": b"{}", "model.safetensors": b"w" * 100}


@pytest.fixture
async def world(tmp_path: Path) -> World:
    return World(tmp_path)


async def found(run: Running) -> list[str]:
    """Return what CheckStorage finds."""
    done = await run.end(await run.host.storage.check(deep=True, repair=False))
    return [finding["name"] for finding in done.result["findings"]]


async def test_a_deletion_that_a_crash_interrupted_is_finished(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model's row was gone, its files were not: they go at the next start, shared ones stay."""
    reached = asyncio.Event()

    async def stuck(model: str, version: int) -> int:
        reached.set()
        await asyncio.Event().wait()
        return 0

    async with world.host() as run:
        await run.have("a")
        await run.have("b")
        with monkeypatch.context() as patch:
            patch.setattr(world.files, "delete_artifact", stuck)
            await run.host.models.delete("a", force=True)
            async with asyncio.timeout(DEADLINE_S):
                await reached.wait()
            assert "a" not in run.host.registry.committed.models
            await run.crash()
    assert ("a", 1) in world.files.trees
    async with world.host() as run:
        assert set(world.files.trees) == {("b", 1)}
        assert await found(run) == []


async def test_a_stop_lets_a_download_that_is_whole_clean_up(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a finished download is about to delete is deleted before the daemon has stopped."""
    reached, go = asyncio.Event(), asyncio.Event()
    delete = world.files.delete_artifact

    async def held(model: str, version: int) -> int:
        reached.set()
        await go.wait()
        return await delete(model, version)

    async with world.host() as run:
        await run.have("a")
        monkeypatch.setattr(world.files, "delete_artifact", held)
        # The same revision again: what was published for it goes.
        await run.host.transfers.download("a", refresh=True)
        async with asyncio.timeout(DEADLINE_S):
            await reached.wait()
        stopping = asyncio.ensure_future(run.host.transfers.stop(DEADLINE_S))
        await settle()
        go.set()
        await stopping
        assert set(world.files.trees) == {("a", 1)}


async def test_a_tree_without_its_row_is_out_of_sight(world: World) -> None:
    """A crash after publication: the files are taken away, and the download that goes on brings them."""
    async with world.host() as run:
        await run.add("a")
        hold = world.downloads.hold("hf://org/a")
        operation = await run.host.transfers.download("a")
        await hold.reached.wait()
        world.files.put("a", 1, FILES)
        await run.crash()
    async with world.host() as run:
        assert world.files.trees == {}
        world.downloads.unhold("hf://org/a")
        await run.end(operation)
        assert set(world.files.trees) == {("a", 1)}
        assert await found(run) == []


async def test_what_nobody_let_go_of_stays(world: World) -> None:
    """Files of a model that the registry does not know are found by CheckStorage, and left alone."""
    async with world.host() as run:
        await run.have("a")
    world.files.put("stranger", 1, FILES)
    world.files.put("a", 2, FILES)
    async with world.host() as run:
        assert await found(run) == ["a/2", "stranger/1"]


async def test_a_disk_that_fails_does_not_keep_the_daemon_from_starting(world: World) -> None:
    """Leftover files are no reason not to serve."""
    async with world.host() as run:
        await run.have("a")
    world.files.fail_next = ModelhostError(Reason.STORAGE_ERROR, "the disk fails", {})
    async with world.host() as run:
        assert run.host.models.get("a").available is not None
