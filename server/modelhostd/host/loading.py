"""Loads that run: begun, and ended one way or another.

Rule: bytes are reserved in the ledger before a load starts, and released when it did not end well.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import structlog

from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.lifecycle import INSTANCE, step
from modelhostd.core.resources import (
    Artifact,
    Health,
    Instance,
    InstanceState,
    Isolation,
    Model,
    Phase,
    Tier,
)
from modelhostd.core.state import instance_key
from modelhostd.host import wanted as errors
from modelhostd.host.crashes import Crashes
from modelhostd.host.occupancy import Occupancy, changed
from modelhostd.host.routes import Route
from modelhostd.host.wanted import Wanted
from modelhostd.ports import Loaded, LoadSpec

log = structlog.get_logger(__name__)


class Loading:
    """The loads that run now, at most one for each model.

    ``ended`` is called with each load that is over, and the error that ended it (None = READY);
    ``pump`` whenever memory or a place may have become free.
    """

    def __init__(
        self,
        occupancy: Occupancy,
        crashes: Crashes,
        ended: Callable[[Wanted, ModelhostError | None], None],
        pump: Callable[[], None],
    ) -> None:
        self._occupancy = occupancy
        self._registry = occupancy.registry
        self._operations = occupancy.operations
        self._crashes = crashes
        self._ended = ended
        self._pump = pump
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._wanted: dict[str, Wanted] = {}

    @property
    def count(self) -> int:
        """How many loads run, those that are being stopped included."""
        return len(self._tasks)

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

    def begin(self, wanted: Wanted, model: Model, artifact: Artifact, instance: Instance) -> None:
        """Start a load on ``instance.device``, where ``wanted.bytes`` are free."""
        self._occupancy.ledger.reserve(instance.device, model.id, wanted.bytes)
        isolated = self._crashes.isolated(model)
        own = isolated is not None or model.config.isolation is Isolation.PROCESS
        instance = replace(instance, isolation=Isolation.PROCESS if own else Isolation.SHARED)
        loading = replace(
            instance,
            state=step(INSTANCE, instance.state, InstanceState.LOADING),
            predicted_bytes=wanted.bytes,
            artifact_version=artifact.version,
            config_edit=model.edit,
            config_stale=False,
            operation=wanted.operations[0] if wanted.operations else "",
        )
        route = _route(model, loading)
        self._occupancy.routes.put(route)
        edits = [*changed(instance, "ISOLATED", isolated)] if isolated is not None else []
        edits += changed(loading, "LOADING")
        for operation in wanted.operations:
            edits += self._operations.running(operation, Phase.LOADING)
        self._registry.record(edits)
        spec = self._spec(model, artifact, loading)
        task = asyncio.create_task(self._load(wanted, route, spec), name=f"load {model.id}")
        wanted.task = self._tasks[model.id] = task
        self._wanted[model.id] = wanted
        task.add_done_callback(partial(self._over, wanted, route))

    def _over(self, wanted: Wanted, route: Route, task: "asyncio.Task[None]") -> None:
        if self._tasks.get(wanted.model) is task:
            # It was cancelled before its first step: no handler of its own ran.
            self._unmake(wanted, route, wanted.stopped_by or errors.cancelled(wanted))
            self._pump()
        if not task.cancelled() and task.exception() is not None:
            log.error("load task failed", model=wanted.model, exc_info=task.exception())

    def _spec(self, model: Model, artifact: Artifact, instance: Instance) -> LoadSpec:
        return LoadSpec(
            model=model.id,
            instance=instance.id,
            generation=instance.generation,
            version=artifact.version,
            model_dir=self._occupancy.files.model_dir(model.id, artifact.version),
            task=model.task,
            config=model.config,
            predicted_bytes=instance.predicted_bytes,
            isolated=instance.isolation is not model.config.isolation,
        )

    async def _load(self, wanted: Wanted, route: Route, spec: LoadSpec) -> None:
        left = max(0.0, wanted.deadline - self._registry.clock.monotonic())
        workers = self._occupancy.workers
        try:
            async with asyncio.timeout(left):
                loaded = await workers.load(
                    route.device, spec, lambda p: self._occupancy.report(wanted.operations, p)
                )
            if wanted.stopped_by is not None:
                # It was stopped at the moment of its end.
                await workers.unload(route.device, route.instance, route.generation)
                raise wanted.stopped_by
        except TimeoutError:
            self._unmake(wanted, route, errors.too_late(wanted))
        except asyncio.CancelledError:
            self._unmake(wanted, route, wanted.stopped_by or errors.cancelled(wanted))
            if wanted.stopped_by is None:
                raise
        except ModelhostError as error:
            self._failed(wanted, route, error)
        except Exception:
            log.exception("load failed unexpectedly", model=wanted.model)
            self._unmake(wanted, route, errors.unexpected(wanted))
        else:
            self._loaded(wanted, route, spec, loaded)
        self._pump()

    def _failed(self, wanted: Wanted, route: Route, error: ModelhostError) -> None:
        blocked = self._crashes.blocked(wanted.model)
        final = wanted.stopped_by or blocked
        if final is None and error.reason is Reason.WORKER_LOST and wanted.retries:
            self._again(wanted, route)
        else:
            self._unmake(wanted, route, final or error)

    def _loaded(self, wanted: Wanted, route: Route, spec: LoadSpec, loaded: Loaded) -> None:
        del self._tasks[wanted.model], self._wanted[wanted.model]
        clock = self._registry.clock
        self._occupancy.true_up(route.device, spec, loaded.measured_bytes, loaded.load_s)
        instance = self._registry.decided.instance_of(wanted.model)
        assert instance is not None
        ready = replace(
            instance,
            state=step(INSTANCE, instance.state, InstanceState.READY),
            tier=Tier.DEVICE,
            health=Health.HEALTHY,
            health_time=clock.time(),
            backend=loaded.backend,
            measured_bytes=loaded.measured_bytes,
            ready_time=clock.time(),
            load_s=loaded.load_s,
        )
        route.loaded = loaded
        route.ready_since = route.last_used = clock.monotonic()
        if wanted.lost is not None:
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
        }
        details = {
            "predictedBytes": str(instance.predicted_bytes),
            "measuredBytes": str(loaded.measured_bytes),
        }
        edits = [*changed(ready, "READY", details)]
        for operation in wanted.operations:
            edits += self._operations.succeeded(operation, result)
        self._registry.record(edits)
        self._occupancy.routes.open(route, clock)
        self._ended(wanted, None)

    def _again(self, wanted: Wanted, route: Route) -> None:
        """Put a load whose worker was lost back into the queue, once."""
        del self._tasks[wanted.model], self._wanted[wanted.model]
        wanted.retries -= 1
        wanted.task = None
        self._occupancy.ledger.release(route.device, wanted.model)
        self._occupancy.routes.remove(route)
        instance = self._registry.decided.instance_of(wanted.model)
        if instance is not None and instance.generation == wanted.generation:
            queued = replace(instance, state=step(INSTANCE, instance.state, InstanceState.QUEUED))
            self._registry.record(changed(queued, "WORKER_LOST"))

    def _unmake(self, wanted: Wanted, route: Route, error: ModelhostError) -> None:
        """Take back a load that did not end well."""
        del self._tasks[wanted.model], self._wanted[wanted.model]
        self._occupancy.ledger.release(route.device, wanted.model)
        self._occupancy.routes.remove(route)
        self._ended(wanted, error)


def _route(model: Model, instance: Instance) -> Route:
    return Route(
        model=model.id,
        instance=instance.id,
        generation=instance.generation,
        device=instance.device,
        version=instance.artifact_version,
        own_worker=instance.isolation is Isolation.PROCESS,
    )
