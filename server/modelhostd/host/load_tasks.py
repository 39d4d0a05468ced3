"""Loads that run: one task each, in a table, until they are READY, taken back, or put into the queue again.

Rule: bytes are reserved in the ledger before a load starts, and released when it did not end well.
"""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from functools import partial

import structlog

from modelhostd.core.errors import ModelhostError
from modelhostd.core.lifecycle import INSTANCE, step
from modelhostd.core.resources import Health, Instance, InstanceState, Phase, Tier
from modelhostd.core.state import instance_key
from modelhostd.host import instances
from modelhostd.host import wanted as errors
from modelhostd.host.crashes import Crashes
from modelhostd.host.occupancy import Occupancy, changed
from modelhostd.host.routes import Route
from modelhostd.host.wanted import Wanted
from modelhostd.ports import Loaded

log = structlog.get_logger(__name__)


class LoadTasks:
    """The loads that run now, at most one for each model.

    ``ended`` is called with each load that is over, and the error that ended it (None = READY); ``pump``
    whenever memory or a place may have become free; ``drop`` with a model whose warm copy must go, and why.
    """

    def __init__(
        self,
        occupancy: Occupancy,
        crashes: Crashes,
        ended: Callable[[Wanted, ModelhostError | None], None],
        pump: Callable[[], None],
        drop: Callable[[str, str, dict[str, str]], None],
    ) -> None:
        self._occupancy = occupancy
        self._registry = occupancy.registry
        self._operations = occupancy.operations
        self._crashes = crashes
        self._ended = ended
        self._pump = pump
        self._drop = drop
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._wanted: dict[str, Wanted] = {}

    @property
    def count(self) -> int:
        """How many loads from disk run, those that are being stopped included."""
        return sum(not wanted.swapping for wanted in self._wanted.values())

    def task(self, model_id: str) -> "asyncio.Task[None] | None":
        """Return the task of the model's load that runs, or is being stopped."""
        return self._tasks.get(model_id)

    def stopped_operations(self, model_id: str) -> Sequence[str]:
        """Return the operations of the model's load that is being stopped."""
        wanted = self._wanted.get(model_id)
        return wanted.operations if wanted is not None and wanted.stopped_by is not None else ()

    async def wait(self, timeout_s: float) -> None:
        """Wait until no load runs any more."""
        if self._tasks:
            await asyncio.wait(self._tasks.values(), timeout=timeout_s)

    def _start(
        self,
        wanted: Wanted,
        route: Route,
        loading: Instance,
        work: Coroutine[None, None, None],
    ) -> None:
        self._occupancy.routes.put(route)
        edits = [*changed(loading, "LOADING")]
        for operation in wanted.operations:
            edits += self._operations.running(operation, Phase.LOADING)
        self._registry.record(edits)
        task = asyncio.create_task(work, name=f"load {wanted.model}")
        wanted.task = self._tasks[wanted.model] = task
        self._wanted[wanted.model] = wanted
        task.add_done_callback(partial(self._over, wanted, route, work))

    def _over(
        self,
        wanted: Wanted,
        route: Route,
        work: Coroutine[None, None, None],
        task: "asyncio.Task[None]",
    ) -> None:
        if self._tasks.get(wanted.model) is task:
            # It was cancelled before its first step: no handler of its own ran.
            work.close()
            error = wanted.stopped_by or errors.cancelled(wanted)
            self._take_back(wanted, route, error)
            self._pump()
        if not task.cancelled() and task.exception() is not None:
            log.error("load task failed", model=wanted.model, exc_info=task.exception())

    def _loaded(self, wanted: Wanted, route: Route, loaded: Loaded) -> None:
        del self._tasks[wanted.model], self._wanted[wanted.model]
        clock = self._registry.clock
        instance = self._registry.decided.instance_of(wanted.model)
        assert instance is not None
        ready = replace(
            instance,
            state=step(INSTANCE, instance.state, InstanceState.READY),
            tier=Tier.DEVICE,
            backend=loaded.backend,
            measured_bytes=loaded.measured_bytes,
            host_bytes=loaded.host_bytes,
            ready_time=clock.time(),
            load_s=loaded.load_s,
        )
        if not wanted.swapping or loaded.adopted_bytes:
            # Any other swap-in brings back what was checked before.
            ready = replace(ready, health=Health.HEALTHY, health_time=clock.time())
        route.loaded = loaded
        route.left_bytes = 0
        route.ready_since = clock.monotonic()
        if wanted.lost is None:
            route.last_used = route.ready_since
        else:
            # Coming back is no use: the order of last use is the one from before the loss.
            route.last_used = wanted.lost.last_used
            route.last_used_time = wanted.lost.last_used_time
        result = {
            "instance": instance_key(instance.model, instance.id),
            "device": route.device,
            "backend": loaded.backend,
            "measured_bytes": loaded.measured_bytes,
            "load_s": loaded.load_s,
            "evicted_models": tuple(wanted.evicted),
            "source_tier": (Tier.HOST if wanted.swapping else Tier.DISK).value,
        }
        details = {
            "predictedBytes": str(instance.predicted_bytes),
            "measuredBytes": str(loaded.measured_bytes),
            "hostBytes": str(loaded.host_bytes),
            "sourceTier": (Tier.HOST if wanted.swapping else Tier.DISK).value,
        }
        if loaded.adopted_bytes:
            details["adoptedBytes"] = str(loaded.adopted_bytes)
            details["loadSeconds"] = f"{loaded.load_s:.3f}"
        edits = [*changed(ready, "READY", details)]
        for operation in wanted.operations:
            edits += self._operations.succeeded(operation, result)
        self._registry.record(edits)
        self._occupancy.routes.open(route, clock)
        self._ended(wanted, None)

    def _again(self, wanted: Wanted, route: Route, reason: str) -> None:
        """Put a load whose worker or warm copy was lost back into the queue."""
        del self._tasks[wanted.model], self._wanted[wanted.model]
        wanted.task = None
        self._occupancy.free(route.device, wanted.model)
        self._occupancy.routes.remove(route)
        instance = self._registry.decided.instance_of(wanted.model)
        if instance is not None and instance.generation == wanted.generation:
            state = step(INSTANCE, instance.state, InstanceState.QUEUED)
            queued = replace(instance, state=state, tier=Tier.DISK, host_bytes=0)
            self._registry.record(changed(queued, reason))
        model = self._registry.decided.models.get(wanted.model)
        if wanted.swapping and model is not None:
            # An instance that is loaded from disk is another one; made now, so that it ends with its load.
            operation = wanted.operations[0] if wanted.operations else ""
            new = instances.queued(self._occupancy, self._crashes, wanted, model, operation)
            self._registry.record(new)

    def _unmake(self, wanted: Wanted, route: Route, error: ModelhostError) -> None:
        """Take back a load that did not end well."""
        del self._tasks[wanted.model], self._wanted[wanted.model]
        self._occupancy.free(route.device, wanted.model)
        self._occupancy.routes.remove(route)
        self._ended(wanted, error)

    def _take_back(self, wanted: Wanted, route: Route, error: ModelhostError) -> None:
        """Take back a load that did not end well; see the subclass for one from host memory."""
        self._unmake(wanted, route, error)
