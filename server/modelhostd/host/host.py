"""The host: builds its parts over the ports, starts them in order, and stops them in order."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import field, fields, replace

import structlog

from modelhostd.core import artifacts
from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.registry import check_etag
from modelhostd.core.resources import (
    Device,
    Kind,
    Operation,
    Settings,
    Tier,
)
from modelhostd.core.settings import check_settings
from modelhostd.core.state import SETTINGS_KEY, Edit
from modelhostd.core.values import dataclass
from modelhostd.host.beginnings import Beginnings
from modelhostd.host.departures import Departures
from modelhostd.host.fetched_loads import FetchedLoads
from modelhostd.host.fetching import Fetching
from modelhostd.host.foreign import ForeignUse
from modelhostd.host.health import HealthWatch
from modelhostd.host.inference import Inference
from modelhostd.host.leases import Leases
from modelhostd.host.models import Models
from modelhostd.host.occupancy import Occupancy
from modelhostd.host.operations import Operations
from modelhostd.host.receiving import Receiving
from modelhostd.host.registry import History, Registry
from modelhostd.host.registry_io import RegistryIo
from modelhostd.host.reloads import Reloads
from modelhostd.host.residency import Residency
from modelhostd.host.routes import Routes
from modelhostd.host.slots import Slots
from modelhostd.host.space import Space
from modelhostd.host.storage import Storage
from modelhostd.host.storage_upkeep import StorageUpkeep
from modelhostd.host.transfers import Transfers
from modelhostd.host.uploads import Uploads
from modelhostd.host.uses import Uses
from modelhostd.host.verification import Verification
from modelhostd.host.worker_counts import WorkerCounts
from modelhostd.ports import Clock, Database, Devices, Downloads, Files, Workers
from modelhostd.ports.uploads import Uploads as UploadsPort

log = structlog.get_logger(__name__)

CONFIGURATION = "configuration"
"""The principal of what a configuration that is read again changes."""


@dataclass(frozen=True, slots=True)
class HostConfig:
    """What the operator set and the host itself needs; everything else is the composition root's.

    ``budgets`` are bytes by device id; a device without one gets all but a headroom.
    """

    budgets: Mapping[str, int] = field(default_factory=dict)
    host_default_bytes: int = 0
    """Bytes of host memory for copies of weights where the settings say nothing."""
    settings_over: Callable[[Settings], Settings] = lambda stored: stored
    """Puts the settings that the operator configured over the stored ones, at each start."""
    history: History = field(default_factory=History)
    keep_operations: int = 1000
    keep_operations_s: float = 86_400.0
    downloads_per_host: int = 0
    """Downloads from one host at a time; 0 = as many as run at all."""
    health_interval_s: float = 60.0
    """Between two health checks of an instance; 0 = none by themselves."""


class Host:
    """Every part of the host. api calls the parts; nothing but the parts changes state."""

    def __init__(
        self,
        config: HostConfig,
        *,
        clock: Clock,
        database: Database,
        devices: Devices,
        downloads: Downloads,
        uploads: UploadsPort,
        files: Files,
        workers: Workers,
    ) -> None:
        self.config = config
        self.clock = clock
        self.registry = Registry(database, clock, config.history)
        self.operations = Operations(
            self.registry,
            keep_count=config.keep_operations,
            keep_age_s=config.keep_operations_s,
        )
        self.routes = Routes()
        occupancy = Occupancy(
            self.registry,
            self.operations,
            workers,
            files,
            self.routes,
            configured_budgets=config.budgets,
            host_default_bytes=config.host_default_bytes,
        )
        self.occupancy = occupancy
        self._beginnings = Beginnings(occupancy, devices, config.budgets, config.settings_over)
        self.residency = Residency(occupancy)
        self.health = HealthWatch(occupancy, self.residency, config.health_interval_s)
        self.leases = Leases(
            self.registry, self.residency.loads.pump, self.residency.budgets.check_hold
        )
        self.foreign = ForeignUse(occupancy, devices)
        departures = Departures()
        self.uses = Uses(self.registry, self.routes, files)
        self.space = Space(self.registry, self.routes, files, self.uses, departures)
        fetching = Fetching(
            self.registry,
            self.operations,
            downloads,
            files,
            self.space,
            departures,
            occupancy.text_memories,
        )
        self.transfers = Transfers(
            self.registry,
            self.operations,
            downloads,
            fetching,
            self.space,
            per_host=config.downloads_per_host,
        )
        self.storage_upkeep = StorageUpkeep(clock, self.transfers.waits, self.space, self.uses)
        receiving = Receiving(self.registry, self.operations, uploads, fetching, files, self.space)
        self.uploads = Uploads(self.registry, self.operations, receiving)
        self.models = Models(
            self.registry,
            self.operations,
            self.transfers,
            self.uploads,
            self.residency,
            downloads,
            files,
            occupancy.text_memories,
        )
        self.fetched_loads = FetchedLoads(
            self.registry, self.operations, self.transfers, self.residency
        )
        self.reloads = Reloads(self.registry, self.operations, self.residency)
        self.registry_io = RegistryIo(
            self.registry, self.transfers, occupancy.text_memories, self.residency.budgets.check
        )
        self.storage = Storage(
            self.registry, self.operations, files, self.space, self.uses, departures
        )
        self.verification = Verification(
            self.registry, self.operations, self.routes, files, departures
        )
        self.storage.judge = self.verification.judge
        self.slots = Slots(self.registry, self.operations, self.residency)
        self.inference = Inference(self.registry, self.residency, workers, self.routes, self.slots)
        self.start_time = clock.time()
        self.worker_counts = WorkerCounts(self.residency)
        workers.set_listener(self.worker_counts)

    async def start(self) -> None:
        """Open the registry, take up what the last run left, and begin work."""
        await self.registry.open()
        try:
            await self._take_up()
        except BaseException:
            await self.registry.close()
            raise
        await self.foreign.start()
        await self.storage_upkeep.start()
        self.verification.start()
        self.residency.start()
        self.health.start()
        self.leases.start()
        self.transfers.start()
        self._autoload()

    async def _take_up(self) -> None:
        """Commit what the last run left, as it is now."""
        first = self.registry.stage(await self._beginnings.edits())
        # Second: it looks at the operations as the first edits left them.
        second = self.registry.stage(artifacts.recovered(self.registry.decided))
        await first
        await second
        await self.storage.take_away_leftovers()
        await self.occupancy.text_memories.take_up(self.registry.decided.models.values())

    async def stop(self, grace_s: float) -> None:
        """Refuse new work, let requests in flight end within ``grace_s``, and close the registry.

        Downloads stop where they are and go on at the next start. Workers are the caller's to stop,
        between ``stop`` and ``close``.
        """
        self.inference.stop()
        self.leases.stop()
        await self.health.stop()
        await self.foreign.stop()
        await self.verification.stop()
        await self.fetched_loads.stop()
        await self.transfers.stop(grace_s)
        await self.operations.stop(grace_s)
        await self.residency.stop(grace_s)
        # Last: the requests that ended just now were uses, too.
        await self.storage_upkeep.stop()

    async def close(self) -> None:
        """Commit what is staged and close the database; nothing may be asked afterwards."""
        await self.residency.close()
        await self.registry.close()

    # --- settings -------------------------------------------------------------------------------

    async def update_settings(
        self, settings: Settings, changed: Sequence[str], etag: str = "", principal: str = ""
    ) -> Settings:
        """Take the fields named in ``changed`` from ``settings``; all of them act at once.

        Raises ETAG_MISMATCH, INVALID_ARGUMENT, or BUDGET_TOO_SMALL (of host memory), and then changes nothing.
        """
        current = self.registry.decided.settings
        check_etag("settings", etag, str(current.edit))
        updated = replace(current, **{name: getattr(settings, name) for name in changed})
        check_settings(updated)
        if updated != current:
            updated = replace(updated, edit=current.edit + 1)
            edit = Edit(Kind.SETTINGS, SETTINGS_KEY, updated, "SETTINGS_CHANGED")
            self.residency.budgets.check([edit])
            await self.registry.stage([edit], principal, stored=self._pump)
        else:
            await self.registry.stage(())
        return updated

    async def reconfigure(self, config: HostConfig) -> Sequence[ModelhostError]:
        """Take up the settings and budgets of a configuration that was read again; return why budgets were refused.

        What is refused stays as it was; the rest acts at once. Raises INVALID_ARGUMENT for another setting.
        """
        self.config = replace(
            self.config, budgets=config.budgets, settings_over=config.settings_over
        )
        settings = config.settings_over(self.registry.decided.settings)
        names = [f.name for f in fields(Settings) if f.name != "edit"]
        refused: list[ModelhostError] = []
        try:
            await self.update_settings(settings, names, principal=CONFIGURATION)
        except ModelhostError as error:
            if error.reason is not Reason.BUDGET_TOO_SMALL:
                raise
            refused.append(error)
            names.remove("host_budget_bytes")
            await self.update_settings(settings, names, principal=CONFIGURATION)
        budgets = self.residency.budgets
        return [*refused, *await budgets.configure(config.budgets, CONFIGURATION)]

    def _pump(self) -> None:
        self.transfers.settings_changed()
        self.residency.enforce_budgets()

    async def update_operation(
        self, key: str, *, priority: int | None = None, rate_limit: int | None = None
    ) -> Operation:
        """Change an operation that is not final; one that waits takes its new place at once."""
        updated = await self.transfers.update(key, priority=priority, rate_limit=rate_limit)
        if priority is not None:
            self.residency.loads.prioritise(key, priority)
        return updated

    def live_device(self, device: Device) -> Device:
        """Return a device with its bytes as the ledger has them now, and as one moment has them: decided, that is."""
        ledger = self.occupancy.ledger
        resident = sum(
            i.measured_bytes
            for i in self.registry.decided.instances.values()
            if i.device == device.id and i.tier is Tier.DEVICE
        )
        return replace(
            device,
            reserved_bytes=max(0, ledger.used(device.id) - resident),
            resident_bytes=resident,
            foreign_bytes=self.occupancy.foreign.get(device.id, 0),
        )

    def _autoload(self) -> None:
        """Load pinned models, active slots' models and those with ``autoload``."""
        decided = self.registry.decided
        active = {slot.model for slot in decided.slots.values()}
        for model in decided.models.values():
            if (model.pinned or model.config.autoload or model.id in active) and model.available:
                self.residency.loads.want_for_queue(model.id, "autoload")
