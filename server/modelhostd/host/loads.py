"""Loads: wanted, planned, begun, and ended one way or another.

Rules:
1. Bytes are reserved in the ledger before a load starts, and released when it did not end well.
2. A wanted load ends: loaded, refused, failed, cancelled, or at its deadline.
3. A load never waits behind one that it does not compete with for bytes.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import structlog

from modelhostd.core import operations as op_rules
from modelhostd.core import registry as model_rules
from modelhostd.core import residency as rules
from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.lifecycle import INSTANCE, step
from modelhostd.core.resources import (
    Artifact,
    Health,
    Instance,
    InstanceState,
    Isolation,
    Model,
    Operation,
    OperationKind,
    Phase,
    Tier,
)
from modelhostd.core.state import Edit, instance_key
from modelhostd.host.crashes import Crashes
from modelhostd.host.occupancy import Occupancy, changed, gone, load_timeout_s, predicted_bytes
from modelhostd.host.registry import Request
from modelhostd.host.routes import Route
from modelhostd.ports import Loaded, LoadSpec

log = structlog.get_logger(__name__)

WORKER_LOST_RETRIES = 1


@dataclass(slots=True, eq=False)
class Wanted:
    """A load that waits for memory or runs. Times are monotonic seconds."""

    model: str
    operation: str
    bytes: int
    device: str
    priority: int
    since: float
    deadline: float
    task: asyncio.Task[None] | None = None
    retries: int = WORKER_LOST_RETRIES
    stopped_by: ModelhostError | None = None
    evicted: list[str] = field(default_factory=list)


class Loads:
    """Every load that has not ended yet. ``drain`` takes an instance out of service for another."""

    def __init__(
        self,
        occupancy: Occupancy,
        crashes: Crashes,
        drain: Callable[[Route, str, dict[str, str]], None],
    ) -> None:
        self._occupancy = occupancy
        self._registry = occupancy.registry
        self._operations = occupancy.operations
        self._crashes = crashes
        self._drain = drain
        self._wanted: dict[str, Wanted] = {}
        self._generation = 0
        self._stopping = False
        self.settled: Callable[[], None] = lambda: None
        """Called when a load has ended and its measured bytes stand in the ledger."""

    # --- asking ---------------------------------------------------------------------------------

    def get(self, model_id: str) -> Wanted | None:
        """Return the model's unfinished load."""
        return self._wanted.get(model_id)

    def want(
        self,
        model_id: str,
        *,
        device: str = "",
        priority: int | None = None,
        principal: str = "",
        request: Request | None = None,
    ) -> tuple[str, "asyncio.Future[int]"]:
        """Return the id of the operation that brings the model to READY, and when it is durable.

        Raises MODEL_NOT_DOWNLOADED, MODEL_BLOCKED, MODEL_TOO_LARGE, OUT_OF_DEVICE_MEMORY or
        DEVICE_NOT_FOUND at once.
        """
        model = self._registry.decided.model(model_id)
        route = self._occupancy.routes.get(model_id)
        if model_id not in self._wanted and route is not None and route.open:
            return self._ready_already(route, principal, request)
        if model_id not in self._wanted:
            wanted = self._new(model, device, priority)
            self._refuse_at_once(wanted)
            self._wanted[model_id] = wanted
        else:
            wanted = self._wanted[model_id]

        def edits(operation: Operation) -> Sequence[Edit]:
            # While the old instance is on its way out, the new one is made when that has gone.
            return () if route is not None else self._queued(model, operation.id, wanted.device)

        try:
            operation, _, done = self._operations.begin(
                OperationKind.LOAD,
                model=model_id,
                join_key=f"load:{model_id}",
                principal=principal,
                request=request,
                edits=edits,
            )
        except ModelhostError:
            self._wanted.pop(model_id, None)
            raise
        if not wanted.operation:
            # New, or one that has waited for the model's files (fetched_loads) and goes on here.
            wanted.operation = operation.id
            self._operations.on_cancel(operation.id, lambda: self.cancel(model_id))
        self.pump()
        return operation.id, done

    def cancel(self, model_id: str, error: ModelhostError | None = None) -> None:
        """End the model's load, if there is one."""
        wanted = self._wanted.get(model_id)
        if wanted is None or wanted.stopped_by is not None:
            return
        wanted.stopped_by = error or _cancelled(wanted)
        if wanted.task is not None:
            wanted.task.cancel()
        else:
            self._failed(wanted, wanted.stopped_by)

    def stop(self) -> None:
        """Begin no more loads and end the unfinished ones."""
        self._stopping = True
        for wanted in list(self._wanted.values()):
            self.cancel(
                wanted.model,
                ModelhostError(
                    Reason.SHUTTING_DOWN,
                    f"the daemon stopped while model '{wanted.model}' was loading; load it again",
                    retry_delay_s=2.0,
                ),
            )

    def expire(self, now: float) -> None:
        """End the waiting loads whose deadline has passed; running ones end by themselves."""
        for wanted in list(self._wanted.values()):
            if now >= wanted.deadline and wanted.task is None:
                self._failed(wanted, _too_late(wanted))

    # --- the pump -------------------------------------------------------------------------------

    def pump(self) -> None:
        """Let every waiting load do what the plan says now. Called after each change; never blocks."""
        if self._stopping:
            return
        claimed: dict[str, int] = {}
        waiting = sorted(
            (w for w in self._wanted.values() if w.task is None),
            key=lambda w: (-w.priority, w.since),
        )
        loading = sum(w.task is not None for w in self._wanted.values())
        for wanted in waiting:
            if loading >= self._registry.decided.settings.max_concurrent_loads:
                return
            if self._occupancy.routes.get(wanted.model) is None:
                loading += self._advance(wanted, claimed)

    def _advance(self, wanted: Wanted, claimed: dict[str, int]) -> int:
        """Do the next step of one waiting load; returns 1 when its load started."""
        views = {
            key: replace(view, claimed_bytes=claimed.get(key, 0))
            for key, view in self._occupancy.views().items()
        }
        now = self._registry.clock.monotonic()
        plan = rules.plan(_ask(wanted), views, now, self._occupancy.min_residency_s())
        match plan:
            case rules.Fits(device):
                self._begin(wanted, device)
                return 1
            case rules.Refuse(error):
                self._failed(wanted, error)
            case rules.Evict(device, victims):
                self._evict(victims, "EVICTED", wanted)
                claimed[device] = claimed.get(device, 0) + wanted.bytes
            case rules.Wait(device, drain):
                self._evict(drain, "EVICTED_WHEN_IDLE", wanted)
                claimed[device] = claimed.get(device, 0) + wanted.bytes
        return 0

    def _evict(self, victims: Sequence[str], reason: str, wanted: Wanted) -> None:
        for victim in victims:
            route = self._occupancy.routes.get(victim)
            if route is None:
                continue
            progress = self._operations.progress(wanted.operation)
            if progress.phase is not Phase.EVICTING:
                self._operations.report(wanted.operation, replace(progress, phase=Phase.EVICTING))
            details = {
                "for": wanted.model,
                "neededBytes": str(wanted.bytes),
                "freedBytes": str(self._occupancy.ledger.held(route.device, victim)),
                "policy": self._registry.decided.settings.eviction_policy,
            }
            self._drain(route, reason, details)
            wanted.evicted.append(victim)

    # --- one load -------------------------------------------------------------------------------

    def _begin(self, wanted: Wanted, device: str) -> None:
        model = self._registry.decided.models.get(wanted.model)
        artifact = model.available if model is not None else None
        if model is None or artifact is None:
            self._failed(wanted, _cancelled(wanted))
            return
        instance = self._registry.decided.instance_of(model.id)
        if instance is None or instance.state is not InstanceState.QUEUED:
            self._registry.record(self._queued(model, wanted.operation, device))
            instance = self._registry.decided.instance_of(model.id)
        assert instance is not None
        self._occupancy.ledger.reserve(device, model.id, wanted.bytes)
        loading = replace(
            instance,
            device=device,
            state=step(INSTANCE, instance.state, InstanceState.LOADING),
            predicted_bytes=wanted.bytes,
            artifact_version=artifact.version,
            config_edit=model.edit,
            operation=wanted.operation,
        )
        route = _route(model, loading)
        self._occupancy.routes.put(route)
        self._registry.record(
            [
                *changed(loading, "LOADING"),
                *self._operations.running(wanted.operation, Phase.LOADING),
            ]
        )
        spec = self._spec(model, artifact, loading)
        task = asyncio.create_task(self._load(wanted, route, spec), name=f"load {model.id}")
        wanted.task = task
        task.add_done_callback(lambda t: self._ended(wanted, route, t))

    def _ended(self, wanted: Wanted, route: Route, task: "asyncio.Task[None]") -> None:
        """Take back a load that was cancelled before its first step: no handler of its own ran."""
        if self._wanted.get(wanted.model) is wanted and wanted.task is task:
            self._unmake(wanted, route, wanted.stopped_by or _cancelled(wanted))
            self.pump()

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
        )

    async def _load(self, wanted: Wanted, route: Route, spec: LoadSpec) -> None:
        left = max(0.0, wanted.deadline - self._registry.clock.monotonic())
        try:
            async with asyncio.timeout(left):
                loaded = await self._occupancy.workers.load(
                    route.device, spec, lambda p: self._operations.report(wanted.operation, p)
                )
        except TimeoutError:
            self._unmake(wanted, route, _too_late(wanted))
        except asyncio.CancelledError:
            self._unmake(wanted, route, wanted.stopped_by or _cancelled(wanted))
            if wanted.stopped_by is None:
                raise
        except ModelhostError as error:
            if error.reason is Reason.WORKER_LOST and wanted.retries:
                self._again(wanted, route)
            else:
                self._unmake(wanted, route, error)
        except Exception:
            log.exception("load failed unexpectedly", model=wanted.model)
            self._unmake(wanted, route, _unexpected(wanted))
        else:
            self._loaded(wanted, route, loaded)
        self.pump()

    def _loaded(self, wanted: Wanted, route: Route, loaded: Loaded) -> None:
        clock = self._registry.clock
        self._wanted.pop(wanted.model, None)
        self._occupancy.ledger.true_up(route.device, wanted.model, loaded.measured_bytes)
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
        self._registry.record(
            [
                *changed(ready, "READY", details),
                *self._operations.succeeded(wanted.operation, result),
            ]
        )
        self._occupancy.routes.open(route, clock)
        self.settled()

    def _again(self, wanted: Wanted, route: Route) -> None:
        """Put a load whose worker was lost back into the queue, once."""
        wanted.retries -= 1
        wanted.task = None
        self._occupancy.ledger.release(route.device, wanted.model)
        self._occupancy.routes.remove(route)
        instance = self._registry.decided.instance_of(wanted.model)
        if instance is not None:
            queued = replace(instance, state=step(INSTANCE, instance.state, InstanceState.QUEUED))
            self._registry.record(changed(queued, "WORKER_LOST"))

    def _unmake(self, wanted: Wanted, route: Route, error: ModelhostError) -> None:
        """Take back a load that did not end well."""
        self._occupancy.ledger.release(route.device, wanted.model)
        self._occupancy.routes.remove(route)
        self._failed(wanted, error)

    def _failed(self, wanted: Wanted, error: ModelhostError) -> None:
        self._wanted.pop(wanted.model, None)
        blocked = self._crashes.blocked(wanted.model)
        self._occupancy.routes.fail(wanted.model, error)
        edits = [*self._operations.failed(wanted.operation, error)]
        instance = self._registry.decided.instance_of(wanted.model)
        if instance is not None and instance.state in (
            InstanceState.QUEUED,
            InstanceState.LOADING,
        ):
            if error.reason in (Reason.CANCELLED, Reason.SHUTTING_DOWN):
                edits += gone(instance, error.reason.value)
            else:
                state = InstanceState.BLOCKED if blocked else InstanceState.FAILED
                failed = replace(
                    instance,
                    state=step(INSTANCE, instance.state, state),
                    tier=Tier.DISK,
                    error=op_rules.stored(blocked or error),
                )
                edits += changed(failed, "LOAD_FAILED", {"cause": error.reason.value})
        self._registry.record(edits)

    # --- small things ---------------------------------------------------------------------------

    def check_loadable(self, model: Model) -> None:
        """Raise MODEL_NOT_DOWNLOADED or MODEL_BLOCKED."""
        if model.available is None:
            raise model_rules.not_downloaded(model)
        blocked = self._crashes.blocked(model.id)
        if blocked is not None:
            raise blocked

    def plan(self, model_id: str, device: str = "") -> tuple[rules.Plan, int]:
        """Return what a load would do now, and the bytes it would take; changes nothing.

        Where it would wait, the plan says who would be drained once its grace has passed.
        """
        wanted = self._new(self._registry.committed.model(model_id), device, None)
        wanted.since -= rules.BUSY_GRACE_S
        return self._plan(wanted), wanted.bytes

    def _plan(self, wanted: Wanted) -> rules.Plan:
        views = self._occupancy.views()
        now = self._registry.clock.monotonic()
        return rules.plan(_ask(wanted), views, now, self._occupancy.min_residency_s())

    def _new(self, model: Model, device: str, priority: int | None) -> Wanted:
        self.check_loadable(model)
        device = device or model.config.device
        if device:
            self._registry.decided.device(device)
        size = predicted_bytes(model)
        now = self._registry.clock.monotonic()
        return Wanted(
            model=model.id,
            operation="",
            bytes=size,
            device=device,
            priority=model.config.priority if priority is None else priority,
            since=now,
            deadline=now + load_timeout_s(model, size),
        )

    def _refuse_at_once(self, wanted: Wanted) -> None:
        plan = self._plan(wanted)
        if isinstance(plan, rules.Refuse) and self._occupancy.routes.get(wanted.model) is None:
            raise plan.error

    def _ready_already(
        self, route: Route, principal: str, request: Request | None
    ) -> tuple[str, "asyncio.Future[int]"]:
        now = self._registry.clock.time()
        queued = op_rules.new(
            self._operations.new_id(),
            OperationKind.LOAD,
            now,
            model=route.model,
            principal=principal,
        )
        result = {
            "instance": instance_key(route.model, route.instance),
            "device": route.device,
            "measured_bytes": self._occupancy.ledger.held(route.device, route.model),
        }
        done = op_rules.succeeded(queued, now, result, queued.progress)
        return done.id, self._registry.stage([op_rules.edit(done)], principal, request, done.id)

    def _queued(self, model: Model, operation: str, device: str) -> Sequence[Edit]:
        """Return the edits that make the model's new instance, in place of what remains of an old."""
        old = self._registry.decided.instance_of(model.id)
        edits = [*gone(old, "REPLACED")] if old is not None else []
        self._generation += 1
        artifact = model.available
        queued = Instance(
            model=model.id,
            id=str(self._generation),
            generation=self._generation,
            device=device,
            state=InstanceState.QUEUED,
            tier=Tier.DISK,
            artifact_version=artifact.version if artifact else 0,
            predicted_bytes=predicted_bytes(model),
            create_time=self._registry.clock.time(),
            crash_count=self._crashes.count(model.id),
            config_edit=model.edit,
            operation=operation,
        )
        return [*edits, *changed(queued, "QUEUED")]


def _ask(wanted: Wanted) -> rules.Want:
    return rules.Want(wanted.model, wanted.bytes, wanted.device, wanted.priority, wanted.since)


def _route(model: Model, instance: Instance) -> Route:
    return Route(
        model=model.id,
        instance=instance.id,
        generation=instance.generation,
        device=instance.device,
        version=instance.artifact_version,
        own_worker=model.config.isolation is Isolation.PROCESS,
    )


def _cancelled(wanted: Wanted) -> ModelhostError:
    return ModelhostError(
        Reason.CANCELLED,
        f"loading model '{wanted.model}' was cancelled",
        {"operation": wanted.operation},
    )


def _unexpected(wanted: Wanted) -> ModelhostError:
    return ModelhostError(
        Reason.LOAD_FAILED,
        f"loading model '{wanted.model}' failed; the daemon's log has the cause",
        {"model": wanted.model},
    )


def _too_late(wanted: Wanted) -> ModelhostError:
    seconds = wanted.deadline - wanted.since
    return ModelhostError(
        Reason.LOAD_TIMEOUT,
        f"model '{wanted.model}' was not loaded within {seconds:g} s (config.load_timeout)",
        {"model": wanted.model, "timeoutSeconds": f"{seconds:g}"},
    )
