"""Loads until they end: planned again at each change, begun, stopped.

Rules:
1. A wanted load ends: READY, refused, failed, cancelled, or at its deadline; its operations end with it.
2. A load never waits behind one that it does not compete with for bytes; one from host memory behind no other.
3. A load that only requests want makes nobody leave while none of them waits, and ends when none comes again.
"""

import math
from collections.abc import Callable
from dataclasses import replace

from modelhostd.core import residency as rules
from modelhostd.core.claims import Claims
from modelhostd.core.errors import ModelhostError
from modelhostd.core.resources import Model
from modelhostd.host import instances
from modelhostd.host import wanted as errors
from modelhostd.host.admission import Admission
from modelhostd.host.asked_loads import AskedLoads
from modelhostd.host.crashes import Crashes
from modelhostd.host.loading import Loading
from modelhostd.host.occupancy import Occupancy
from modelhostd.host.retiring import Retiring
from modelhostd.host.wanted import Wanted


class Loads(AskedLoads):
    """Every load that has not ended yet. ``retiring`` takes instances out of service for others."""

    def __init__(self, occupancy: Occupancy, crashes: Crashes, retiring: Retiring) -> None:
        super().__init__(occupancy, crashes, Admission(occupancy, retiring))
        self._retiring = retiring
        self.running = Loading(occupancy, crashes, self._ended, self.pump, retiring.drop)
        self.settled: Callable[[], None] = lambda: None
        """Called when a load has ended and its measured bytes stand in the ledger."""

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

    def _being_stopped(self, model_id: str, operation: str) -> bool:
        return operation in self.running.stopped_operations(model_id)

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
