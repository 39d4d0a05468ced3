"""Pruning and quarantine as commands of a whole host."""

import asyncio
import hashlib
from dataclasses import replace
from pathlib import Path

import pytest

from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.ports import Quarantined
from tests.fakes.clock import settle
from tests.host.support import World, held, release

ENTRY = Quarantined("1-a", "a", "w", "hf://org/a", 5, "e", "f", "why", 1.0)


@pytest.fixture
async def world(tmp_path: Path) -> World:
    return World(tmp_path)


async def test_pruning_frees_what_nobody_needs(world: World) -> None:
    """Blobs of no model and what was left of downloads go; the result says how much; twice frees nothing."""
    async with world.host() as run:
        await run.have("a")
        world.files.blobs["0" * 64] = b"nobody's"
        world.files.staged["a"] = 70
        done = await run.end(await run.host.storage.prune())
        assert done.result == {"freed_bytes": 78, "blob_count": 1, "artifact_count": 0}
        done = await run.end(await run.host.storage.prune())
        assert done.result == {"freed_bytes": 0, "blob_count": 0, "artifact_count": 0}
        await run.load("a")


async def test_a_download_under_way_keeps_its_bytes(world: World) -> None:
    """What a running or paused download will go on with is not taken from it."""
    async with world.host() as run:
        await run.add("a")
        operation = await held(run, "a")
        world.files.staged["a"] = 70
        await run.end(await run.host.storage.prune())
        assert world.files.staged == {"a": 70}
        release(run, "a")
        await run.end(operation)


async def test_an_artifact_that_was_in_use_goes_when_it_is_not(world: World) -> None:
    """Beyond the two that are kept, an old version stays as long as an instance uses it, and no longer."""
    async with world.host() as run:
        await run.have("a")
        await run.load("a")
        for number in range(3):
            world.downloads.add("hf://org/a", {"model.safetensors": bytes([number]) * 400})
            await run.end(await run.host.transfers.download("a", refresh=True))
        versions = [a.version for a in run.host.models.get("a").artifacts]
        assert versions == [1, 3, 4]
        await run.end(await run.host.storage.prune())
        assert len(run.host.models.get("a").artifacts) == 3
        await run.end(await run.host.residency.unload("a"))
        done = await run.end(await run.host.storage.prune())
        assert done.result["artifact_count"] == 1
        assert [a.version for a in run.host.models.get("a").artifacts] == [3, 4]
        assert ("a", 1) not in world.files.trees


async def test_quarantine_is_listed_and_released_by_model(world: World) -> None:
    """An entry is found by its model, released to it, and refused where the model is gone."""
    async with world.host() as run:
        await run.have("a")
        orphan = replace(ENTRY, name="2-b", model="gone")
        world.files.quarantine = {entry.name: entry for entry in (ENTRY, orphan)}
        assert list(await run.host.storage.quarantined()) == [ENTRY, orphan]
        assert list(await run.host.storage.quarantined("a")) == [ENTRY]
        assert (await run.host.storage.restore_quarantined("1-a")).id == "a"
        assert world.files.restored == ["1-a"]
        for name, reason in (("1-a", Reason.INVALID_ARGUMENT), ("2-b", Reason.MODEL_NOT_FOUND)):
            with pytest.raises(ModelhostError) as caught:
                await run.host.storage.restore_quarantined(name)
            assert caught.value.reason is reason
        assert list(await run.host.storage.quarantined()) == [orphan]
        await run.host.storage.delete_quarantined("2-b")
        assert not await run.host.storage.quarantined()


@pytest.mark.parametrize("keep_entry", [False, True])
async def test_a_check_leaves_a_deletion_alone(
    world: World, monkeypatch: pytest.MonkeyPatch, keep_entry: bool
) -> None:
    """Files that lie there without a row because they are being deleted are neither told nor repaired."""
    gate = asyncio.Event()
    delete = world.files.delete_artifact

    async def slow(model: str, version: int, *, keep_bytes: bool = False) -> int:
        await gate.wait()
        return await delete(model, version, keep_bytes=keep_bytes)

    monkeypatch.setattr(world.files, "delete_artifact", slow)
    async with world.host() as run:
        await run.have("a")
        await run.have("b")
        operation = await run.host.models.delete("a", force=True, keep_entry=keep_entry)
        await settle(20)
        world.files.put("stray", 1, {"x": b"y"})
        check = await run.host.storage.check(deep=False, repair=True)
        done = await run.end(check)
        assert {f["name"].partition("/")[0] for f in done.result["findings"]} <= {
            "stray",
            hashlib.sha256(b"y").hexdigest(),
        }
        assert ("a", 1) in world.files.trees
        gate.set()
        await run.end(operation)
        assert set(world.files.trees) == {("b", 1)}
