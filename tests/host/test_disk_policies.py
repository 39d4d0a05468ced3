"""Artifacts that leave the disk by themselves, as a whole host carries it out."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.resources import ArtifactState, Event, OperationState, Settings
from tests.fakes.clock import settle
from tests.host.support import Running, World, held, release

DAY_S = 86_400.0


@pytest.fixture
async def world(tmp_path: Path) -> World:
    return World(tmp_path)


async def policy(run: Running, name: str, budget: int = 0, ttl_s: float = DAY_S) -> None:
    """Set policy, budget and time to live."""
    settings = Settings(storage_policy=name, disk_budget_bytes=budget, storage_ttl_s=ttl_s)
    await run.host.update_settings(
        settings, ["storage_policy", "disk_budget_bytes", "storage_ttl_s"]
    )


def evictions(run: Running) -> list[tuple[str, Mapping[str, str]]]:
    """Return which models left the disk, and what was told of each."""
    events: tuple[Event, ...] = tuple(run.host.registry.journal._ring.read(1, 10_000) or ())
    return [(e.key, e.details) for e in events if e.reason == "EVICTED_FROM_DISK"]


async def use(run: Running, model: str) -> None:
    """Have a model answer, then take it off its device."""
    await run.load(model)
    assert await run.infer(model) == b"x"
    await run.end(await run.host.residency.unload(model))
    await run.world.clock.advance(1.0)


async def test_the_least_recently_used_makes_room_for_a_download(world: World) -> None:
    """One goes, as an event that says who, why, how much, by which policy and who was kept; its entry stays."""
    async with world.host() as run:
        for model, size in (("a", 300), ("b", 301), ("c", 302)):
            await run.have(model, size)
        for model in ("b", "c", "a"):
            await use(run, model)
        await policy(run, "lru", 1000)
        await run.host.models.pin("c", pinned=True)
        await run.add("d", 350)
        await run.end(await run.host.transfers.download("d"))
        ((victim, told),) = evictions(run)
        assert victim == "b"
        assert told == {
            "version": "1",
            "freedBytes": "299",
            "policy": "lru",
            "cause": "d",
            "neededBytes": "247",
            "kept": "c=PINNED",
        }
        assert run.host.models.get("b").state is ArtifactState.ABSENT
        assert ("b", 1) not in world.files.trees
        assert run.host.models.get("a").available
        await run.end(await run.host.models.delete("a", force=True))
        await run.end(await run.host.transfers.download("b"))


async def test_nothing_goes_where_it_would_not_suffice(world: World) -> None:
    """The download waits, and those that could go are still there."""
    async with world.host() as run:
        await run.have("a", 300)
        await run.have("b", 400)
        await run.host.models.pin("b", pinned=True)
        await policy(run, "lru", 800)
        await run.add("c", 500)
        operation = await run.host.transfers.download("c")
        await settle(30)
        await run.host.registry.flush()
        assert run.host.operations.get(operation.id).state is OperationState.PAUSED
        assert evictions(run) == []
        await run.host.models.pin("b", pinned=False)
        await run.end(await run.host.residency.unload("b"))
        await world.clock.advance(6.0)
        await run.end(operation)
        assert [victim for victim, _ in evictions(run)] == ["b"]


@pytest.mark.parametrize("reason", ["loaded", "leased", "slot", "downloading", "waited for"])
async def test_what_is_in_use_stays(world: World, reason: str) -> None:
    """Whatever the policy and however long ago it was used."""
    async with world.host() as run:
        await run.have("a", 400)
        await world.clock.advance(1.0)
        match reason:
            case "loaded":
                await run.load("a")
            case "leased":
                await run.host.leases.acquire("a", 3000.0)
            case "slot":
                await run.end(await run.host.slots.switch("s", "a"))
                await run.end(await run.host.residency.unload("a"))
            case "downloading":
                world.downloads.add("hf://org/a", {"model.safetensors": b"new" * 50})
                hold = world.downloads.hold("hf://org/a")
                await run.host.transfers.download("a", refresh=True)
                await hold.reached.wait()
            case _:
                run.workers.load_gate("a").close()
                run.infer("a", 100.0)
                await settle(10)
        await policy(run, "lru", 500)
        await run.add("b", 300)
        operation = await run.host.transfers.download("b")
        await settle(30)
        await run.host.registry.flush()
        assert run.host.operations.get(operation.id).state is OperationState.PAUSED
        await policy(run, "ttl", 500, 3600.0)
        for _ in range(2):
            world.clock.jump(DAY_S)
            await run.host.space.enforce()
        assert evictions(run) == []
        assert run.host.models.get("a").available
        if reason == "waited for":
            run.workers.load_gate("a").open()
        if reason == "downloading":
            world.downloads.unhold("hf://org/a")
        await policy(run, "off")
        await world.clock.advance(30.0)


async def test_ttl_takes_what_nobody_has_used(world: World) -> None:
    """On the timer, without any need; the clock of a model starts when it comes, and anew with each use."""
    async with world.host() as run:
        await policy(run, "ttl", ttl_s=3600.0)
        await run.have("a", 300)
        await run.have("b", 301)
        world.clock.jump(3000.0)
        await use(run, "b")
        world.clock.jump(700.0)
        await world.clock.advance(65.0)
        ((victim, told),) = evictions(run)
        assert (victim, told["cause"], told["policy"]) == ("a", "TTL", "ttl")
        world.clock.jump(3600.0)
        await world.clock.advance(65.0)
        assert [v for v, _ in evictions(run)] == ["a", "b"]
        assert list(run.host.registry.committed.models) == ["a", "b"]
        assert world.files.blobs == {}


async def test_a_lowered_budget_is_kept_by_the_policy(world: World) -> None:
    """The largest first with ``size``; no more than is over."""
    async with world.host() as run:
        for model, size in (("a", 300), ("b", 500), ("c", 200)):
            await run.have(model, size)
        await policy(run, "size", 700)
        await world.clock.advance(65.0)
        ((victim, told),) = evictions(run)
        assert (victim, told["cause"]) == ("b", "OVER_BUDGET")
        await world.clock.advance(65.0)
        assert len(evictions(run)) == 1


async def test_off_takes_nothing(world: World) -> None:
    """The default: whatever the budget says and however old things are."""
    async with world.host() as run:
        assert run.host.registry.committed.settings.storage_policy == "off"
        await run.have("a", 400)
        await policy(run, "off", 100, 3600.0)
        world.clock.jump(10 * DAY_S)
        await world.clock.advance(65.0)
        assert evictions(run) == []


async def test_a_shared_blob_is_no_room(world: World) -> None:
    """Two models of the same bytes: both go or neither; a third alone is enough."""
    async with world.host() as run:
        await run.have("a", 400)
        await run.have("b", 400)
        await world.clock.advance(1.0)
        await run.have("c", 300)
        await policy(run, "lru", 800)
        await run.add("d", 350)
        await run.end(await run.host.transfers.download("d"))
        found = dict(evictions(run))
        assert set(found) in ({"a", "b"}, {"c"})
        freed = sum(int(told["freedBytes"]) for told in found.values())
        assert freed in (298, 398)


async def test_a_clearance_outlives_who_asked_for_it(world: World) -> None:
    """The download is cancelled in the middle: what had begun to leave is gone, row and files."""
    async with world.host() as run:
        await run.have("a", 400)
        await policy(run, "lru", 500)
        await run.add("b", 450)
        held_up, delete = run.world.downloads.hold("nothing"), world.files.delete_artifact

        async def slow(model: str, version: int, *, keep_bytes: bool = False) -> int:
            await held_up.stop()
            return await delete(model, version, keep_bytes=keep_bytes)

        world.files.delete_artifact = slow  # type: ignore[method-assign]
        operation = await run.host.transfers.download("b")
        await held_up.reached.wait()
        check = await run.end(await run.host.storage.check(deep=False, repair=True))
        assert check.result["findings"] == []
        cancelling = run.host.operations.cancel(operation.id)
        done, _ = await cancelling, held_up.release()
        assert done.state is OperationState.CANCELLED
        await settle(20)
        assert ("a", 1) not in world.files.trees
        assert run.host.models.get("a").state is ArtifactState.ABSENT


async def test_a_disk_that_fails_keeps_the_rows_true(world: World) -> None:
    """Files that cannot be deleted: the model is ABSENT, the next start takes them away."""
    error = ModelhostError(Reason.STORAGE_ERROR, "EIO", {"path": "p", "cause": "EIO"})
    async with world.host() as run:
        await run.have("a", 400)
        await policy(run, "ttl", ttl_s=3600.0)

        async def fails(model: str, version: int, *, keep_bytes: bool = False) -> int:
            raise error

        delete, world.files.delete_artifact = world.files.delete_artifact, fails  # type: ignore[method-assign]
        world.clock.jump(DAY_S)
        await run.host.space.enforce()
        assert run.host.models.get("a").state is ArtifactState.ABSENT
        assert ("a", 1) in world.files.trees
        world.files.delete_artifact = delete  # type: ignore[method-assign]
    async with world.host():
        assert ("a", 1) not in world.files.trees


async def test_the_version_for_rollback_goes_before_the_one_in_use(world: World) -> None:
    """Of two versions of one model the older one was last of use when its successor came."""
    async with world.host() as run:
        await run.have("a", 400)
        await world.clock.advance(10.0)
        world.downloads.add("hf://org/a", {"model.safetensors": b"n" * 410})
        await run.end(await run.host.transfers.download("a", refresh=True))
        await world.clock.advance(10.0)
        await use(run, "a")
        await policy(run, "lru", 900)
        await run.add("b", 300)
        operation = await held(run, "b")
        release(run, "b")
        await run.end(operation)
        assert [(v, told["version"]) for v, told in evictions(run)] == [("a", "1")]
        assert [a.version for a in run.host.models.get("a").artifacts] == [2]
