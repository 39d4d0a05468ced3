"""Upkeep: what time brings. Waits end at their deadlines, what nobody uses goes, and budgets hold."""

import asyncio

import structlog

from modelhostd.core import budgets
from modelhostd.core import residency as rules
from modelhostd.core.resources import Model
from modelhostd.host.loads import Loads
from modelhostd.host.occupancy import Occupancy
from modelhostd.host.retiring import Retiring
from modelhostd.host.routes import Route
from modelhostd.host.shortages import Shortages

log = structlog.get_logger(__name__)

TICK_S = 0.25


class Upkeep:
    """A ticker over what is in memory."""

    def __init__(
        self, occupancy: Occupancy, loads: Loads, retiring: Retiring, shortages: Shortages
    ) -> None:
        self._occupancy = occupancy
        self._registry = occupancy.registry
        self._routes = occupancy.routes
        self._loads = loads
        self._retiring = retiring
        self._shortages = shortages
        self._over_since: dict[str, float] = {}
        self._ticker: asyncio.Task[None] | None = None
        self._ticked = occupancy.registry.clock.monotonic()

    def start(self) -> None:
        """Start what ends waits, keeps keep_alive and enforces budgets."""
        self._ticker = asyncio.create_task(self._tick(), name="residency")

    def stop(self) -> None:
        """Do nothing any more."""
        if self._ticker is not None:
            self._ticker.cancel()

    def ticked_within(self, age_s: float) -> bool:
        """Whether the ticker ran within the last ``age_s`` seconds: for the watchdog."""
        return self._registry.clock.monotonic() - self._ticked <= age_s

    async def _tick(self) -> None:
        while True:
            await self._registry.clock.sleep(TICK_S)
            self._ticked = self._registry.clock.monotonic()
            try:
                now = self._registry.clock.monotonic()
                self._loads.expire(now)
                self._expire_idle(now)
                self._expire_warm(now)
                self._shortages.ease()
                self._drop_unwanted(now)
                self.enforce_budgets()
                self._loads.pump()
            except Exception:
                # The next tick finds the same state again; ending here would end every wait.
                log.exception("residency tick failed")

    def _expire_idle(self, now: float) -> None:
        for route in self._routes:
            model = self._free_to_go(route.model)
            if model is None or not route.open:
                continue
            keep = self._occupancy.keep_alive_s(model)
            busy = route.in_flight or self._routes.queued(route.model)
            if keep is not None and not busy and now - route.last_used >= keep:
                freed = self._occupancy.ledger.held(route.device, route.model)
                self._retiring.evict(route, "KEEP_ALIVE", _unused(route, freed, now))

    def _expire_warm(self, now: float) -> None:
        host = self._occupancy.host
        for route in list(host.warm.values()):
            model = self._registry.decided.models.get(route.model)
            if model is not None and host.usable(model) is None:
                self._retiring.drop(route.model, "OUTDATED", {})
                continue
            model = self._free_to_go(route.model)
            if model is None or host.comes_back(model.id):
                continue
            keep = host.keep_alive_s(model)
            if keep is not None and now - route.warm_since >= keep:
                freed = host.held_bytes(model.id)
                self._retiring.drop(model.id, "HOST_KEEP_ALIVE", _unused(route, freed, now))

    def _drop_unwanted(self, now: float) -> None:
        """Drop copies beside devices that would not be kept when their models leave: `host_keep_alive` became 0."""
        host = self._occupancy.host
        for route in self._routes:
            model = self._registry.decided.models.get(route.model)
            held = host.held_bytes(route.model)
            if model is not None and held and host.keep_alive_s(model) == 0.0:
                details = _unused(route, held, now)
                self._retiring.drop_copy(route.model, "HOST_KEEP_ALIVE", details)

    def _free_to_go(self, model_id: str) -> Model | None:
        """Return the model if neither a pin nor a lease keeps it."""
        decided = self._registry.decided
        model = decided.models.get(model_id)
        leased = any(lease.model == model_id for lease in decided.leases.values())
        return None if model is None or model.pinned or leased else model

    def enforce_budgets(self) -> None:
        """Take out who is above a budget that was shrunk, or that a load turned out to need more of."""
        now = self._registry.clock.monotonic()
        policy = self._occupancy.policy()
        for view in self._occupancy.views().values():
            if view.free_bytes >= 0:
                self._over_since.pop(view.id, None)
                continue
            lasted = now - self._over_since.setdefault(view.id, now)
            victims = budgets.over_budget(view, now, policy, busy=lasted >= rules.BUSY_GRACE_S)
            kept = policy.kept(view.holdings, {v.model for v in victims}, now)
            for victim in victims:
                route = self._routes.get(victim.model)
                if route is not None:
                    details = {
                        "overBytes": str(-view.free_bytes),
                        "freedBytes": str(victim.bytes),
                        "policy": policy.name,
                        "kept": kept,
                    }
                    self._retiring.evict(route, "OVER_BUDGET", details)
        self._retiring.relieve(self._occupancy.host.view())


def _unused(route: Route, freed_bytes: int, now: float) -> dict[str, str]:
    return {"idleSeconds": f"{now - route.last_used:.1f}", "freedBytes": str(freed_bytes)}
