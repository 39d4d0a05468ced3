"""The route table: which model answers where, right now. Plain memory, changed only in the loop's thread.

Between looking a route up and counting a request in it there is no ``await``: a model that is being
taken out of service either sees the request or never gets it.
"""

import asyncio
import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import field

from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.health import Vitals
from modelhostd.core.values import dataclass
from modelhostd.ports import Clock, Loaded


@dataclass(slots=True, eq=False)
class Uses:
    """When a model was last asked for, over all its instances; -inf = not yet. Monotonic seconds."""

    last: float = -math.inf
    second_last: float = -math.inf


@dataclass(slots=True, eq=False)
class Route:
    """The way to one instance, and the requests on it."""

    model: str
    instance: str
    generation: int
    device: str
    version: int
    own_worker: bool = False
    loaded: Loaded | None = None
    open: bool = False
    draining: bool = False
    """Whether it is being taken out of service."""
    keep: bool = False
    """Whether its weights stay in host memory when it leaves its device."""
    lost: bool = False
    """Whether the worker that had it has gone, and all of it with that."""
    copy_goes: bool = False
    """Whether what it has of host memory beside its device is on its way out."""
    given_up: bool = False
    """Whether that was, so that it leaves its device for disk, even where something in its worker holds that memory."""
    left_bytes: int = 0
    """What its last worker left in host memory: no worker has it until it is adopted. 0 = its worker has it."""
    in_flight: int = 0
    request_count: int = 0
    """Requests answered since it was loaded, errors included."""
    error_count: int = 0
    last_used: float = 0.0
    """Monotonic seconds, for ages; ``last_used_time`` is for people."""
    last_used_time: float = 0.0
    uses: Uses = field(default_factory=Uses)
    vitals: Vitals = field(default_factory=Vitals)
    """What its requests told of its health since that was last looked at."""
    ready_since: float = 0.0
    warm_since: float = 0.0
    idle: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.idle.set()

    @property
    def leaving(self) -> bool:
        """Whether its weights are on their way out of host memory, too."""
        return self.draining and not self.keep

    def enter(self, clock: Clock) -> None:
        """Count one request in."""
        self.in_flight += 1
        self.idle.clear()
        self.last_used = clock.monotonic()
        self.last_used_time = clock.time()
        uses = self.uses
        uses.second_last, uses.last = uses.last, self.last_used

    def leave(self) -> None:
        """Count one request out."""
        self.in_flight -= 1
        if not self.in_flight:
            self.idle.set()


class Routes:
    """Every route by model id, and the requests that wait for one."""

    def __init__(self) -> None:
        self._routes: dict[str, Route] = {}
        self._queues: dict[str, deque[asyncio.Future[Route]]] = {}
        self._uses: dict[str, Uses] = {}
        self.last_used_time: dict[str, float] = {}

    def get(self, model: str) -> Route | None:
        """Return the model's route, open or not."""
        return self._routes.get(model)

    def __iter__(self) -> Iterator[Route]:
        return iter(list(self._routes.values()))

    def put(self, route: Route) -> None:
        """Add a route; the model must have none."""
        assert route.model not in self._routes
        # Kept over evictions: a model that comes back is not as good as new.
        route.uses = self._uses.setdefault(route.model, route.uses)
        self._routes[route.model] = route

    def remove(self, route: Route) -> None:
        """Remove a route, if it is still the model's."""
        route.open = False
        if self._routes.get(route.model) is route:
            del self._routes[route.model]
            if route.last_used_time:
                self.last_used_time[route.model] = route.last_used_time

    def open(self, route: Route, clock: Clock) -> None:
        """Let requests in, those that waited first, in the order they came.

        Those are counted in here, before they run: else the instance would look idle for a moment and
        the next load could evict it unused, for ever (two models, room for one, requests for both).
        """
        route.open = True
        for waiter in self._queues.pop(route.model, deque()):
            if not waiter.done():
                route.enter(clock)
                waiter.set_result(route)

    def queued(self, model: str) -> int:
        """Return how many requests wait for the model."""
        return sum(not w.done() for w in self._queues.get(model, ()))

    def join(self, model: str, limit: int) -> "asyncio.Future[Route]":
        """Wait in the model's queue for a route, which counts the request in; raises QUEUE_FULL."""
        queue = self._queues.setdefault(model, deque())
        if len(queue) >= limit:
            # Those who gave up stand in the way of nobody.
            queue = self._queues[model] = deque(w for w in queue if not w.done())
        if len(queue) >= limit:
            raise ModelhostError(
                Reason.QUEUE_FULL,
                f"{len(queue)} requests wait for model '{model}' already (limit {limit}); "
                f"try again in a second",
                {"model": model, "queue": str(len(queue)), "limit": str(limit)},
                retry_delay_s=1.0,
            )
        waiter: asyncio.Future[Route] = asyncio.get_running_loop().create_future()
        queue.append(waiter)
        return waiter

    def fail(self, model: str, error: ModelhostError) -> None:
        """End every request that waits for the model with an error of its own."""
        for waiter in self._queues.pop(model, deque()):
            if not waiter.done():
                waiter.set_exception(
                    ModelhostError(
                        error.reason, error.message, dict(error.metadata), error.retry_delay_s
                    )
                )

    def waited_for(self) -> Sequence[str]:
        """Return the models that requests wait for."""
        return [model for model in self._queues if self.queued(model)]

    def forget(self, model: str) -> None:
        """Forget a deleted model; nobody waits for it any more."""
        self.last_used_time.pop(model, None)
        self._uses.pop(model, None)
        if not self.queued(model):
            self._queues.pop(model, None)
