"""What instances do right now: the figures that change with every request, and who would be evicted next."""

from collections.abc import Collection, Mapping, Sequence

from modelhost.v1 import instances_pb2
from modelhostd.api import convert_values
from modelhostd.core.eviction import Holding
from modelhostd.core.host_tier import HOST
from modelhostd.core.resources import Instance, InstanceState
from modelhostd.host import Host

_WARM = InstanceState.WARM
_Blocker = instances_pb2.InstanceActivity.EvictBlocker


class Activity:
    """The figures of all instances at one moment; make one for each answer."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._now = host.clock.monotonic()
        self._holdings: dict[str, Holding] = {}
        self._ranks: dict[str, int] = {}
        self._policy = host.occupancy.policy()
        for view in host.occupancy.views().values():
            self._rank(view.holdings, {h.model for h in view.holdings})
        # Of what is on a device its copy goes, too, and takes a place; but the model stays where it is.
        self._rank(host.occupancy.host.view().holdings, host.occupancy.host.warm)

    def _rank(self, holdings: Sequence[Holding], models: Collection[str]) -> None:
        """Note which of the models hold a place, and in which order they would be evicted from it."""
        self._holdings.update({h.model: h for h in holdings if h.model in models})
        evictable = [h for h in self._policy.order(holdings, self._now) if h.idle]
        # What came just now is guarded on devices only.
        gone = [h for h in evictable if h.device == HOST or not self._policy.young(h, self._now)]
        ranked = enumerate(gone, 1)
        self._ranks.update({h.model: place for place, h in ranked if h.model in models})

    def of(self, instance: Instance) -> instances_pb2.InstanceActivity:
        """Return the figures of one instance."""
        routes = self._host.routes
        route = routes.get(instance.model) or self._host.occupancy.host.warm.get(instance.model)
        if route is not None and route.instance != instance.id:
            route = None
        last_used = instance.ready_time
        if route is not None and route.last_used_time:
            last_used = route.last_used_time
        return instances_pb2.InstanceActivity(
            in_flight=route.in_flight if route is not None else 0,
            queued=self._host.routes.queued(instance.model),
            last_used_time=convert_values.timestamp(last_used),
            expire_time=convert_values.timestamp(self._expire_time(instance, last_used)),
            eviction_rank=self._ranks.get(instance.model, 0),
            evict_blockers=self._blockers(instance),
            request_count=route.request_count if route is not None else 0,
            error_count=route.error_count if route is not None else 0,
        )

    def last_used_times(self) -> Mapping[str, float]:
        """Return when each model with a route was last used, by model id."""
        return {r.model: r.last_used_time for r in self._host.routes if r.last_used_time}

    def _expire_time(self, instance: Instance, last_used: float) -> float:
        model = self._host.registry.committed.models.get(instance.model)
        if model is None or model.pinned:
            return 0.0
        host = self._host.occupancy.host
        if instance.state is _WARM and (warm := host.warm.get(instance.model)) is not None:
            keep = host.keep_alive_s(model)
            left = self._host.clock.time() - (self._now - warm.warm_since)
            return left + keep if keep is not None else 0.0
        if instance.state is not InstanceState.READY:
            return 0.0
        keep = self._host.occupancy.keep_alive_s(model)
        return last_used + keep if keep is not None else 0.0

    def _blockers(
        self, instance: Instance
    ) -> list[instances_pb2.InstanceActivity.EvictBlocker.ValueType]:
        holding = self._holdings.get(instance.model)
        if holding is None:
            return []
        if instance.state not in (InstanceState.READY, _WARM):
            return [_Blocker.Value("IN_TRANSITION")]
        reasons = {
            "IN_FLIGHT": holding.in_flight > 0,
            "QUEUED": holding.queued > 0,
            "PINNED": holding.pinned,
            "LEASED": holding.leased,
            "MIN_RESIDENCY": instance.state is not _WARM and self._policy.young(holding, self._now),
        }
        return [_Blocker.Value(name) for name, holds in reasons.items() if holds]
