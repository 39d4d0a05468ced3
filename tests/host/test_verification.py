"""Artifacts hashed again, on demand and on a schedule, and what becomes of one that is not whole."""

import asyncio
from collections.abc import Mapping
from pathlib import Path

import pytest

from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.resources import (
    ArtifactState,
    Operation,
    OperationKind,
    OperationState,
    Settings,
)
from modelhostd.host.verification import SCHEDULE, SLOW_SHARE, UNPACED
from tests.fakes.clock import settle
from tests.host.support import Running, World, held, release
from tests.support import DEADLINE_S

HOUR_S = 3600.0
RATE = 8 << 20


@pytest.fixture
async def world(tmp_path: Path) -> World:
    return World(tmp_path)


async def schedule(run: Running, interval_s: float = HOUR_S) -> None:
    """Switch scheduled verification on."""
    settings = Settings(verify_interval_s=interval_s, verify_rate_bytes_per_second=RATE)
    await run.host.update_settings(settings, ["verify_interval_s", "verify_rate_bytes_per_second"])


def verified(run: Running) -> list[Operation]:
    """Return the scheduled verifications so far, the oldest first."""
    found = [o for o in run.host.operations.list() if o.kind is OperationKind.VERIFY]
    return [o for o in reversed(found) if o.principal == SCHEDULE]


def told(run: Running, reason: str) -> list[tuple[str, Mapping[str, str]]]:
    """Return the models and the details of events with a reason."""
    events = run.host.registry.journal._ring.read(1, 10_000) or ()
    return [(e.key, e.details) for e in events if e.reason == reason]


def gate(world: World) -> tuple[asyncio.Event, asyncio.Event]:
    """Hold verifications up: returns what tells that one began, and what lets it go on."""
    began, go = asyncio.Event(), asyncio.Event()

    async def wait() -> None:
        began.set()
        await go.wait()

    world.files.before_verify = wait
    return began, go


async def test_a_flipped_bit_is_quarantine_and_the_next_download_mends_it(world: World) -> None:
    """QUARANTINED with file, expected and actual; no load takes it; a download fetches what is wrong."""
    async with world.host() as run:
        await run.have("a")
        world.files.flip("a", 1, "model.safetensors")
        done = await run.end(await run.host.verification.verify("a"))
        (finding,) = done.result["findings"]
        assert finding["kind"] == "corrupt_file"
        model = run.host.models.get("a")
        assert model.state is ArtifactState.QUARANTINED
        error = model.artifacts[-1].error
        assert error is not None
        assert error.reason == Reason.CHECKSUM_MISMATCH.value
        assert set(error.metadata) == {"file", "expected", "actual"}
        assert (finding["expected"], finding["actual"]) == (
            error.metadata["expected"],
            error.metadata["actual"],
        )
        ((key, details),) = told(run, "QUARANTINED")
        assert (key, details["cause"], details["version"]) == ("a", error.reason, "1")
        with pytest.raises(ModelhostError) as caught:
            await run.host.residency.load("a")
        assert caught.value.reason is Reason.MODEL_NOT_DOWNLOADED
        await run.end(await run.host.transfers.download("a"))
        assert run.host.models.get("a").artifacts[-1].error is None
        await run.end(await run.host.verification.verify("a"))
        await run.load("a")


async def test_a_sound_artifact_says_when_it_was_verified(world: World) -> None:
    """In the row, with an event, over a restart."""
    async with world.host() as run:
        await run.have("a")
        await world.clock.advance(5.0)
        await run.end(await run.host.verification.verify("a"))
        assert run.host.models.get("a").artifacts[0].verify_time == world.clock.time()
        assert told(run, "VERIFIED") == [("a", {"version": "1"})]
    async with world.host() as run:
        assert run.host.models.get("a").artifacts[0].verify_time > 0


