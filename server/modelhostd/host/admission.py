"""Admission: asks the planner about a wanted load, and takes out of service who is in its way."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from modelhostd.core import residency as rules
from modelhostd.core.resources import Model, Phase
from modelhostd.host.occupancy import Occupancy
from modelhostd.host.routes import Route
from modelhostd.host.wanted import Wanted

KEPT_MAX = 8
"""How many of those that stay an eviction's event names, those that would go next first."""


class Admission:
    """Admits loads to devices. ``drain`` takes an instance out of service for another."""

    def __init__(
        self, occupancy: Occupancy, drain: Callable[[Route, str, dict[str, str]], None]
    ) -> None:
        self._occupancy = occupancy
        self._drain = drain

    def plan(self, wanted: Wanted) -> rules.Plan:
        """Return what a load would do now, were it alone; changes nothing."""
        # A model does not compete with itself: its old instance goes first.
        views = {
            key: replace(view, holdings=[h for h in view.holdings if h.model != wanted.model])
            for key, view in self._occupancy.views().items()
        }
        return self._plan(wanted, views)

    def advance(self, wanted: Wanted, model: Model, claimed: dict[str, int]) -> rules.Plan:
        """Plan a load and evict what the plan says; ``claimed`` has the bytes by device that the
        loads before it wait for, and grows by its own where it waits.
        """
        # The files or the config may be others than when it was asked for.
        wanted.bytes = self._occupancy.needed_bytes(model)
        views = {
            key: replace(view, claimed_bytes=claimed.get(key, 0))
            for key, view in self._occupancy.views().items()
        }
        plan = self._plan(wanted, views)
        match plan:
            case rules.Evict(device, victims):
                self._evict(victims, "EVICTED", wanted, views[device])
                claimed[device] = claimed.get(device, 0) + wanted.bytes
            case rules.Wait(device, drain):
                self._evict(drain, "EVICTED_WHEN_IDLE", wanted, views[device])
                claimed[device] = claimed.get(device, 0) + wanted.bytes
        return plan

    def _plan(self, wanted: Wanted, views: dict[str, rules.DeviceView]) -> rules.Plan:
        now = self._occupancy.registry.clock.monotonic()
        return rules.plan(wanted.ask, views, now, self._occupancy.policy())

    def _evict(
        self, victims: Sequence[str], reason: str, wanted: Wanted, view: rules.DeviceView
    ) -> None:
        policy = self._occupancy.policy()
        now = self._occupancy.registry.clock.monotonic()
        kept = [h.model for h in policy.order(view.holdings, now) if h.model not in victims]
        for victim in victims:
            route = self._occupancy.routes.get(victim)
            if route is None:
                continue
            self._occupancy.report_phase(wanted.operations, Phase.EVICTING)
            details = {
                "for": wanted.model,
                "neededBytes": str(wanted.bytes),
                "freedBytes": str(self._occupancy.ledger.held(route.device, victim)),
                "policy": policy.name,
                "kept": ",".join(kept[:KEPT_MAX]),
            }
            self._drain(route, reason, details)
            wanted.evicted.append(victim)
