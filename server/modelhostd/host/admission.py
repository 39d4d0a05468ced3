"""Admission: asks the planner about a wanted load, and takes out of service who is in its way."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from modelhostd.core import host_tier as host_rules
from modelhostd.core import residency as rules
from modelhostd.core.claims import Claims
from modelhostd.core.host_tier import HOST
from modelhostd.core.resources import Model, Phase
from modelhostd.host.occupancy import Occupancy
from modelhostd.host.retiring import Retiring
from modelhostd.host.wanted import Wanted


class Admission:
    """Admits loads to devices, and their copies to host memory."""

    def __init__(self, occupancy: Occupancy, retiring: Retiring) -> None:
        self._occupancy = occupancy
        self._retiring = retiring

    def plan(self, wanted: Wanted) -> rules.Plan:
        """Return what a load would do now, were it alone; changes nothing."""
        # A model does not compete with itself: its old instance goes first.
        views = {
            key: replace(view, holdings=[h for h in view.holdings if h.model != wanted.model])
            for key, view in self._occupancy.views().items()
        }
        return self._plan(wanted, views)

    def room(self, model: str, needed_bytes: int) -> host_rules.Room | None:
        """Return what it would take to keep the model's copy in host memory; None = it would have none."""
        view = self._occupancy.host.view()
        view = replace(view, holdings=[h for h in view.holdings if h.model != model])
        now = self._occupancy.registry.clock.monotonic()
        return host_rules.make_room(view, needed_bytes, now, self._occupancy.policy())

    def advance(self, wanted: Wanted, model: Model, claims: Claims) -> rules.Plan:
        """Plan a load and evict what the plan says; ``claims`` has what the loads before it wait for, and grows by
        its own where it waits.
        """
        # The files or the config may be others than when it was asked for.
        wanted.bytes = self._occupancy.learned.needed_bytes(model, wanted.device)
        wanted.working_bytes = self._occupancy.learned.working_bytes(model, wanted.device)
        views = {key: claims.over(view) for key, view in self._occupancy.views().items()}
        plan = self._plan(wanted, views)
        match plan:
            case rules.Evict(device, victims):
                self._evict(victims, "EVICTED", wanted, views[device])
            case rules.Wait(device, drain=drain):
                self._evict(drain, "EVICTED_WHEN_IDLE", wanted, views[device])
            case rules.Fits(device) if not self._has_room(wanted, model, device, claims.bytes):
                plan = rules.Wait(device)
        if isinstance(plan, rules.Evict | rules.Wait):
            claims.bytes[plan.device] = claims.bytes.get(plan.device, 0) + wanted.bytes
        if isinstance(plan, rules.Wait):
            claims.behind.update(plan.behind)
        return plan

    def _plan(self, wanted: Wanted, views: Mapping[str, rules.DeviceView]) -> rules.Plan:
        now, policy = self._occupancy.registry.clock.monotonic(), self._occupancy.policy()
        model = self._occupancy.registry.decided.models.get(wanted.model)
        warm = self._occupancy.host.usable(model) if model is not None else None
        if warm is not None and wanted.device in ("", warm.device):
            # Its copy belongs to a worker of that device; elsewhere it would be loaded from disk.
            plan = rules.plan(replace(wanted.ask, device=warm.device), views, now, policy)
            if wanted.device or not isinstance(plan, rules.Refuse):
                return plan
        return rules.plan(wanted.ask, views, now, policy)

    def _has_room(self, wanted: Wanted, model: Model, device: str, claimed: dict[str, int]) -> bool:
        """Whether the load can begin as far as host memory goes: with a copy there, or without one.

        Where other copies make room for it they are dropped here, and the load waits until they have gone.
        """
        host = self._occupancy.host
        if model.id in host.warm:
            return True
        wanted.host_bytes = self._occupancy.needed_host_bytes(model, device)
        wanted.keeps_copy = host.budget_bytes > 0 and host.keep_alive_s(model) != 0.0
        if not wanted.keeps_copy or not wanted.host_bytes:
            wanted.host_bytes = 0
            return True
        now, policy = self._occupancy.registry.clock.monotonic(), self._occupancy.policy()
        view = host.view(claimed.get(HOST, 0))
        room = host_rules.make_room(view, wanted.host_bytes, now, policy)
        wanted.keeps_copy = room is not None
        if room is None or not room.waits:
            wanted.host_bytes *= wanted.keeps_copy
            return True
        kept = policy.kept(view.holdings, room.victims, now)
        for victim in room.victims:
            details = {
                "for": wanted.model,
                "neededBytes": str(wanted.host_bytes),
                "freedBytes": str(self._occupancy.ledger.held(HOST, victim)),
                "policy": policy.name,
                "kept": kept,
            }
            self._retiring.drop_copy(victim, "EVICTED_FROM_HOST", details)
        claimed[HOST] = claimed.get(HOST, 0) + wanted.host_bytes
        return False

    def _evict(
        self, victims: Sequence[str], reason: str, wanted: Wanted, view: rules.DeviceView
    ) -> None:
        policy = self._occupancy.policy()
        now = self._occupancy.registry.clock.monotonic()
        kept = policy.kept(view.holdings, victims, now)
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
                "kept": kept,
            }
            self._retiring.evict(route, reason, details)
            wanted.evicted.append(victim)