async def test_a_damaged_version_leaves_the_other_one_to_loads(world: World) -> None:
    """Of two versions the one that is whole is what loads take."""
    async with world.host() as run:
        await run.have("a")
        world.downloads.add("hf://org/a", {"model.safetensors": b"n" * 410})
        await run.end(await run.host.transfers.download("a", refresh=True))
        world.files.flip("a", 2, "model.safetensors")
        await run.end(await run.host.verification.verify("a", 2))
        model = run.host.models.get("a")
        assert model.available is not None
        assert model.available.version == 1
        await run.load("a")


async def test_by_default_nothing_is_verified_by_itself(world: World) -> None:
    """However long it takes."""
    async with world.host() as run:
        await run.have("a")
        world.clock.jump(1e8)
        await world.clock.advance(130.0)
        assert verified(run) == []


async def test_each_artifact_is_verified_by_its_interval_one_at_a_time(world: World) -> None:
    """The one that was verified longest ago first; each again when its time has come."""
    async with world.host() as run:
        for model in ("a", "b"):
            await run.have(model)
            await world.clock.advance(1.0)
        await schedule(run)
        await world.clock.advance(65.0)
        assert verified(run) == []
        world.clock.jump(HOUR_S)
        began, go = gate(world)
        await world.clock.advance(130.0)
        assert began.is_set()
        assert [o.model for o in verified(run)] == ["a"]
        go.set()
        await world.clock.advance(130.0)
        assert [o.model for o in verified(run)] == ["a", "b"]
        assert all(o.state is OperationState.SUCCEEDED for o in verified(run))
        await world.clock.advance(130.0)
        assert len(verified(run)) == 2
        world.clock.jump(HOUR_S)
        await world.clock.advance(130.0)
        assert [o.model for o in verified(run)] == ["a", "b", "a", "b"]
        assert [key for key, _ in told(run, "VERIFIED")] == ["a", "b", "a", "b"]


async def test_it_slows_down_for_requests_and_stands_still_for_loads_and_downloads(
    world: World,
) -> None:
    """The pace is followed while it reads: the whole, a quarter, nothing, the whole again."""
    async with world.host() as run:
        await run.have("a")
        await run.have("b", 300)
        await run.load("b")
        await run.add("c", 310)
        await schedule(run)
        world.clock.jump(HOUR_S)
        began, go = gate(world)
        await world.clock.advance(61.0)
        assert began.is_set()
        (pace,) = world.files.paces
        assert pace is not None
        assert pace.bytes_per_second == RATE
        answers = run.workers.infer_gate("b")
        answers.close()
        request = run.infer("b", 1000.0)
        await world.clock.advance(2.0)
        assert pace.bytes_per_second == RATE * SLOW_SHARE
        answers.open()
        await request
        download = await held(run, "c")
        await world.clock.advance(2.0)
        assert pace.bytes_per_second == 0
        release(run, "c")
        await run.end(download)
        await world.clock.advance(2.0)
        assert pace.bytes_per_second == RATE
        go.set()
        await world.clock.advance(2.0)
        assert [o.state for o in verified(run)] == [OperationState.SUCCEEDED]


async def test_none_begins_while_it_would_hurt(world: World) -> None:
    """A download under way: it is put off, not forgotten."""
    async with world.host() as run:
        await run.have("a")
        await run.add("b", 300)
        await schedule(run)
        download = await held(run, "b")
        world.clock.jump(HOUR_S)
        await world.clock.advance(130.0)
        assert verified(run) == []
        release(run, "b")
        await run.end(download)
        await world.clock.advance(65.0)
        assert [o.model for o in verified(run)] == ["a"]


async def test_who_asks_for_one_that_is_scheduled_need_not_wait_for_its_pace(world: World) -> None:
    """The same operation, as fast as it goes from then on."""
    async with world.host() as run:
        await run.have("a")
        await schedule(run)
        world.clock.jump(HOUR_S)
        began, go = gate(world)
        await world.clock.advance(61.0)
        assert began.is_set()
        (scheduled,) = verified(run)
        asked = await run.host.verification.verify("a")
        assert asked.id == scheduled.id
        await world.clock.advance(2.0)
        assert world.files.paces[0] is not None
        assert world.files.paces[0].bytes_per_second == UNPACED
        go.set()
        await run.end(asked)


