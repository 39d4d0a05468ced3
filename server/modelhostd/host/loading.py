"""Loads that run, from disk or from host memory: begun, and ended one way or another.

Rules:
1. Bytes are reserved in the ledger before a load starts, and released when it did not end well.
2. A swap-in that does not end well leaves the model WARM, or is done again from disk where the copy has gone.
"""

import asyncio
from dataclasses import replace

import structlog

from modelhostd.core import residency as rules
from modelhostd.core.budgets import check_loaded
from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.estimates import missing_bytes
from modelhostd.core.host_tier import HOST
from modelhostd.core.lifecycle import INSTANCE, step
from modelhostd.core.registry import needs_reload
from modelhostd.core.resources import (
    Artifact,
    DeviceKind,
    Instance,
    InstanceState,
    Isolation,
    Model,
)
from modelhostd.host import wanted as errors
from modelhostd.host.load_tasks import LoadTasks
from modelhostd.host.occupancy import changed
from modelhostd.host.routes import Route
from modelhostd.host.wanted import Wanted
from modelhostd.ports import Loaded, LoadSpec

log = structlog.get_logger(__name__)


class Loading(LoadTasks):
    """Begins loads from disk and from host memory, and says what becomes of those that fail."""

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
            predicted_bytes=wanted.bytes - wanted.working_bytes,
            working_bytes=wanted.working_bytes,
            artifact_version=artifact.version,
            config_edit=model.edit,
            config_stale=needs_reload(self._registry.decided.model(model.id).config, model.config),
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
        on_cpu = self._registry.decided.devices[route.device].kind is DeviceKind.CPU
        if route.left_bytes and on_cpu:
            # What is adopted there is where the weights are, not a copy of them.
            self._occupancy.ledger.release(HOST, wanted.model)
        route.keep = True
        instance = self._registry.decided.instance_of(wanted.model)
        assert instance is not None
        loading = replace(
            instance,
            state=step(INSTANCE, instance.state, InstanceState.LOADING),
            working_bytes=wanted.working_bytes,
            operation=wanted.operations[0] if wanted.operations else "",
        )
        self._start(wanted, route, loading, self._swap_in(wanted, route))

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
        refused: ModelhostError | None = None
        try:
            async with asyncio.timeout(left):
                loaded = await workers.load(
                    route.device, spec, lambda p: self._occupancy.report(wanted.operations, p)
                )
            refused = wanted.stopped_by or self._measured(wanted, route, spec, loaded)
            if refused is not None:
                # It was stopped at the moment of its end, or takes more than it can have.
                await workers.unload(route.device, route.instance, route.generation)
                raise refused
        except TimeoutError:
            self._unmake(wanted, route, errors.too_late(wanted))
        except asyncio.CancelledError:
            self._unmake(wanted, route, wanted.stopped_by or errors.cancelled(wanted))
            if wanted.stopped_by is None:
                raise
        except ModelhostError as error:
            if error is refused:
                # Not tried again with more memory: it was measured.
                self._unmake(wanted, route, error)
            else:
                self._failed(wanted, route, error)
        except Exception:
            log.exception("load failed unexpectedly", model=wanted.model)
            self._unmake(wanted, route, errors.unexpected(wanted))
        else:
            self._loaded(wanted, route, loaded)
        self._pump()

    def _measured(
        self, wanted: Wanted, route: Route, spec: LoadSpec, loaded: Loaded
    ) -> ModelhostError | None:
        """Note what a load really takes; return why it cannot stay, if it cannot."""
        self._occupancy.true_up(route.device, wanted.model, loaded, wanted.working_bytes)
        self._occupancy.learned.loaded(spec, loaded)
        try:
            check_loaded(self._occupancy.views()[route.device], wanted.model, wanted.bytes)
        except ModelhostError as error:
            return error
        return None

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
            self._take_back(wanted, route, errors.too_late(wanted))
        except asyncio.CancelledError:
            self._take_back(wanted, route, wanted.stopped_by or errors.cancelled(wanted))
            if wanted.stopped_by is None:
                raise
        except ModelhostError as error:
            if error.reason in (Reason.MODEL_NOT_LOADED, Reason.WORKER_LOST):
                # First: whoever cancels meanwhile must not find a copy that is going.
                route.lost = True
                # Idempotent: whatever is left of the copy goes before another one is made.
                await workers.unload(*at)
            self._not_swapped_in(wanted, route, error)
        except Exception:
            log.exception("swap-in failed unexpectedly", model=wanted.model)
            self._take_back(wanted, route, errors.unexpected(wanted))
        else:
            self._occupancy.true_up(route.device, wanted.model, loaded, wanted.working_bytes)
            self._occupancy.learned.swapped_in(wanted.model, loaded)
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
        elif final is None and self._may_evict_more(wanted, route, error):
            self._back_to_host(wanted, route, error)
            wanted.task = None
        else:
            self._take_back(wanted, route, final or error)

    def _take_back(self, wanted: Wanted, route: Route, error: ModelhostError) -> None:
        """Take back a swap-in that did not end well: the copy is where it was, or goes if it is to."""
        if route.lost or not wanted.swapping:
            self._unmake(wanted, route, error)
            return
        keep = route.keep
        self._back_to_host(wanted, route, error)
        if not keep:
            self._drop(wanted.model, "UNLOADED", {})
        self._ended(wanted, error)

    def _back_to_host(self, wanted: Wanted, route: Route, error: ModelhostError) -> None:
        """Note that a copy that was to be swapped in is where it was."""
        del self._tasks[wanted.model], self._wanted[wanted.model]
        self._occupancy.ledger.release(route.device, wanted.model)
        if route.left_bytes:
            self._occupancy.ledger.hold(HOST, wanted.model, route.left_bytes)
        self._occupancy.routes.remove(route)
        self._occupancy.host.add(route)
        instance = self._registry.decided.instance_of(wanted.model)
        assert instance is not None
        state = step(INSTANCE, instance.state, InstanceState.WARM)
        warm = replace(instance, state=state, working_bytes=0)
        self._registry.record(changed(warm, "NOT_LOADED", {"cause": error.reason.value}))

    def _failed(self, wanted: Wanted, route: Route, error: ModelhostError) -> None:
        blocked = self._crashes.blocked(wanted.model)
        final = wanted.stopped_by or blocked
        if final is None and error.reason is Reason.WORKER_LOST and wanted.retries:
            wanted.retries -= 1
            self._again(wanted, route, "WORKER_LOST")
        elif final is None and self._may_evict_more(wanted, route, error):
            self._again(wanted, route, "OUT_OF_DEVICE_MEMORY")
        else:
            model = self._registry.decided.models.get(wanted.model)
            if final is None and model is not None:
                if error.reason is Reason.OUT_OF_DEVICE_MEMORY:
                    view = self._occupancy.views()[route.device]
                    error.retry_delay_s = rules.retry_delay_s(model.id, view)
                now = self._registry.clock.monotonic()
                self._occupancy.learned.load_failed(model, error, now)
            self._unmake(wanted, route, final or error)

    def _may_evict_more(self, wanted: Wanted, route: Route, error: ModelhostError) -> bool:
        """Whether a load that found too little memory is tried once more, with more of it wanted."""
        model = self._registry.decided.models.get(wanted.model)
        if error.reason is not Reason.OUT_OF_DEVICE_MEMORY or not wanted.memory_retries:
            return False
        if model is None:
            return False
        wanted.memory_retries -= 1
        missing = missing_bytes(error.metadata)
        at = route.version, route.device
        return self._occupancy.learned.fell_short(model, *at, wanted.bytes, missing)


def _route(model: Model, instance: Instance) -> Route:
    return Route(
        model=model.id,
        instance=instance.id,
        generation=instance.generation,
        device=instance.device,
        version=instance.artifact_version,
        own_worker=instance.isolation is Isolation.PROCESS,
    )
