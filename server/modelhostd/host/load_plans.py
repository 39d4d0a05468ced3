"""What a load would be: whether the model can be loaded at all, the bytes it takes, what it would do now."""

from collections.abc import Collection, Sequence

from modelhostd.core import operations as op_rules
from modelhostd.core import registry as model_rules
from modelhostd.core import residency as rules
from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.resources import Model, Tier
from modelhostd.core.state import instance_key
from modelhostd.core.values import dataclass
from modelhostd.host.admission import Admission
from modelhostd.host.crashes import Crashes
from modelhostd.host.learned import load_timeout_s
from modelhostd.host.occupancy import Occupancy
from modelhostd.host.routes import Route
from modelhostd.host.wanted import Wanted
from modelhostd.ports import LoadSpec


@dataclass(frozen=True, slots=True)
class Preview:
    """What a load would do now; promises nothing.

    ``stays_warm`` has those of the plan's victims that keep their copies in host memory; ``dropped`` lose theirs
    in favour of the ``host_bytes`` that this model's copy takes there (0 = there is none).
    """

    plan: rules.Plan
    bytes: int
    source: Tier = Tier.DISK
    host_bytes: int = 0
    stays_warm: Collection[str] = ()
    dropped: Sequence[str] = ()


class LoadPlans:
    """Makes loads and looks at them; begins none."""

    def __init__(self, occupancy: Occupancy, crashes: Crashes, admission: Admission) -> None:
        self._occupancy = occupancy
        self._registry = occupancy.registry
        self._crashes = crashes
        self._admission = admission
        self._number = 0

    def check_loadable(self, model: Model) -> None:
        """Raise MODEL_NOT_DOWNLOADED, MODEL_BLOCKED or CONFLICTING_OPERATION (it is being deleted)."""
        artifact = model.available
        if artifact is None:
            raise model_rules.not_downloaded(model)
        blocked = self._crashes.blocked(model.id)
        if blocked is not None:
            raise blocked
        operations = self._registry.decided.operations.values()
        op_rules.refuse_while_deleted(operations, model.id, artifact.version)

    def check_can_fit(self, model: Model) -> None:
        """Raise MODEL_TOO_LARGE for a model on disk that fits no device, however empty; a loaded one fits."""
        if model.available is None or self._occupancy.routes.get(model.id) is not None:
            return
        try:
            plan, _ = self.plan_model(model)
        except ModelhostError:
            return  # Why it cannot be loaded now says nothing of its size.
        if isinstance(plan, rules.Refuse) and plan.error.reason is Reason.MODEL_TOO_LARGE:
            raise plan.error

    def check_worth(self, model: Model) -> None:
        """Raise what the model's last load failed with, if a request is not to try another one yet."""
        refusal = self._occupancy.refusal(model)
        if refusal is not None:
            raise refusal

    def is_worth(self, model: Model) -> bool:
        """Whether a request may try to load the model now, as far as its last load goes."""
        return self._occupancy.refusal(model) is None

    def plan(self, model_id: str, device: str = "") -> tuple[rules.Plan, int]:
        """Return what a load would do now, and the bytes it would take; changes nothing.

        Where it would wait, the plan says who would be drained once its grace has passed.
        """
        return self.plan_model(self._registry.committed.model(model_id), device)

    def plan_model(self, model: Model, device: str = "") -> tuple[rules.Plan, int]:
        """Return what a load of the model as it is given would do now."""
        wanted = self._new(model, device, None)
        wanted.since -= rules.BUSY_GRACE_S
        return self._admission.plan(wanted), wanted.bytes

    def preview(self, model_id: str, device: str = "") -> Preview:
        """Return what a load would do now to devices and to host memory; changes nothing."""
        model = self._registry.committed.model(model_id)
        plan, size = self.plan_model(model, device)
        if isinstance(plan, rules.Refuse):
            return Preview(plan, size)
        host, routes = self._occupancy.host, self._occupancy.routes
        leaving: Sequence[str] = ()
        if isinstance(plan, rules.Evict | rules.Wait):
            leaving = plan.victims if isinstance(plan, rules.Evict) else plan.drain
        found = [route for name in leaving if (route := routes.get(name)) is not None]
        stays_warm = {route.model for route in found if host.keeps(route)}
        warm = host.usable(model)
        if warm is not None and warm.device == plan.device:
            return Preview(plan, size, Tier.HOST, host.held_bytes(model_id), stays_warm)
        needed = self._occupancy.needed_host_bytes(model, plan.device)
        room = self._admission.room(model_id, needed)
        if room is None or host.keep_alive_s(model) == 0.0:
            return Preview(plan, size, stays_warm=stays_warm)
        stays_warm -= {*room.victims}
        return Preview(plan, size, host_bytes=needed, stays_warm=stays_warm, dropped=room.victims)

    def _new(self, model: Model, device: str, priority: int | None) -> Wanted:
        self.check_loadable(model)
        device = device or model.config.device
        if device:
            self._registry.decided.device(device)
        size = self._occupancy.learned.needed_bytes(model, device)
        now = self._registry.clock.monotonic()
        self._number += 1
        warm = self._occupancy.host.usable(model)
        return Wanted(
            number=self._number,
            model=model.id,
            bytes=size,
            working_bytes=self._occupancy.learned.working_bytes(model, device),
            device=device,
            priority=model.config.priority if priority is None else priority,
            since=now,
            deadline=now + load_timeout_s(model, size),
            generation=warm.generation if warm is not None else 0,
        )

    def loaded(self, route: Route) -> LoadSpec | None:
        """Return how the instance behind a route was loaded; None = that is not known any more."""
        found = self._occupancy.learned.measured.get(route.model)
        same = found is not None and found.spec.generation == route.generation
        return found.spec if found is not None and same else None

    def _ready_result(self, route: Route) -> dict[str, object]:
        return {
            "instance": instance_key(route.model, route.instance),
            "device": route.device,
            "backend": route.loaded.backend if route.loaded is not None else "",
            "measured_bytes": route.loaded.measured_bytes if route.loaded is not None else 0,
        }
