"""Budgets as commands: set by operators, by the configuration and by imports, and by none of them in vain."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from modelhostd.core import budgets as rules
from modelhostd.core.errors import ModelhostError, invalid
from modelhostd.core.resources import Device, Kind, Settings
from modelhostd.core.state import Edit
from modelhostd.host.occupancy import Occupancy


class Budgets:
    """Changes budgets. ``changed`` is called with each that is stored."""

    def __init__(self, occupancy: Occupancy, changed: Callable[[], None]) -> None:
        self._occupancy = occupancy
        self._registry = occupancy.registry
        self._changed = changed

    async def set(self, device_id: str, budget_bytes: int | None, principal: str = "") -> Device:
        """Change a device's budget; None = back to the default. A smaller one evicts.

        Raises INVALID_ARGUMENT for one below 1 byte or above the device's memory, BUDGET_TOO_SMALL for one below
        what pins and leases hold; the budget then is what it was.
        """
        device = self._registry.decided.device(device_id)
        if budget_bytes is None:
            budget_bytes = self._occupancy.default_budget_bytes(device)
        elif not 0 < budget_bytes <= device.total_bytes:
            expected = f"1 to {device.total_bytes}, or no value in the mask for the default"
            raise invalid("device.budget_bytes", expected, budget_bytes)
        if budget_bytes == device.budget_bytes:
            await self._registry.stage(())
            return device
        device = replace(device, budget_bytes=budget_bytes)
        edit = Edit(Kind.DEVICE, device_id, device, "BUDGET_CHANGED")
        self.check([edit])
        await self._registry.stage([edit], principal, stored=self._changed)
        return device

    async def configure(
        self, budgets: Mapping[str, int], principal: str
    ) -> Sequence[ModelhostError]:
        """Take up the budgets that are configured now, by device id or GPU UUID; return why one was refused."""
        self._occupancy.configured_budgets = budgets
        refused = []
        for device in list(self._registry.decided.devices.values()):
            if {device.id, device.uuid} & {*budgets}:
                try:
                    await self.set(device.id, None, principal)
                except ModelhostError as error:
                    refused.append(error)
        return refused

    def check(self, edits: Iterable[Edit]) -> None:
        """Raise BUDGET_TOO_SMALL where edits would make a budget smaller than what pins and leases hold there."""
        decided = self._registry.decided
        for edit in edits:
            now, new = decided.get(edit.kind, edit.key), edit.resource
            if isinstance(new, Device) and isinstance(now, Device):
                if new.budget_bytes < now.budget_bytes:
                    view = self._occupancy.views()[new.id]
                    rules.check_budget(view, f"devices/{new.id}", new.budget_bytes)
            elif isinstance(new, Settings):
                host = self._occupancy.host
                budget = host.budget_of(new)
                if budget < host.budget_bytes:
                    rules.check_budget(host.view(), "host memory", budget)

    def check_hold(self, model_id: str) -> None:
        """Raise OUT_OF_DEVICE_MEMORY for a pin or a lease that would keep its device above its budget for good."""
        route = self._occupancy.routes.get(model_id)
        device = self._registry.decided.devices.get(route.device) if route is not None else None
        if device is not None:
            view = self._occupancy.views()[device.id]
            rules.check_hold(view, device.budget_bytes, model_id)
