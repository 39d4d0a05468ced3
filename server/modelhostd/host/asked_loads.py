"""Loads as they are asked for: wanted, joined, or refused at once, and what hangs on each.

Rules:
1. A load that is being stopped is joined by nobody: who comes then wants another one.
2. Whoever wants a load has an operation of it, or waits in its model's queue.
"""

import abc
import asyncio

import structlog

from modelhostd.core import residency as rules
from modelhostd.core.errors import ModelhostError
from modelhostd.core.resources import FINAL_STATES, Model, Operation, OperationKind, Phase
from modelhostd.host import instances
from modelhostd.host import wanted as errors
from modelhostd.host.admission import Admission
from modelhostd.host.crashes import Crashes
from modelhostd.host.load_plans import LoadPlans
from modelhostd.host.occupancy import Occupancy
from modelhostd.host.registry import Request
from modelhostd.host.routes import Route
from modelhostd.host.wanted import Wanted
from modelhostd.ports import LoadSpec

log = structlog.get_logger(__name__)


class AskedLoads(LoadPlans, abc.ABC):
    """The table of loads that have not ended yet, and who wants them. What becomes of them is the subclass's."""

    def __init__(self, occupancy: Occupancy, crashes: Crashes, admission: Admission) -> None:
        super().__init__(occupancy, crashes, admission)
        self._operations = occupancy.operations
        self._wanted: dict[str, Wanted] = {}
        occupancy.host.comes_back = self._wanted.__contains__
        self._stopping = False

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
        if waiting is None or self._being_stopped(wanted.model, waiting.id):
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

    # --- of the subclass ------------------------------------------------------------------------

    @abc.abstractmethod
    def pump(self) -> None:
        """Let every waiting load do what the plan says now."""

    @abc.abstractmethod
    def _being_stopped(self, model_id: str, operation: str) -> bool:
        """Whether an operation is one of the model's load that is being stopped."""

    @abc.abstractmethod
    def _cancel_operation(self, model_id: str, operation: str) -> None:
        """Stop the model's load, if the operation is one of it."""

    @abc.abstractmethod
    def _ended(self, wanted: Wanted, error: ModelhostError | None) -> None:
        """Take a load that is over out of the table, and tell who waited for it."""
