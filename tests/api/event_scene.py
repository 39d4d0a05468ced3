"""A host over fakes whose events are served on a real socket, and watchers of them."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import grpc

from modelhost.v1 import event_service_pb2, events_pb2
from modelhost.v1.event_service_pb2_grpc import EventServiceStub
from modelhostd.api import convert, convert_values
from modelhostd.api.events import BOOKMARK_S, WATCHERS_MAX, EventService
from modelhostd.api.methods import Service
from modelhostd.api.statistics import Gauges, Statistics
from modelhostd.core.resources import Kind, Model
from modelhostd.core.state import Edit
from modelhostd.host.registry import History
from tests import event_validators as validate
from tests.api.serving import Serving, serving
from tests.host.support import Running, World
from tests.support import DEADLINE_S

Response = event_service_pb2.WatchEventsResponse
_DESCRIPTOR = event_service_pb2.DESCRIPTOR.services_by_name["EventService"]


class Watch:
    """One stream, read message by message; what came is kept."""

    def __init__(self, channel: grpc.aio.Channel, **request: Any) -> None:
        stub = EventServiceStub(channel)
        self.call = stub.WatchEvents(event_service_pb2.WatchEventsRequest(**request))
        self.messages: list[Response] = []

    async def next(self) -> Response:
        """Return the next message."""
        async with asyncio.timeout(DEADLINE_S):
            message = await self.call.read()
        assert message is not grpc.aio.EOF
        self.messages.append(message)
        return message

    async def opened(self) -> validate.Stream:
        """Read up to the opening bookmark."""
        while not self.messages or not self.messages[-1].HasField("bookmark"):
            await self.next()
        return self.stream

    async def until(self, sequence: int) -> validate.Stream:
        """Read until everything up to ``sequence`` has come."""
        position = self.stream.position
        while position < sequence:
            message = await self.next()
            last = message.events[-1].sequence if message.events else 0
            position = max(position, last, message.bookmark.sequence)
        return self.stream

    async def fail(self) -> grpc.aio.AioRpcError:
        """Read to the end, which must be an error."""
        try:
            while True:
                await self.next()
        except grpc.aio.AioRpcError as error:
            return error

    @property
    def stream(self) -> validate.Stream:
        """What came so far, checked for its form."""
        return validate.take_apart(self.messages)


@dataclass
class Scene:
    """A started host, its EventService, and the server it is offered on."""

    run: Running
    service: EventService
    serving: Serving
    channel: grpc.aio.Channel

    @property
    def last(self) -> int:
        """The sequence of the last event."""
        return self.run.host.registry.journal.last_sequence

    @property
    def truth(self) -> dict[str, events_pb2.Resource]:
        """Everything that is committed, by name."""
        state = self.run.host.registry.committed
        return {
            convert_values.name_of(kind, key): convert.resource(resource)
            for kind in Kind
            for key, resource in state.table(kind).items()
        }

    def watch(self, channel: grpc.aio.Channel | None = None, **request: Any) -> Watch:
        """Open a stream."""
        return Watch(channel or self.channel, **request)

    async def publish(self, count: int, model: str = "m", padding: int = 0) -> int:
        """Publish ``count`` events of a model, each at least ``padding`` bytes; returns the last."""
        registry = self.run.host.registry
        known = registry.decided.models.get(model)
        if known is None:
            known = await self.run.add(model)
        edits = []
        for _ in range(count):
            number = known.edit + 1
            known = replace(known, edit=number, description=f"{number} " + "x" * padding)
            edits.append(Edit(Kind.MODEL, model, known, "UPDATED"))
        return await registry.record(edits)

    def model(self, key: str = "m") -> Model:
        """Return a model as committed."""
        return self.run.host.registry.committed.model(key)


@asynccontextmanager
async def scene(
    world: World,
    *,
    bookmark_s: float = BOOKMARK_S,
    stall_s: float = 30.0,
    watchers_max: int = WATCHERS_MAX,
    history: History | None = None,
) -> AsyncIterator[Scene]:
    """Start a host on ``world`` and serve its events."""
    async with world.host(history=history) as run:
        figures = Statistics(run.host, Gauges())
        service = EventService(run.host, figures, bookmark_s=bookmark_s, watchers_max=watchers_max)
        async with serving([Service(_DESCRIPTOR, service)], stall_s=stall_s) as server:
            yield Scene(run, service, server, server.channel())
