"""When models were last used, and how often what was needed was on disk."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from modelhostd.core.errors import ModelhostError, Reason
from tests.fakes.clock import settle
from tests.host.support import Running, World

DISK = ModelhostError(Reason.STORAGE_ERROR, "EIO", {"path": "p", "cause": "EIO"})


@pytest.fixture
async def world(tmp_path: Path) -> World:
    return World(tmp_path)


def last(run: Running) -> Mapping[str, float]:
    """Return the last uses that the host knows."""
    return run.host.uses.last()


async def test_a_request_and_a_load_are_uses_and_outlive_a_stop(world: World) -> None:
    """The time of the last one is known at once, stored at the end, and known to the next daemon."""
    async with world.host() as run:
        await run.have("a")
        await run.have("b")
        assert last(run) == {}
        await run.load("a")
        loaded = world.clock.time()
        assert last(run) == {"a": loaded}
        await world.clock.advance(10.0)
        assert await run.infer("a") == b"x"
        asked = world.clock.time()
        assert last(run) == {"a": asked}
        await run.end(await run.host.residency.unload("a"))
        assert last(run) == {"a": asked}
        assert world.files.uses_written == 0
    assert world.files.uses == {"a": asked}
    async with world.host() as run:
        assert last(run) == {"a": asked}
        report = await run.host.storage.report()
        assert {m.model: m.last_use for m in report.models} == {"a": asked, "b": 0.0}


async def test_uses_are_stored_once_a_minute_and_survive_a_crash(world: World) -> None:
    """However many requests there are; what a crash takes is less than a minute's."""
    async with world.host() as run:
        await run.have("a")
        await run.load("a")
        events = run.host.registry.journal.last_sequence
        for _ in range(50):
            await run.infer("a")
            await world.clock.advance(1.0)
        assert world.files.uses_written == 0
        await world.clock.advance(20.0)
        assert world.files.uses_written == 1
        stored = dict(world.files.uses)
        await world.clock.advance(200.0)
        assert world.files.uses_written == 1
        assert run.host.registry.journal.last_sequence == events
        await run.infer("a")
        await run.crash()
    async with world.host() as run:
        assert last(run) == stored


async def test_a_disk_that_fails_costs_the_storing_alone(world: World) -> None:
    """The next minute stores it."""
    async with world.host() as run:
        await run.have("a")
        await run.load("a")
        world.files.fail_next = DISK
        await world.clock.advance(65.0)
        assert world.files.uses == {}
        await world.clock.advance(65.0)
        assert list(world.files.uses) == ["a"]


async def test_a_deleted_model_is_forgotten(world: World) -> None:
    """One of the same name begins anew."""
    async with world.host() as run:
        await run.have("a")
        await run.load("a")
        await run.infer("a")
        await run.end(await run.host.models.delete("a", force=True))
        assert last(run) == {}
        await run.have("a")
        assert last(run) == {}
        await world.clock.advance(65.0)
        assert world.files.uses == {}


async def test_hits_and_misses(world: World) -> None:
    """Fetched is a miss with its bytes; found, or loaded from disk, is a hit; a refusal is neither."""
    async with world.host() as run:
        uses = run.host.uses
        await run.have("a", 400)
        assert (uses.hit_count, uses.miss_count, uses.fetched_bytes) == (0, 1, 400)
        await run.end(await run.host.transfers.download("a"))
        await run.load("a")
        assert (uses.hit_count, uses.miss_count) == (2, 1)
        await run.load("a")
        assert uses.hit_count == 2
        await run.have("b", 400)
        assert (uses.hit_count, uses.miss_count) == (3, 1)
        world.downloads.fail("hf://org/c", DISK)
        await run.add("c", 500)
        await run.failed(await run.host.transfers.download("c"))
        await settle()
        assert (uses.hit_count, uses.miss_count, uses.fetched_bytes) == (3, 1, 400)
