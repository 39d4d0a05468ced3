"""The eviction policy of a whole host: what it weighs, what it remembers, and what it tells of it."""

from pathlib import Path

import pytest

from modelhostd.core.resources import Instance, Settings
from tests.host.support import Running, World
from tests.support import DEADLINE_S


@pytest.fixture
async def world(tmp_path: Path) -> World:
    return World(tmp_path)


async def use(run: Running, *models: str) -> None:
    """Send a request to each of the models, a second apart."""
    for model in models:
        await run.infer(model, DEADLINE_S)
        await run.world.clock.advance(1.0)


async def ready(run: Running, policy: str) -> None:
    """Have ``dear`` and ``cheap`` on a device with room for two, and a third model on disk."""
    await run.host.update_settings(Settings(eviction_policy=policy), ["eviction_policy"])
    run.workers.load_s = {"dear": 10.0, "cheap": 0.1}
    for model in ("dear", "cheap", "third"):
        await run.have(model)
    await use(run, "dear", "dear", "cheap", "cheap")


@pytest.mark.parametrize(
    ("policy", "victim", "kept"), [("lru", "dear", "cheap"), ("cost-aware", "cheap", "dear")]
)
async def test_the_policy_chooses_the_victim(
    world: World, policy: str, victim: str, kept: str
) -> None:
    """What is cheap to load again goes first under `cost-aware`; the event says who stayed instead."""
    async with world.host(budget=800) as run:
        await ready(run, policy)
        await run.load("third")
        assert set(run.workers.resident) == {kept, "third"}
        events = run.host.registry.journal._ring.read(1, 10_000) or ()
        event = next(e for e in events if e.reason == "EVICTED")
        details = {"for": "third", "policy": policy, "kept": kept, "freedBytes": "400"}
        assert details.items() <= event.details.items()
        assert isinstance(event.resource, Instance)
        assert event.resource.model == victim


async def test_what_was_used_before_an_eviction_counts_after_it(world: World) -> None:
    """A model that comes back has the uses that it had: it is not the next to go."""
    async with world.host(budget=800) as run:
        await ready(run, "cost-aware")
        await use(run, "third", "third")
        assert set(run.workers.resident) == {"dear", "third"}
        run.workers.load_s["cheap"] = 100.0
        await use(run, "cheap")
        assert set(run.workers.resident) == {"dear", "cheap"}
        await use(run, "third")
        assert set(run.workers.resident) == {"third", "cheap"}


async def test_a_deleted_model_leaves_no_uses(world: World) -> None:
    """Who takes the name of a deleted model begins as new."""
    async with world.host(budget=800) as run:
        await ready(run, "cost-aware")
        await run.end(await run.host.models.delete("dear", force=True))
        await run.have("dear")
        await run.load("dear")
        await run.load("third")
        assert set(run.workers.resident) == {"cheap", "third"}


@pytest.mark.parametrize(("kept_s", "victim"), [(None, "dear"), (0.0, "cheap")])
async def test_what_comes_back_from_host_memory_is_cheap(
    world: World, kept_s: float | None, victim: str
) -> None:
    """`cost-aware` weighs what coming back takes from where a victim would land: a copy makes a dear load cheap."""
    async with world.host(budget=800, host_budget=4000) as run:
        await run.host.update_settings(Settings(eviction_policy="cost-aware"), ["eviction_policy"])
        run.workers.load_s = {"dear": 10.0, "cheap": 0.1}
        await run.have("dear", host_keep_alive_s=kept_s)
        await run.have("cheap", host_keep_alive_s=0.0)
        await run.have("third")
        await use(run, "dear", "dear", "cheap", "cheap")
        await run.load("third")
        assert victim not in run.workers.resident
