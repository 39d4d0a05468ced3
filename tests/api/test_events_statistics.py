"""WatchStatistics: figures as they change, and not more often than asked for."""

import asyncio
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration

from modelhost.v1 import event_service_pb2, host_pb2
from modelhost.v1.event_service_pb2_grpc import EventServiceStub
from tests.api.event_scene import Scene, scene
from tests.api.serving import info_of
from tests.host.support import World
from tests.support import DEADLINE_S


@pytest.fixture
async def world(tmp_path: Path) -> World:
    return World(tmp_path)


class Figures:
    """One open stream of figures."""

    def __init__(self, at: Scene, **request: Any) -> None:
        asked = event_service_pb2.WatchStatisticsRequest(**request)
        self.call = EventServiceStub(at.channel).WatchStatistics(asked)

    async def next(self) -> host_pb2.Statistics:
        """Return the next figures."""
        async with asyncio.timeout(DEADLINE_S):
            figures = await self.call.read()
        assert figures is not grpc.aio.EOF
        return figures


SHORT = Duration(nanos=250_000_000)


async def test_figures_come_at_once_and_when_they_change(world: World) -> None:
    """The first message is the present; a later one comes when something is different."""
    async with scene(world) as at:
        await at.run.have("a")
        figures = Figures(at, interval=SHORT)
        first = await figures.next()
        assert (first.model_count, len(first.instances)) == (1, 0)
        assert first.sequence == at.last
        assert first.store_id == world.disk.store_id
        await at.run.load("a")
        second = await figures.next()
        while not second.instances:
            second = await figures.next()
        assert second.instances[0].model == "models/a"
        assert second.instances[0].device_bytes == 400


async def test_figures_of_one_model_leave_the_others_out(world: World) -> None:
    """Instances and operations of other models do not appear."""
    async with scene(world) as at:
        for model in ("a", "b"):
            await at.run.have(model)
            await at.run.load(model)
        found = await Figures(at, models=["models/b"]).next()
        assert [i.model for i in found.instances] == ["models/b"]


@pytest.mark.parametrize(
    ("asked", "field"),
    [
        pytest.param({"interval": Duration(nanos=1)}, "interval", id="too-often"),
        pytest.param({"interval": Duration(seconds=61)}, "interval", id="too-seldom"),
        pytest.param({"interval": Duration(seconds=-1)}, "interval", id="negative"),
        pytest.param({"models": ["a"]}, "models[0]", id="bare-id"),
        pytest.param({"models": ["models/m"] * 101}, "models", id="too-many"),
    ],
)
async def test_a_bad_request_is_refused_by_field(
    world: World, asked: dict[str, Any], field: str
) -> None:
    """What cannot be watched is INVALID_ARGUMENT, and the field is named."""
    async with scene(world) as at:
        await at.publish(1)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await Figures(at, **asked).next()
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert info_of(caught.value).metadata["field"] == field


async def test_the_stream_ends_when_the_daemon_stops(world: World) -> None:
    """Draining ends it with SHUTTING_DOWN."""
    async with scene(world) as at:
        figures = Figures(at)
        await figures.next()
        at.serving.calls.draining.set()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await figures.next()
        assert info_of(caught.value).reason == "SHUTTING_DOWN"