async def test_a_disk_that_does_not_answer_is_not_asked_all_the_time(world: World) -> None:
    """After a failure the artifact waits its while; the others are not held up."""
    error = ModelhostError(Reason.STORAGE_ERROR, "EIO", {"path": "p", "cause": "EIO"})
    async with world.host() as run:
        await run.have("a")
        await world.clock.advance(1.0)
        await run.have("b")
        await schedule(run)
        world.clock.jump(HOUR_S)
        world.files.fail_next = error
        await world.clock.advance(61.0)
        assert [(o.model, o.state) for o in verified(run)] == [("a", OperationState.FAILED)]
        await world.clock.advance(190.0)
        assert [o.model for o in verified(run)] == ["a", "b"]
        world.clock.jump(HOUR_S)
        await world.clock.advance(61.0)
        assert [o.model for o in verified(run)][2:] == ["a"]


async def test_a_stop_ends_one_that_is_under_way(world: World) -> None:
    """At once; it is due again for the next daemon."""
    async with world.host() as run:
        await run.have("a")
        await schedule(run)
        world.clock.jump(HOUR_S)
        began, _ = gate(world)
        await world.clock.advance(61.0)
        assert began.is_set()
    world.files.before_verify = None
    async with world.host() as run:
        await world.clock.advance(65.0)
        assert run.host.models.get("a").artifacts[0].verify_time > 0


@pytest.mark.parametrize("change", ["deleted", "deleted and fetched again"])
async def test_what_is_gone_meanwhile_is_not_judged(world: World, change: str) -> None:
    """Its files vanish while they are read: that is no damage of what is there now."""
    async with world.host() as run:
        await run.have("a")
        began, go = gate(world)
        operation = await run.host.verification.verify("a")
        await began.wait()
        world.files.flip("a", 1, "model.safetensors")
        world.files.before_verify = None
        await run.end(await run.host.models.delete("a", force=True, keep_entry=True))
        if change != "deleted":
            world.files.put("a", 9, {"x": b"y"})
            await world.clock.advance(1.0)
            await run.end(await run.host.transfers.download("a"))
        go.set()
        await run.host.operations.wait(operation.id, timeout_s=DEADLINE_S)
        await settle(10)
        wanted = ArtifactState.ABSENT if change == "deleted" else ArtifactState.AVAILABLE
        assert run.host.models.get("a").state is wanted
        assert told(run, "QUARANTINED") == []


async def test_a_deep_check_that_repairs_judges_as_a_verification_does(world: World) -> None:
    """Without `repair` it only tells; with it what is damaged is QUARANTINED."""
    async with world.host() as run:
        await run.have("a")
        world.files.flip("a", 1, "model.safetensors")
        await run.end(await run.host.storage.check(deep=True, repair=False))
        assert run.host.models.get("a").state is ArtifactState.AVAILABLE
        await run.end(await run.host.storage.check(deep=True, repair=True))
        assert run.host.models.get("a").state is ArtifactState.QUARANTINED
        assert ("a", 1) not in world.files.trees


async def test_damage_that_cannot_be_put_away_is_told_all_the_same(world: World) -> None:
    """The disk does not let the tree go: the row says QUARANTINED, the next start takes it away."""
    error = ModelhostError(Reason.STORAGE_ERROR, "EIO", {"path": "p", "cause": "EIO"})

    async def fails(model: str, version: int, *, keep_bytes: bool = False) -> int:
        raise error

    async with world.host() as run:
        await run.have("a")
        world.files.flip("a", 1, "model.safetensors")
        delete, world.files.delete_artifact = world.files.delete_artifact, fails  # type: ignore[method-assign]
        done = await run.end(await run.host.verification.verify("a"))
        assert len(done.result["findings"]) == 1
        assert run.host.models.get("a").state is ArtifactState.QUARANTINED
        assert ("a", 1) in world.files.trees
        world.files.delete_artifact = delete  # type: ignore[method-assign]
    async with world.host() as run:
        assert ("a", 1) not in world.files.trees
        await run.end(await run.host.transfers.download("a"))
