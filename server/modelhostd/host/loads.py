"""Loads: wanted, joined, planned, stopped.

Rules:
1. A wanted load ends: READY, refused, failed, cancelled, or at its deadline; its operations end with it.
2. A load never waits behind one that it does not compete with for bytes; one from host memory behind no other.
3. A load that is being stopped is joined by nobody: who comes then wants another one.
4. A load that only requests want makes nobody leave while none of them waits, and ends when none comes again.
"""

import asyncio
import math
from collections.abc import Callable
from dataclasses import replace

import structlog

from modelhostd.core import residency as rules
from modelhostd.core.claims import Claims
from modelhostd.core.errors import ModelhostError
from modelhostd.core.resources import (
    FINAL_STATES,
    Model,
    Operation,
    OperationKind,
    Phase,
)
from modelhostd.host import instances
from modelhostd.host import wanted as errors
from modelhostd.host.admission import Admission
from modelhostd.host.crashes import Crashes
from modelhostd.host.load_plans import LoadPlans
from modelhostd.host.loading import Loading
from modelhostd.host.occupancy import Occupancy
from modelhostd.host.registry import Request
from modelhostd.host.retiring import Retiring
from modelhostd.host.routes import Route
from modelhostd.host.wanted import Wanted
from modelhostd.ports import LoadSpec

log = structlog.get_logger(__name__)


