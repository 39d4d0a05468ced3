"""Whether what is asked and what is told agree: polls beside a recorded stream of events.

A poll is right when some state between the one before it and the one after it (changes that were decided
while it ran are committed then) says what it said. So a health that lags behind the events is found, and one
that runs ahead of them, without a single second being measured.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from modelhost.oip import open_inference_pb2 as oip
from modelhost.oip.open_inference_pb2_grpc import GRPCInferenceServiceStub
from modelhost.v1 import event_service_pb2, events_pb2, instances_pb2
from modelhost.v1.event_service_pb2_grpc import EventServiceStub
from tests.support import DEADLINE_S

State = instances_pb2.Instance
Health = instances_pb2.Health
SERVING = health_pb2.HealthCheckResponse.SERVING


@dataclass(frozen=True)
class Poll:
    """One answer: who gave it, what it said, and the sequences before and after."""

    who: str
    said: bool
    before: int
    after: int


@dataclass
class Truth:
    """Watches one model. ``on_demand`` says whether a request for it waits while it is not loaded.

    ``barrier`` waits until everything decided so far is committed, and returns the last sequence.
    """

    channel: grpc.aio.Channel
    healthz: Callable[[], Awaitable[int]]
    barrier: Callable[[], Awaitable[int]]
    model: str = "m"
    on_demand: bool = False
    states: list[tuple[int, "State.State.ValueType | None"]] = field(default_factory=list)
    polls: list[Poll] = field(default_factory=list)
    last_sequence: int = 0
    reasons: list[str] = field(default_factory=list)
    _instances: "dict[str, State.State.ValueType]" = field(default_factory=dict)
    _changed: asyncio.Condition = field(default_factory=asyncio.Condition)

    # --- asking -----------------------------------------------------------------------------------

    async def poll(self) -> None:
        """Ask everybody once."""
        await self._ask("ModelReady", self.model_ready)
        await self._ask("model/health", lambda: self.check(f"model/{self.model}"))
        assert await self.check(""), "the daemon serves, whatever its workers do"
        assert await self.healthz() == 200

    async def model_ready(self) -> bool:
        """Ask ModelReady."""
        stub = GRPCInferenceServiceStub(self.channel)
        request = oip.ModelReadyRequest(name=self.model)
        return bool((await stub.ModelReady(request, timeout=DEADLINE_S)).ready)

    async def check(self, service: str) -> bool:
        """Ask grpc.health.v1."""
        stub = health_pb2_grpc.HealthStub(self.channel)
        request = health_pb2.HealthCheckRequest(service=service)
        return bool((await stub.Check(request, timeout=DEADLINE_S)).status == SERVING)

    async def _ask(self, who: str, ask: Callable[[], Awaitable[bool]]) -> None:
        before = await self.barrier()
        said = await ask()
        self.polls.append(Poll(who, said, before, await self.barrier()))

    async def poll_until(self, done: Callable[[], bool]) -> None:
        """Poll until ``done()`` holds, and once more."""
        async with asyncio.timeout(DEADLINE_S):
            while not done():
                await self.poll()
        await self.poll()

    # --- listening --------------------------------------------------------------------------------

    def count(self, reason: str) -> int:
        """Return how many events of the model's instances had this reason."""
        return self.reasons.count(reason)

    async def caught_up(self) -> None:
        """Wait until the stream has told all that is committed."""
        last = await self.barrier()
        async with asyncio.timeout(DEADLINE_S), self._changed:
            await self._changed.wait_for(lambda: self.last_sequence >= last)

    async def listen(self, started: asyncio.Event) -> None:
        """Record the stream of events from its snapshot on."""
        request = event_service_pb2.WatchEventsRequest(include_snapshot=True)
        async for message in EventServiceStub(self.channel).WatchEvents(request):
            async with self._changed:
                for resource in message.snapshot.resources:
                    self._take(0, resource, "")
                for event in message.events:
                    gone = event.change == events_pb2.Event.DELETED
                    resource = None if gone else event.resource
                    self._take(event.sequence, resource, event.reason, event.name)
                    self.last_sequence = event.sequence
                if message.HasField("bookmark"):
                    self.last_sequence = max(self.last_sequence, message.bookmark.sequence)
                    started.set()
                self._changed.notify_all()

    def _take(
        self, sequence: int, resource: events_pb2.Resource | None, reason: str, name: str = ""
    ) -> None:
        if resource is not None and not resource.HasField("instance"):
            return
        name = name or (resource.instance.name if resource is not None else "")
        if not name.startswith(f"models/{self.model}/instances/"):
            return
        self._instances.pop(name, None)
        if resource is not None:
            instance = resource.instance
            sick = instance.state == State.READY and instance.health.status == Health.UNHEALTHY
            # What fails its checks is as good as one that failed to load: whoever asks is told no.
            self._instances[name] = State.FAILED if sick else instance.state
        newest = list(self._instances.values())[-1:]
        self.states.append((sequence, newest[0] if newest else None))
        self.reasons.append(reason)

    # --- judging ----------------------------------------------------------------------------------

    def said_by(self, state: "State.State.ValueType | None") -> bool:
        """Return what an instance's state means for the next request."""
        if state in (State.FAILED, State.BLOCKED):
            return False
        return state == State.READY or self.on_demand

    def judge(self) -> None:
        """Fail where a poll said what no state at its time says."""
        wrong = []
        for poll in self.polls:
            then = [state for sequence, state in self.states if sequence <= poll.before][-1:]
            meanwhile = [s for n, s in self.states if poll.before < n <= poll.after]
            possible = {self.said_by(state) for state in [*(then or [None]), *meanwhile]}
            if poll.said not in possible:
                wrong.append(poll)
        assert not wrong, (wrong[:5], self.states)


@asynccontextmanager
async def watching(truth: Truth) -> AsyncIterator[Truth]:
    """Record events until the end of the block, then judge every poll."""
    started = asyncio.Event()
    task = asyncio.create_task(truth.listen(started))
    try:
        async with asyncio.timeout(DEADLINE_S):
            await started.wait()
        yield truth
        await truth.caught_up()
        truth.judge()
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError, grpc.aio.AioRpcError):
            await task
