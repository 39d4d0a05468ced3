"""Who occupies which device and host memory: the ledger, the routes and the instances, seen together."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import field, replace
from typing import NamedTuple

from modelhostd.core import residency as rules
from modelhostd.core.errors import ModelhostError
from modelhostd.core.eviction import Holding, Policy
from modelhostd.core.failed_loads import REMEMBERED, FailedLoad
from modelhostd.core.host_tier import HOST
from modelhostd.core.registry import needs_reload
from modelhostd.core.resources import (
    Device,
    DeviceKind,
    Instance,
    Kind,
    Model,
    ModelConfig,
    Phase,
    Progress,
)
from modelhostd.core.state import Edit, instance_key
from modelhostd.core.values import dataclass
from modelhostd.host.host_tier import HostTier
from modelhostd.host.operations import Operations
from modelhostd.host.registry import Registry
from modelhostd.host.routes import Routes
from modelhostd.ports import Files, Loaded, LoadSpec, Workers

CPU_SHARE = 0.25
LOAD_TIMEOUT_BASE_S = 120.0
LOAD_BYTES_PER_S = 50_000_000.0
LOAD_S_WEIGHT = 0.5
SHORT_BYTES_MIN = 256 << 20
"""What a load that found too little memory is taken to need more, at least."""
SWAP_BYTES_PER_S = 10e9
"""What a first swap-in is expected to copy in a second."""


class Measured(NamedTuple):
    """What the last load of a model really took, of its device and of host memory, and how it was loaded."""

    spec: LoadSpec
    bytes: int
    host_bytes: int


class Short(NamedTuple):
    """What a load is taken to need after one that found too little memory, and which model and where that was."""

    version: int
    config: ModelConfig
    device: str
    bytes: int


@dataclass(slots=True)
class Occupancy:
    """What the parts of residency share. ``foreign`` has other processes' bytes by device."""

    registry: Registry
    operations: Operations
    workers: Workers
    files: Files
    routes: Routes
    ledger: rules.Ledger = field(default_factory=rules.Ledger)
    foreign: dict[str, int] = field(default_factory=dict)
    configured_budgets: Mapping[str, int] = field(default_factory=dict)
    """What the operator configured, by device id or GPU UUID."""
    host_default_bytes: int = 0
    """The host tier's budget where the settings say nothing."""
    measured: dict[str, Measured] = field(default_factory=dict)
    """What the last load of each model really took: the truth after the prediction."""
    load_s: dict[str, float] = field(default_factory=dict)
    """What a load of each model takes from disk, the newer loads weighing more."""
    swap_s: dict[str, float] = field(default_factory=dict)
    """The same from host memory."""
    failed: dict[str, FailedLoad] = field(default_factory=dict)
    """The last load of each model whose last load failed."""
    short: dict[str, Short] = field(default_factory=dict)
    """The corrected estimate of each model whose last load found too little memory."""
    generation: int = 0
    host: HostTier = field(init=False)

    def __post_init__(self) -> None:
        self.host = HostTier(
            self.registry, self.ledger, self.routes, self.foreign, self.host_default_bytes
        )
        self.host.load_s = lambda model: self.load_s.get(model, 0.0)

    def next_generation(self) -> int:
        """Return a number for an instance, never used before in this run."""
        self.generation += 1
        return self.generation

    def needed_bytes(self, model: Model, device: str = "") -> int:
        """Return what loading the model takes: as measured when it was loaded so before, else as
        predicted.

        After a load that found too little memory it is more, but never more than it could be given: a guess
        evicts others, and refuses nothing.
        """
        found = self._known(model)
        needed = found.bytes if found is not None else predicted_bytes(model)
        short, artifact = self.short.get(model.id), model.available
        if short is None or artifact is None or short.version != artifact.version:
            return needed
        place = self.registry.decided.devices.get(device or short.device)
        if place is None or needs_reload(short.config, model.config):
            return needed
        return max(needed, min(short.bytes, self._most_bytes(model.id, place.id)))

    def fell_short(self, model: Model, version: int, device: str, size: int) -> bool:
        """Note that a load of ``size`` bytes found too little memory; whether another one would have more.

        The corrected estimate holds until a load has measured the truth.
        """
        most = self._most_bytes(model.id, device)
        corrected = min(most, size + max(size // 4, SHORT_BYTES_MIN))
        self.short[model.id] = Short(version, model.config, device, corrected)
        return corrected > size

    def _most_bytes(self, model: str, device: str) -> int:
        """Return what a load can have of a device once all has gone that neither a pin nor a lease holds."""
        view = self.views()[device]
        held = sum(h.bytes for h in view.holdings if h.held and h.model != model)
        return view.capacity_bytes - held

    def load_failed(self, model: Model, error: ModelhostError) -> None:
        """Remember a load that failed, if that tells something of the model."""
        if error.reason not in REMEMBERED or model.available is None:
            return
        version, now = model.available.version, self.registry.clock.monotonic()
        before = self.failed.get(model.id)
        if before is None:
            self.failed[model.id] = FailedLoad(version, model.edit, error, now)
        else:
            self.failed[model.id] = before.again(version, model.edit, error, now)

    def refusal(self, model: Model) -> ModelhostError | None:
        """Return why a request does not make the model load again now, if its last load failed."""
        known, artifact = self.failed.get(model.id), model.available
        if known is None or artifact is None or self.host.usable(model) is not None:
            return None
        return known.refusal(artifact.version, model.edit, self.registry.clock.monotonic())

    def needed_host_bytes(self, model: Model, device: str) -> int:
        """Return what a copy of the model's weights takes of host memory beside ``device``; 0 on the CPU,
        where the weights themselves are there.
        """
        if self.registry.decided.devices[device].kind is DeviceKind.CPU:
            return 0
        found = self._known(model)
        return found.host_bytes if found is not None else predicted_bytes(model)

    def _known(self, model: Model) -> Measured | None:
        """Return what was measured of the model as it is now: these files, this config."""
        found, artifact = self.measured.get(model.id), model.available
        if found is None or artifact is None or found.spec.version != artifact.version:
            return None
        return None if needs_reload(found.spec.config, model.config) else found

    def true_up(self, device: str, spec: LoadSpec, loaded: Loaded) -> None:
        """Replace predicted by measured bytes, and learn what a load takes."""
        model, size = spec.model, loaded.measured_bytes
        self.ledger.true_up(device, model, size)
        self.ledger.hold(HOST, model, loaded.host_bytes)
        host_bytes, before = loaded.host_bytes, self.measured.get(model)
        if not spec.keep_image:
            # It was told to keep no copy, which says nothing of what one takes.
            same = before is not None and before.spec.version == spec.version
            host_bytes = before.host_bytes if before and same else spec.predicted_bytes
        self.measured[model] = Measured(spec, size, host_bytes)
        _learn(self.load_s, model, loaded.load_s)
        self.failed.pop(model, None)
        self.short.pop(model, None)

    def swapped_in(self, device: str, model: str, loaded: Loaded) -> None:
        """Note what a swap-in took."""
        self.ledger.true_up(device, model, loaded.measured_bytes)
        self.ledger.hold(HOST, model, loaded.host_bytes)
        self.short.pop(model, None)
        _learn(self.swap_s, model, loaded.load_s)

    def free(self, device: str, model: str) -> None:
        """Note that a model holds nothing any more, on its device or in host memory."""
        self.ledger.release(device, model)
        self.ledger.release(HOST, model)

    def forget(self, model: str) -> None:
        """Forget what was learned of a deleted model: its id may come again."""
        known = (self.measured, self.load_s, self.swap_s, self.failed, self.short)
        for learned in known:
            learned.pop(model, None)

    def reload_s(self, model: str, size: int) -> float:
        """Return what coming back to the device is expected to take from where an eviction would leave it."""
        if not self.ledger.held(HOST, model):
            return self.load_s.get(model, 0.0)
        return self.swap_s.get(model, size / SWAP_BYTES_PER_S)

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
                taken_bytes=device.budget_bytes - self.capacity_bytes(device),
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
            load_s=self.reload_s(instance.model, size),
            ready_since=route.ready_since if route else 0.0,
            priority=model.config.priority if model else 0,
        )

    def capacity_bytes(self, device: Device) -> int:
        """Return the bytes modelhost may use: the budget, or less where others use the device."""
        real = device.total_bytes - device.headroom_bytes - self.foreign.get(device.id, 0)
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


def _learn(known: dict[str, float], model: str, seconds: float) -> None:
    before = known.get(model, seconds)
    known[model] = before + (seconds - before) * LOAD_S_WEIGHT


def predicted_bytes(model: Model) -> int:
    """Return what loading the model's newest artifact is expected to take of a device.

    The safetensors headers' sum where there are any, else the size of the files.
    """
    artifact = model.available
    if artifact is None:
        return 0
    return artifact.predicted_bytes or artifact.size_bytes


def load_timeout_s(model: Model, size: int) -> float:
    """Return the model's load timeout; by default 120 s and a second for each 50 MB."""
    own = model.config.load_timeout_s
    return own if own is not None else LOAD_TIMEOUT_BASE_S + size / LOAD_BYTES_PER_S


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
