"""Who occupies which device and host memory: the ledger, the routes and the instances, seen together."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import field, replace

from modelhostd.core import residency as rules
from modelhostd.core.errors import ModelhostError
from modelhostd.core.estimates import Room
from modelhostd.core.eviction import Holding, Policy
from modelhostd.core.host_tier import HOST
from modelhostd.core.ledger import Ledger
from modelhostd.core.resources import (
    Device,
    DeviceKind,
    Instance,
    Kind,
    Model,
    Phase,
    Progress,
)
from modelhostd.core.state import Edit, instance_key
from modelhostd.core.values import dataclass
from modelhostd.host.host_tier import HostTier
from modelhostd.host.learned import Learned
from modelhostd.host.operations import Operations
from modelhostd.host.registry import Registry
from modelhostd.host.routes import Routes
from modelhostd.host.text_memories import TextMemories
from modelhostd.ports import Files, Loaded, Workers

CPU_SHARE = 0.25


@dataclass(slots=True)
class Occupancy:
    """What the parts of residency share. ``foreign`` has other processes' bytes by device."""

    registry: Registry
    operations: Operations
    workers: Workers
    files: Files
    routes: Routes
    ledger: Ledger = field(default_factory=Ledger)
    foreign: dict[str, int] = field(default_factory=dict)
    configured_budgets: Mapping[str, int] = field(default_factory=dict)
    """What the operator configured, by device id or GPU UUID."""
    host_default_bytes: int = 0
    """The host tier's budget where the settings say nothing."""
    generation: int = 0
    host: HostTier = field(init=False)
    learned: Learned = field(init=False)
    text_memories: TextMemories = field(init=False)

    def __post_init__(self) -> None:
        self.host = HostTier(
            self.registry, self.ledger, self.routes, self.foreign, self.host_default_bytes
        )
        self.text_memories = TextMemories(self.files)
        now = self.registry.clock.monotonic
        self.learned = Learned(self._room, self.text_memories.cache_bytes, now)
        self.host.load_s = lambda model: self.learned.reload_s(model, 0, warm=False)

    def next_generation(self) -> int:
        """Return a number for an instance, never used before in this run."""
        self.generation += 1
        return self.generation

    def _room(self, model: str, device: str) -> Room:
        """Return what there is for a model on a device: nothing where there is no such device."""
        view = self.views().get(device)
        if view is None:
            return Room(0, 0, 0)
        held = sum(h.bytes for h in view.holdings if h.held and h.model != model)
        return Room(view.capacity_bytes, max(0, view.free_bytes), view.capacity_bytes - held)

    def refusal(self, model: Model) -> ModelhostError | None:
        """Return why a request does not make the model load again now, if its last load failed."""
        if self.host.usable(model) is not None:
            return None
        return self.learned.refusal(model, self.registry.clock.monotonic())

    def needed_host_bytes(self, model: Model, device: str) -> int:
        """Return what a copy of the model's weights takes of host memory beside ``device``; 0 on the CPU,
        where the weights themselves are there.
        """
        if self.registry.decided.devices[device].kind is DeviceKind.CPU:
            return 0
        return self.learned.image_bytes(model)

    def true_up(self, device: str, model: str, loaded: Loaded, working_bytes: int) -> None:
        """Replace predicted by measured bytes; what is kept for requests stays reserved beside them."""
        self.ledger.true_up(device, model, loaded.measured_bytes + working_bytes)
        self.ledger.hold(HOST, model, loaded.host_bytes)

    def free(self, device: str, model: str) -> None:
        """Note that a model holds nothing any more, on its device or in host memory."""
        self.ledger.release(device, model)
        self.ledger.release(HOST, model)

    def report(self, operations: Sequence[str], progress: Progress) -> None:
        """Show a load's progress in all operations that end with it."""
        for operation in operations:
            self.operations.report(operation, progress)

    def report_phase(self, operations: Sequence[str], phase: Phase) -> None:
        """Show what a load is busy with."""
        for operation in operations:
            progress = self.operations.progress(operation)
            if progress.phase is not phase:
                self.operations.report(operation, replace(progress, phase=phase))

    def views(self) -> Mapping[str, rules.DeviceView]:
        """Return the devices as the planner sees them now."""
        decided = self.registry.decided
        leased = {lease.model for lease in decided.leases.values()}
        holdings: dict[str, list[Holding]] = {d: [] for d in decided.devices}
        for instance in decided.instances.values():
            if instance.device in holdings:
                holding = self._holding(instance, instance.model in leased)
                if holding is not None:
                    holdings[instance.device].append(holding)
        return {
            key: rules.DeviceView(
                key,
                self.capacity_bytes(device),
                tuple(holdings[key]),
                taken_bytes=min(device.budget_bytes, _most_bytes(device))
                - self.capacity_bytes(device),
                total_bytes=_most_bytes(device),
            )
            for key, device in decided.devices.items()
        }

    def _holding(self, instance: Instance, leased: bool) -> Holding | None:
        size = self.ledger.held(instance.device, instance.model)
        route = self.routes.get(instance.model)
        if route is None and not size:
            return None
        model = self.registry.decided.models.get(instance.model)
        return Holding(
            model=instance.model,
            device=instance.device,
            bytes=size,
            state=instance.state,
            in_flight=route.in_flight if route else 0,
            queued=self.routes.queued(instance.model),
            pinned=model.pinned if model else False,
            leased=leased,
            last_used=route.last_used if route else 0.0,
            second_last_use=route.uses.second_last if route else -math.inf,
            load_s=self.learned.reload_s(
                instance.model, size, warm=self.ledger.held(HOST, instance.model) > 0
            ),
            ready_since=route.ready_since if route else 0.0,
            priority=model.config.priority if model else 0,
        )

    def capacity_bytes(self, device: Device) -> int:
        """Return the bytes modelhost may use: the budget, or less where others use the device."""
        real = _most_bytes(device) - self.foreign.get(device.id, 0)
        return max(0, min(device.budget_bytes, real))

    def default_budget_bytes(self, device: Device) -> int:
        """Return the budget of a device that nobody changed while running.

        What is configured, else a GPU's total less headroom, a simulated device's total, and a
        quarter of RAM for ``cpu``.
        """
        named = self.configured_budgets
        configured = named.get(device.id, named.get(device.uuid))
        default = device.total_bytes - device.headroom_bytes
        if device.kind is DeviceKind.CPU:
            default = int(device.total_bytes * CPU_SHARE)
        return min(default if configured is None else configured, device.total_bytes)

    def policy(self) -> Policy:
        """Return who goes first when memory is short."""
        settings = self.registry.decided.settings
        return Policy(settings.eviction_policy, settings.min_residency_s)

    def keep_alive_s(self, model: Model) -> float | None:
        """Return after how many idle seconds a model goes, or None for never."""
        own = model.config.keep_alive_s
        keep = own if own is not None else self.registry.decided.settings.keep_alive_s
        return keep if keep is None or keep >= 0 else None


def _most_bytes(device: Device) -> int:
    """Return the largest budget that a device can fill."""
    return max(0, device.total_bytes - device.headroom_bytes)


def changed(
    instance: Instance, reason: str, details: Mapping[str, str] | None = None
) -> Sequence[Edit]:
    """Return the edits that store an instance."""
    key = instance_key(instance.model, instance.id)
    return [Edit(Kind.INSTANCE, key, instance, reason, details or {})]


def gone(
    instance: Instance, reason: str, details: Mapping[str, str] | None = None
) -> Sequence[Edit]:
    """Return the edits that remove an instance."""
    key = instance_key(instance.model, instance.id)
    return [Edit(Kind.INSTANCE, key, None, reason, details or {})]
