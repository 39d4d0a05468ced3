"""Filtered watching: less of the same, and still enough to keep a state."""

from pathlib import Path

import pytest

from modelhost.v1 import events_pb2
from tests import event_validators as validate
from tests.api.event_scene import Scene, scene
from tests.host.support import World

Filter = events_pb2.EventFilter
Kind = events_pb2.Resource

FILTERS = {
    "kinds": Filter(kinds=[Kind.INSTANCE, Kind.OPERATION]),
    "names": Filter(names=["models/a", "settings"]),
    "name-of-an-instance-collection-owner": Filter(names=["models/b"], kinds=[Kind.INSTANCE]),
    "models": Filter(models=["models/a"]),
    "two-models": Filter(models=["models/a", "models/b"]),
    "reasons": Filter(reasons=["READY", "EVICTED"]),
    "all-four": Filter(
        kinds=[Kind.INSTANCE],
        names=["models/a"],
        models=["models/a", "models/b"],
        reasons=["LOADING", "READY"],
    ),
    "nothing": Filter(reasons=["NEVER"]),
}


@pytest.fixture
async def world(tmp_path: Path) -> World:
    return World(tmp_path)


async def busy(at: Scene) -> None:
    """Do a little of everything with three models."""
    for model in "abc":
        if model not in at.run.host.registry.decided.models:
            await at.run.have(model)
        await at.run.load(model)
    await at.run.host.models.pin("b", pinned=True)
    await at.run.end(await at.run.host.residency.unload("c"))
    await at.run.end(await at.run.host.models.delete("c", force=True))


@pytest.mark.parametrize("wanted", FILTERS.values(), ids=FILTERS.keys())
async def test_filtered_is_unfiltered_less_the_filter(
    world: World, wanted: events_pb2.EventFilter
) -> None:
    """Live and from the past, a filtered watcher sees each event that passes and no other."""
    async with scene(world, bookmark_s=0.05) as at:
        live = at.watch(start_sequence=1, filter=wanted)
        await live.opened()
        await busy(at)
        everything = await at.watch(start_sequence=1).until(at.last)
        past = at.watch(start_sequence=1, filter=wanted)
        for watch in (live, past):
            stream = await watch.until(at.last)
            validate.check_filtered(everything.events, stream.events, wanted)


@pytest.mark.parametrize(
    "wanted",
    [f for name, f in FILTERS.items() if name not in ("reasons", "all-four", "nothing")],
    ids=[name for name in FILTERS if name not in ("reasons", "all-four", "nothing")],
)
async def test_a_filtered_snapshot_and_its_events_are_that_part_of_the_state(
    world: World, wanted: events_pb2.EventFilter
) -> None:
    """A watcher of a part holds that part, also when operations of it are forgotten."""
    async with scene(world, bookmark_s=0.05) as at:
        await at.run.have("a")
        at.run.host.operations._keep = (3, 1e9)
        watch = at.watch(include_snapshot=True, filter=wanted)
        await watch.opened()
        await busy(at)
        stream = await watch.until(at.last)
        part = {
            name: resource
            for name, resource in at.truth.items()
            if validate.passes(wanted, _as_event(name, resource))
        }
        validate.check_state(stream, part)


def _as_event(name: str, resource: events_pb2.Resource) -> events_pb2.Event:
    kind = resource.WhichOneof("resource")
    assert kind is not None
    number = events_pb2.Resource.Kind.Value(kind.upper())
    return events_pb2.Event(name=name, kind=number, resource=resource)
