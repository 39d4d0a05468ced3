"""Loads that run, from disk or from host memory: begun, and ended one way or another.

Rules:
1. Bytes are reserved in the ledger before a load starts, and released when it did not end well.
2. A swap-in that does not end well leaves the model WARM, or is done again from disk where the copy has gone.
"""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from functools import partial

import structlog

from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.host_tier import HOST
from modelhostd.core.lifecycle import INSTANCE, step
from modelhostd.core.resources import (
    Artifact,
    DeviceKind,
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

    ``ended`` is called with each load that is over, and the error that ended it (None = READY); ``again``
    with one that is to be begun anew; ``pump`` whenever memory or a place may have become free; ``drop`` with
    a model whose warm copy must go, and why.
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

    def begin(self, wanted: Wanted, model: Model, artifact: Artifact, instance: Instance) -> None:
        """Start a load on ``instance.device``, where ``wanted.bytes`` are free, and ``wanted.host_bytes`` in host
        memory where a copy is kept.
        """
        wanted.swapping = False
        self._occupancy.ledger.reserve(instance.device, model.id, wanted.bytes)
        self._occupancy.ledger.hold(HOST, model.id, wanted.host_bytes)
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
        if isolated is not None:
            self._registry.record(changed(instance, "ISOLATED", isolated))
        route = _route(model, loading)
        spec = self._spec(wanted, model, artifact, loading)
        self._start(wanted, route, loading, self._load(wanted, route, spec))

    def swap_in(self, wanted: Wanted, route: Route) -> None:
        """Start bringing a warm copy back to its device, where ``wanted.bytes`` are free."""
        wanted.swapping = True
        del self._occupancy.host.warm[wanted.model]
        self._occupancy.ledger.reserve(route.device, wanted.model, wanted.bytes)
        route.keep = True
        instance = self._registry.decided.instance_of(wanted.model)
        assert instance is not None
        loading = replace(
            instance,
            state=step(INSTANCE, instance.state, InstanceState.LOADING),
            operation=wanted.operations[0] if wanted.operations else "",
        )
        self._start(wanted, route, loading, self._swap_in(wanted, route))

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
            (self._warm_again if wanted.swapping else self._unmake)(wanted, route, error)
            self._pump()
        if not task.cancelled() and task.exception() is not None:
            log.error("load task failed", model=wanted.model, exc_info=task.exception())

    def _spec(
        self, wanted: Wanted, model: Model, artifact: Artifact, instance: Instance
    ) -> LoadSpec:
        kind = self._registry.decided.devices[instance.device].kind
        return LoadSpec(
            model=model.id,
            instance=instance.id,
            generation=instance.generation,
            version=artifact.version,
            model_dir=self._occupancy.files.model_dir(model.id, artifact.version),
            task=model.task,
            config=model.config,
            predicted_bytes=instance.predicted_bytes,
            # On the CPU the image is where the weights are, not a copy of them.
            keep_image=wanted.keeps_copy or kind is DeviceKind.CPU,
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
            self._occupancy.true_up(route.device, spec, loaded)
            self._loaded(wanted, route, loaded)
        self._pump()

    async def _swap_in(self, wanted: Wanted, route: Route) -> None:
        left = max(0.0, wanted.deadline - self._registry.clock.monotonic())
        workers, at = self._occupancy.workers, (route.device, route.instance, route.generation)
        try:
            async with asyncio.timeout(left):
                loaded = await workers.promote(
                    *at, lambda p: self._occupancy.report(wanted.operations, p)
                )
            if wanted.stopped_by is not None:
                # It was stopped at the moment of its end.
                route.lost = not await workers.demote(*at)
                raise wanted.stopped_by
        except TimeoutError:
            self._warm_again(wanted, route, errors.too_late(wanted))
        except asyncio.CancelledError:
            self._warm_again(wanted, route, wanted.stopped_by or errors.cancelled(wanted))
            if wanted.stopped_by is None:
                raise
        except ModelhostError as error:
            if error.reason in (Reason.MODEL_NOT_LOADED, Reason.WORKER_LOST):
                # Idempotent: whatever is left of the copy goes before another one is made.
                await workers.unload(*at)
                route.lost = True
            self._not_swapped_in(wanted, route, error)
        except Exception:
            log.exception("swap-in failed unexpectedly", model=wanted.model)
            self._warm_again(wanted, route, errors.unexpected(wanted))
        else:
            self._occupancy.swapped_in(route.device, wanted.model, loaded)
            self._loaded(wanted, route, loaded)
        self._pump()

    def _not_swapped_in(self, wanted: Wanted, route: Route, error: ModelhostError) -> None:
        blocked = self._crashes.blocked(wanted.model)
        final = wanted.stopped_by or blocked
        if final is None and route.lost:
            self._again(
                wanted, route, "WORKER_LOST" if error.reason is Reason.WORKER_LOST else "COPY_LOST"
            )
        elif route.lost:
            self._unmake(wanted, route, final or error)
        else:
            self._warm_again(wanted, route, final or error)

    def _warm_again(self, wanted: Wanted, route: Route, error: ModelhostError) -> None:
        """Take back a swap-in that did not end well: the copy is where it was, or goes if it is to."""
        if route.lost:
            self._unmake(wanted, route, error)
            return
        del self._tasks[wanted.model], self._wanted[wanted.model]
        self._occupancy.ledger.release(route.device, wanted.model)
        self._occupancy.routes.remove(route)
        keep = route.keep
        self._occupancy.host.add(route)
        instance = self._registry.decided.instance_of(wanted.model)
        assert instance is not None
        warm = replace(instance, state=step(INSTANCE, instance.state, InstanceState.WARM))
        self._registry.record(changed(warm, "NOT_LOADED", {"cause": error.reason.value}))
        if not keep:
            self._drop(wanted.model, "UNLOADED", {})
        self._ended(wanted, error)

    def _failed(self, wanted: Wanted, route: Route, error: ModelhostError) -> None:
        blocked = self._crashes.blocked(wanted.model)
        final = wanted.stopped_by or blocked
        if final is None and error.reason is Reason.WORKER_LOST and wanted.retries:
            wanted.retries -= 1
            self._again(wanted, route, "WORKER_LOST")
        else:
            self._unmake(wanted, route, final or error)

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
        if not wanted.swapping:
            # A swap-in brings back what was checked before.
            ready = replace(ready, health=Health.HEALTHY, health_time=clock.time())
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
            "source_tier": (Tier.HOST if wanted.swapping else Tier.DISK).value,
        }
        details = {
            "predictedBytes": str(instance.predicted_bytes),
            "measuredBytes": str(loaded.measured_bytes),
            "hostBytes": str(loaded.host_bytes),
            "sourceTier": (Tier.HOST if wanted.swapping else Tier.DISK).value,
        }
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
        if wanted.swapping:
            # An instance that is loaded from disk is another one.
            wanted.generation = 0

    def _unmake(self, wanted: Wanted, route: Route, error: ModelhostError) -> None:
        """Take back a load that did not end well."""
        del self._tasks[wanted.model], self._wanted[wanted.model]
        self._occupancy.free(route.device, wanted.model)
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
