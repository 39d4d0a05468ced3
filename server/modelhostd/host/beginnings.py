"""What a start finds: what the last daemon took with it, which devices there are, what the operator configured."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from modelhostd.core import operations as op_rules
from modelhostd.core.resources import Device, DeviceKind, Health, Instance, Kind, Settings
from modelhostd.core.settings import check_settings
from modelhostd.core.state import SETTINGS_KEY, Edit
from modelhostd.host.occupancy import Occupancy, gone
from modelhostd.ports import DeviceFacts, Devices

HEADROOM_MIN = 512 * 1024 * 1024


class Beginnings:
    """Makes the edits that every start begins with. ``settings_over`` puts the configured settings over the stored ones."""

    def __init__(
        self,
        occupancy: Occupancy,
        devices: Devices,
        budgets: Mapping[str, int],
        settings_over: Callable[[Settings], Settings],
    ) -> None:
        self._occupancy = occupancy
        self._registry = occupancy.registry
        self._devices = devices
        self._budgets = budgets
        self._settings_over = settings_over

    async def edits(self) -> Sequence[Edit]:
        """Return what there is to tell of the last run, of the devices and of the settings."""
        return [
            *self._ended_with_last_run(),
            *await self._found_devices(),
            *self._started_settings(),
        ]

    def _ended_with_last_run(self) -> Sequence[Edit]:
        """Return the edits that tell what the last daemon took with it: instances and leases are
        gone, unfinished operations queued again (downloads) or FAILED.
        """
        decided = self._registry.decided
        now = self._registry.clock.time()
        edits: list[Edit] = []
        for resource in list(decided.instances.values()):
            assert isinstance(resource, Instance)
            edits += gone(resource, "DAEMON_RESTARTED")
        edits += [
            Edit(Kind.LEASE, key, None, "DAEMON_RESTARTED", {"model": lease.model})
            for key, lease in decided.leases.items()
        ]
        for operation in decided.operations.values():
            after = op_rules.after_restart(operation, now)
            if after != operation:
                edits.append(op_rules.edit(after, "DAEMON_RESTARTED"))
        return edits

    async def _found_devices(self) -> Sequence[Edit]:
        known = self._registry.decided.devices
        edits: list[Edit] = []
        found = {facts.id: facts for facts in await self._devices.discover()}
        for key, facts in found.items():
            device = self._device(facts, known.get(key))
            if device != known.get(key):
                edits.append(Edit(Kind.DEVICE, key, device, "FOUND"))
        edits += [Edit(Kind.DEVICE, key, None, "LOST") for key in known if key not in found]
        return edits

    def _device(self, facts: DeviceFacts, known: Device | None) -> Device:
        kind = DeviceKind(facts.kind)
        headroom = 0
        if kind is DeviceKind.CUDA:
            headroom = max(HEADROOM_MIN, facts.total_bytes // 50)
        device = Device(
            id=facts.id,
            kind=kind,
            display_name=facts.display_name,
            uuid=facts.uuid,
            total_bytes=facts.total_bytes,
            budget_bytes=0,
            compute_capability=facts.compute_capability,
            driver_version=facts.driver_version,
            headroom_bytes=headroom,
            health=Health.HEALTHY,
        )
        budgets = self._budgets
        if (
            known is not None
            and known.uuid == facts.uuid
            and not {facts.id, facts.uuid} & {*budgets}
        ):
            # A budget that an operator set while running outlives the daemon.
            return replace(device, budget_bytes=min(known.budget_bytes, facts.total_bytes))
        return replace(device, budget_bytes=self._occupancy.default_budget_bytes(device))

    def _started_settings(self) -> Sequence[Edit]:
        """Return the edit that stores the configured settings where they differ from the stored."""
        stored = self._registry.decided.settings
        settings = self._settings_over(stored)
        check_settings(settings)
        known = SETTINGS_KEY in self._registry.decided.table(Kind.SETTINGS)
        if known and settings == stored:
            return ()
        if known:
            settings = replace(settings, edit=stored.edit + 1)
        return [Edit(Kind.SETTINGS, SETTINGS_KEY, settings, "CONFIGURED")]
