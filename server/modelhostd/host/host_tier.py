"""Host memory as the host sees it: which models' weights are there, and what may be kept there.

A model on a device may have a copy of its weights in host memory, which is what it goes back to when it
leaves the device: WARM. Its way there is kept closed in ``warm`` meanwhile, to be opened again by a swap-in.
Pins and leases keep models where they are: on a device, or WARM; not the copies of those on a device.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

from modelhostd.core import host_tier as rules
from modelhostd.core.eviction import Holding
from modelhostd.core.host_tier import HOST
from modelhostd.core.ledger import Ledger
from modelhostd.core.residency import DeviceView
from modelhostd.core.resources import DeviceKind, InstanceState, Model, Settings
from modelhostd.host.registry import Registry
from modelhostd.host.routes import Route, Routes


class HostTier:
    """Who holds how much of host memory. ``warm`` has the routes of those that are on no device, by model id."""

    def __init__(
        self,
        registry: Registry,
        ledger: Ledger,
        routes: Routes,
        foreign: Mapping[str, int],
        default_bytes: int,
    ) -> None:
        self._registry = registry
        self._ledger = ledger
        self._routes = routes
        self._foreign = foreign
        self._default_bytes = default_bytes
        self.warm: dict[str, Route] = {}
        self.comes_back: Callable[[str], bool] = lambda model: False
        """Whether a load of the model waits: its copy is needed."""
        self.load_s: Callable[[str], float] = lambda model: 0.0
        """What a load of the model takes from disk."""

    @property
    def budget_bytes(self) -> int:
        """The bytes that weights may take: the setting, or by default what the machine can spare."""
        return self.budget_of(self._registry.decided.settings)

    def budget_of(self, settings: Settings) -> int:
        """Return the bytes that weights may take under these settings."""
        own = settings.host_budget_bytes
        return self._default_bytes if own is None else own

    @property
    def capacity_bytes(self) -> int:
        """The budget, or less where other processes and models on ``cpu`` need the memory."""
        real = self._real_bytes
        return self.budget_bytes if real is None else max(0, min(self.budget_bytes, real))

    @property
    def _real_bytes(self) -> int | None:
        """What the machine has for weights, whatever the budget is; None = that is not known."""
        cpu = self._registry.decided.devices.get("cpu")
        if cpu is None or cpu.kind is not DeviceKind.CPU:
            return None
        taken = self._foreign.get(cpu.id, 0) + self._ledger.used(cpu.id)
        return cpu.total_bytes - taken - rules.HEADROOM_BYTES

    @property
    def used_bytes(self) -> int:
        """The bytes that weights take, warm or beside those on devices, promised ones included."""
        return self._ledger.used(HOST)

    @property
    def warm_bytes(self) -> int:
        """Of those, the bytes of models that are on no device."""
        return sum(self._ledger.held(HOST, model) for model in self.warm)

    def held_bytes(self, model: str) -> int:
        """Return the bytes that one model's weights take."""
        return self._ledger.held(HOST, model)

    def view(self, claimed_bytes: int = 0) -> DeviceView:
        """Return host memory as the planner sees it now."""
        decided = self._registry.decided
        leased = {lease.model for lease in decided.leases.values()}
        holdings = [
            self._holding(model, size, model in leased)
            for model, size in self._ledger.of(HOST).items()
        ]
        return DeviceView(HOST, self.capacity_bytes, holdings, claimed_bytes)

    def shortage(self) -> DeviceView | None:
        """Return host memory with what the machine has in place of the budget, where that is less than is there now."""
        real = self._real_bytes
        if real is None or self.used_bytes <= real:
            return None
        return replace(self.view(), capacity_bytes=max(0, real))

    def usable(self, model: Model) -> Route | None:
        """Return the way to the model's warm copy, if a load would take just those weights."""
        route, artifact = self.warm.get(model.id), model.available
        if route is None or artifact is None or route.version != artifact.version:
            return None
        instance = self._registry.decided.instance_of(model.id)
        return route if instance is not None and not instance.config_stale else None

    def keeps(self, route: Route) -> bool:
        """Whether an instance that leaves its device now stays in host memory."""
        model = self._registry.decided.models.get(route.model)
        if model is None or not self._ledger.held(HOST, route.model):
            return False
        if route.given_up:
            return False
        if self.keep_alive_s(model) == 0.0:
            return False
        view = self.view()
        going = sum(h.bytes for h in view.holdings if h.state is InstanceState.DRAINING)
        return view.free_bytes + going >= 0

    def keep_alive_s(self, model: Model) -> float | None:
        """Return after how many seconds a model that left its device goes from here, too; None = never."""
        own = model.config.host_keep_alive_s
        keep = own if own is not None else self._registry.decided.settings.host_keep_alive_s
        return keep if keep is None or keep >= 0 else None

    def add(self, route: Route) -> None:
        """Note an instance that has left its device, and stays here."""
        route.draining = False
        route.warm_since = self._registry.clock.monotonic()
        self.warm[route.model] = route

    def _holding(self, model_id: str, size: int, leased: bool) -> Holding:
        warm = self.warm.get(model_id)
        route = warm or self._routes.get(model_id)
        model = self._registry.decided.models.get(model_id)
        state = InstanceState.READY if warm is None else InstanceState.WARM
        if route is not None and (route.leaving or route.copy_goes):
            state = InstanceState.DRAINING
        # While its model moves, a copy goes by what becomes of that.
        stays = route is not None and route.open and not route.given_up
        return Holding(
            model=model_id,
            device=HOST,
            bytes=size,
            state=state,
            queued=self._routes.queued(model_id) + self.comes_back(model_id),
            pinned=warm is not None and model is not None and model.pinned,
            leased=warm is not None and leased,
            last_used=route.last_used if route else 0.0,
            second_last_use=route.uses.second_last if route else float("-inf"),
            load_s=self.load_s(model_id),
            priority=model.config.priority if model else 0,
            bound=warm is None and not stays,
        )
