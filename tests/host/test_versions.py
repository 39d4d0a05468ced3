"""Versions on disk: the last two stay for rollback, and files on their way out are nobody's finding."""

import asyncio
from pathlib import Path

import pytest

from modelhostd.core.resources import ArtifactState, Settings
from tests.fakes.clock import settle
from tests.host.support import Running, World

SHARED = b"tokenizer" * 5


@pytest.fixture
async def world(tmp_path: Path) -> World:
    return World(tmp_path)


async def refresh(run: Running, number: int) -> None:
    """Have the source publish a revision that shares a file with the others, and fetch it."""
    content = {"model.safetensors": b"%d" % number * 300, "tokenizer.safetensors": SHARED}
    run.world.downloads.add("hf://org/a", content, predicted_bytes=300)
    await run.end(await run.host.transfers.download("a", refresh=True))
    await settle()  # what it replaces goes after it has ended


def versions(run: Running) -> list[int]:
    """Return the versions that are AVAILABLE."""
    artifacts = run.host.models.get("a").artifacts
    return [a.version for a in artifacts if a.state is ArtifactState.AVAILABLE]


async def test_the_last_two_stay_with_all_their_files_and_nothing_else(world: World) -> None:
    """Each new revision takes the third last off the disk, but for what the others share."""
    async with world.host() as run:
        await run.have("a", 400)
        for number in range(2, 7):
            await refresh(run, number)
            assert versions(run) == [number - 1, number]
            assert set(world.files.trees) == {("a", number - 1), ("a", number)}
            for version in versions(run):
                _, files = await run.host.models.files("a", version)
                assert all(file.sha256 in world.files.blobs for file in files)
        assert len(world.files.blobs) == 3
        await run.end(await run.host.reloads.reload("a", version=5))
        instance = run.host.registry.committed.instance_of("a")
        assert instance is not None
        assert instance.artifact_version == 5


async def test_one_that_did_not_come_pushes_nobody_out(world: World) -> None:
    """A download that is cancelled, or whose files turn out to be damaged, leaves the two that were there."""
    async with world.host() as run:
        await run.have("a", 400)
        await refresh(run, 2)
        world.downloads.add("hf://org/a", {"model.safetensors": b"3" * 300})
        hold = world.downloads.hold("hf://org/a")
        operation = await run.host.transfers.download("a", refresh=True)
        await hold.reached.wait()
        await run.host.operations.cancel(operation.id)
        world.downloads.unhold("hf://org/a")
        assert versions(run) == [1, 2]
        await refresh(run, 3)
        newest = versions(run)[-1]
        assert len(versions(run)) == 2
        world.files.flip("a", newest, "model.safetensors")
        await run.end(await run.host.verification.verify("a", newest))
        assert versions(run) == [2]
        await run.end(await run.host.transfers.download("a"))
        assert versions(run) == [2, newest]
        world.files.flip("a", 2, "model.safetensors")
        await run.end(await run.host.verification.verify("a", 2))
        assert versions(run) == [newest]
        await refresh(run, 5)
        assert [a.version for a in run.host.models.get("a").artifacts] == [newest, newest + 1]


@pytest.mark.parametrize("way", ["evicted", "superseded", "pruned", "damaged"])
async def test_a_check_leaves_alone_what_is_on_its_way_out(
    world: World, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """Its row is gone, its files are not yet: a check that repairs neither tells of them nor touches them."""
    async with world.host() as run:
        await run.have("a", 400)
        if way in ("superseded", "pruned"):
            await refresh(run, 2)
        if way == "pruned":
            await run.end(await run.host.reloads.reload("a", version=1))
            await refresh(run, 3)
            await refresh(run, 4)
            assert versions(run) == [1, 3, 4]
            await run.end(await run.host.residency.unload("a"))
            await run.end(await run.host.reloads.reload("a"))
    # Another daemon: what it has not published itself it knows by its rows alone.
    world.files.published.clear()
    reached, gate, delete = asyncio.Event(), asyncio.Event(), world.files.delete_artifact

    async def slow(model: str, version: int, *, keep_bytes: bool = False) -> int:
        reached.set()
        await gate.wait()
        return await delete(model, version, keep_bytes=keep_bytes)

    async with world.host() as run:
        monkeypatch.setattr(world.files, "delete_artifact", slow)
        match way:
            case "evicted":
                settings = Settings(storage_policy="ttl", storage_ttl_s=3600.0)
                await run.host.update_settings(settings, ["storage_policy", "storage_ttl_s"])
                world.clock.jump(1e6)
                work = asyncio.ensure_future(run.host.space.enforce())
            case "superseded":
                work = asyncio.ensure_future(refresh(run, 3))
            case "pruned":
                work = asyncio.ensure_future(run.host.storage.prune())
            case _:
                world.files.flip("a", 1, "model.safetensors")
                work = asyncio.ensure_future(run.host.verification.verify("a"))
        await asyncio.wait_for(reached.wait(), 5.0)
        before = set(world.files.trees)
        done = await run.end(await run.host.storage.check(deep=False, repair=True))
        kinds = {finding["kind"] for finding in done.result["findings"]}
        assert "stray_tree" not in kinds
        assert set(world.files.trees) == before
        gate.set()
        await work
        await settle(50)
        await run.host.registry.flush()
        assert set(world.files.trees) == {("a", version) for version in versions(run)}