class Loads(LoadPlans):
    """Every load that has not ended yet. ``retiring`` takes instances out of service for others."""

    def __init__(self, occupancy: Occupancy, crashes: Crashes, retiring: Retiring) -> None:
        super().__init__(occupancy, crashes, Admission(occupancy, retiring))
        self._operations = occupancy.operations
        self._retiring = retiring
        self._wanted: dict[str, Wanted] = {}
        occupancy.host.comes_back = self._wanted.__contains__
        self._stopping = False
        self.running = Loading(occupancy, crashes, self._ended, self.pump, retiring.drop)
        self.settled: Callable[[], None] = lambda: None
        """Called when a load has ended and its measured bytes stand in the ledger."""

    # --- asking ---------------------------------------------------------------------------------

    def get(self, model_id: str) -> Wanted | None:
        """Return the model's unfinished load, unless it is being stopped."""
        return self._wanted.get(model_id)

    def want(
        self,
        model_id: str,
        *,
        device: str = "",
        priority: int | None = None,
        keep: bool = False,
        on_demand: bool = False,
        principal: str = "",
        request: Request | None = None,
    ) -> "tuple[str, asyncio.Future[int]]":
        """Return the id of the operation that brings the model to READY, and when it is durable.

        With ``keep`` the load goes on even if its operation cannot be stored; ``on_demand``: requests that wait in
        the model's queue want it, and nobody else. Raises
        MODEL_NOT_DOWNLOADED, MODEL_BLOCKED, MODEL_TOO_LARGE, OUT_OF_DEVICE_MEMORY,
        CONFLICTING_OPERATION, SHUTTING_DOWN or DEVICE_NOT_FOUND at once.
        """
        model = self._registry.decided.model(model_id)
        route = self._occupancy.routes.get(model_id)
        if model_id not in self._wanted and route is not None and route.open:
            return self._operations.done_already(
                OperationKind.LOAD,
                model_id,
                self._ready_result(route),
                principal=principal,
                request=request,
            )
        wanted = self._wanted.get(model_id) or self._admitted(model, device, priority, on_demand)
        wanted.on_demand &= on_demand
        joined = self._joinable(wanted)
        if joined is not None:
            done = self._registry.stage((), principal, request, joined)
            self._attach(wanted, joined)
            return joined, done
        operation, _, done = self._operations.begin(
            OperationKind.LOAD,
            model=model_id,
            join_key=f"load:{model_id}",
            join=False,
            priority=wanted.priority,
            principal=principal,
            request=request,
            undone=lambda operation: self._undone(wanted, operation, keep),
        )
        self._attach(wanted, operation.id)
        return operation.id, done

    def want_for(
        self,
        model_id: str,
        operation: str,
        *,
        device: str = "",
        priority: int | None = None,
        before: LoadSpec | None = None,
    ) -> None:
        """Want a load on behalf of an operation that is there already; raises as ``want`` does.

        Where it fails, what was loaded ``before`` it is loaded again.
        """
        model = self._registry.decided.model(model_id)
        route = self._occupancy.routes.get(model_id)
        if model_id not in self._wanted and route is not None and route.open:
            result = self._ready_result(route)
            self._registry.record(self._operations.succeeded(operation, result))
            return
        wanted = self._wanted.get(model_id) or self._admitted(model, device, priority, False)
        wanted.on_demand = False
        wanted.before = before or wanted.before
        self._attach(wanted, operation)

    def want_for_queue(self, model_id: str, principal: str, lost: Route | None = None) -> None:
        """Load a model because requests wait for it or its worker was lost; a refusal ends them."""
        try:
            self.want(model_id, principal=principal, keep=True, on_demand=principal == "inference")
            if lost is not None and (wanted := self._wanted.get(model_id)) is not None:
                wanted.lost = lost
        except ModelhostError as error:
            log.warning("a model does not come back", model=model_id, reason=error.reason)
            self._occupancy.routes.fail(model_id, error)

    def _admitted(self, model: Model, device: str, priority: int | None, on_demand: bool) -> Wanted:
        """Return a new load that is not refused at once."""
        if self._stopping:
            raise errors.shutting_down(model.id)
        wanted = self._new(model, device, priority)
        wanted.on_demand = on_demand
        plan = self._admission.plan(wanted)
        if isinstance(plan, rules.Refuse) and self._occupancy.routes.get(model.id) is None:
            raise plan.error
        return wanted

    def _joinable(self, wanted: Wanted) -> str | None:
        """Return the LOAD that the caller joins: the load's own, or one that waited for its files."""
        operations = self._registry.decided.operations
        for key in wanted.operations:
            found = operations.get(key)
            if (
                found is not None
                and found.kind is OperationKind.LOAD
                and found.state not in FINAL_STATES
            ):
                return key
        waiting = self._registry.decided.active_operation(f"load:{wanted.model}")
        if waiting is None or waiting.id in self.running.stopped_operations(wanted.model):
            return None
        return waiting.id

    def _attach(self, wanted: Wanted, operation: str) -> None:
        self._wanted[wanted.model] = wanted
        if operation not in wanted.operations:
            # Not part of the operation's commit: should that fail, what it replaces is gone all the same.
            self._registry.record(
                instances.first(self._occupancy, self._crashes, wanted, operation)
            )
            wanted.operations.append(operation)
            self._operations.on_cancel(
                operation, lambda: self._cancel_operation(wanted.model, operation)
            )
            if wanted.task is not None:
                self._registry.record(self._operations.running(operation, Phase.LOADING))
        self.pump()

    def _undone(self, wanted: Wanted, operation: Operation, keep: bool) -> None:
        """Drop a waiting load whose only operation could not be stored: its caller was told so."""
        if operation.id in self._registry.decided.operations:
            return  # it runs already, and what runs stands
        if operation.id in wanted.operations:
            wanted.operations.remove(operation.id)
        needed = keep or wanted.operations or self._occupancy.routes.queued(wanted.model)
        if wanted.task is None and not needed and self._wanted.get(wanted.model) is wanted:
            self._ended(wanted, errors.cancelled(wanted))

    # --- stopping -------------------------------------------------------------------------------

    def cancel(
        self, model_id: str, error: ModelhostError | None = None, *, stays: bool = False
    ) -> None:
        """Stop the model's load, if there is one; with ``stays`` waiting requests want another."""
        wanted = self._wanted.pop(model_id, None)
        if wanted is None:
            return
        wanted.stopped_by = error or errors.cancelled(wanted)
        wanted.stays = stays
        if wanted.task is not None:
            wanted.task.cancel()
        else:
            self._ended(wanted, wanted.stopped_by)

    def _cancel_operation(self, model_id: str, operation: str) -> None:
        wanted = self._wanted.get(model_id)
        if wanted is not None and operation in wanted.operations:
            self.cancel(model_id)

    def prioritise(self, operation: str, priority: int) -> None:
        """Have the load of an operation, where it waits, wait with this priority from now on."""
        for wanted in self._wanted.values():
            if operation in wanted.operations:
                wanted.priority = priority
        self.pump()

    def restart(self, model_id: str) -> None:
        """Begin a running load anew, with the same operations: what it loads has changed."""
        old = self._wanted.get(model_id)
        if old is None or old.task is None:
            return
        new = self._new(self._registry.decided.model(model_id), old.device, old.priority)
        new.operations, old.operations = old.operations, []
        new.before = old.before
        self._wanted[model_id] = new
        old.stopped_by = errors.cancelled(old)
        old.task.cancel()

    def stop(self) -> None:
        """Begin no more loads and stop the unfinished ones."""
        self._stopping = True
        for model_id in list(self._wanted):
            self.cancel(model_id, errors.shutting_down(model_id))

    def expire(self, now: float) -> None:
        """End the waiting loads whose deadline has passed, or that nobody wants any more; running ones end by
        themselves.
        """
        for wanted in [w for w in self._wanted.values() if w.task is None]:
            wanted.alone_since = (
                min(wanted.alone_since, now) if self._is_alone(wanted) else math.inf
            )
            if now >= wanted.deadline:
                self._ended(wanted, errors.too_late(wanted))
            elif now - wanted.alone_since >= errors.ABANDONED_S:
                self._ended(wanted, errors.abandoned(wanted))

    def _is_alone(self, wanted: Wanted) -> bool:
        """Whether only requests want a load, and none of them waits at the moment."""
        return wanted.on_demand and not self._occupancy.routes.queued(wanted.model)

    # --- the pump -------------------------------------------------------------------------------

    def pump(self) -> None:
        """Let every waiting load do what the plan says now. Called after each change; never blocks."""
        if self._stopping:
            return
        claims = Claims()
        waiting = [w for w in self._wanted.values() if w.task is None and not self._is_alone(w)]
        for wanted in sorted(waiting, key=lambda w: (-w.priority, w.since)):
            full = self.running.count >= self._registry.decided.settings.max_concurrent_loads
            if full and wanted.model not in self._occupancy.host.warm:
                continue
            # One that ended may have pumped: things are as they are now, not as they were above.
            current = self._wanted.get(wanted.model) is wanted and wanted.task is None
            if current and self._occupancy.routes.get(wanted.model) is None:
                self._advance(wanted, claims)

    def _advance(self, wanted: Wanted, claims: Claims) -> None:
        """Do the next step of one waiting load."""
        model = self._registry.decided.models.get(wanted.model)
        if model is None or model.available is None:
            self._ended(wanted, errors.no_files(wanted, model))
            return
        if wanted.instead is not None and wanted.instead.edit == model.edit:
            model = wanted.instead
        warm = self._occupancy.host.warm.get(model.id)
        if warm is not None and self._occupancy.host.usable(model) is None:
            self._replace(wanted)
            return
        match self._admission.advance(wanted, model, claims):
            case rules.Fits(device) if warm is not None and warm.device == device:
                self.running.swap_in(wanted, warm)
            case rules.Fits() if warm is not None:
                self._replace(wanted)
            case rules.Fits(device):
                self._begin(wanted, model, device)
            case rules.Refuse(error):
                self._ended(wanted, error)

    def _replace(self, wanted: Wanted) -> None:
        """Free the model's warm copy, which is of no use for this load; it begins when that has gone."""
        wanted.generation = 0
        self._retiring.drop(wanted.model, "REPLACED", {})

    def _begin(self, wanted: Wanted, model: Model, device: str) -> None:
        artifact = model.available
        assert artifact is not None
        instance = self._registry.decided.instance_of(model.id)
        if instance is None or instance.generation != wanted.generation:
            operation = wanted.operations[0] if wanted.operations else ""
            edits = instances.queued(self._occupancy, self._crashes, wanted, model, operation)
            self._registry.record(edits)
            instance = self._registry.decided.instance_of(model.id)
        assert instance is not None
        self.running.begin(wanted, model, artifact, replace(instance, device=device))

    def _restored(self, wanted: Wanted) -> bool:
        """Want again what served until a reload that failed; whether it can be had."""
        spec, model = wanted.before, self._registry.decided.models.get(wanted.model)
        if spec is None or model is None or wanted.stopped_by is not None or self._stopping:
            return False
        old = replace(model, config=spec.config, chosen_version=spec.version)
        if old.available is None or old.available.version != spec.version:
            return False
        try:
            again = self._new(old, "", None)
        except ModelhostError:
            return False  # It is blocked, or being deleted.
        again.instead = old
        self._wanted[model.id] = again
        if self._occupancy.routes.get(model.id) is None:
            self._registry.record(instances.queued(self._occupancy, self._crashes, again, old, ""))
        self.pump()
        return True

    def _ended(self, wanted: Wanted, error: ModelhostError | None) -> None:
        """Take a load that is over out of the table, and tell who waited for it."""
        another = self._wanted.get(wanted.model)
        if another is wanted:
            del self._wanted[wanted.model]
            another = None
        if error is None:
            self.settled()
            return
        edits = [e for key in wanted.operations for e in self._operations.failed(key, error)]
        edits += instances.remains(self._occupancy, self._crashes, wanted, error)
        self._registry.record(edits)
        if another is not None or self._restored(wanted):
            return  # who waits for the model waits for that one
        if wanted.stays and self._occupancy.routes.queued(wanted.model):
            self.want_for_queue(wanted.model, "inference")
        else:
            self._occupancy.routes.fail(wanted.model, error)
