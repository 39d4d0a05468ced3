"""Eviction: what holds a device's bytes, and in which order it goes when they are needed.

``lru``: longest unused first. ``cost-aware``: LRU-2 weighted by cost, the largest of
(now - second-last use) * bytes / seconds to load again; a model with fewer than two uses goes before all
others. Source of the rule: O'Neil et al., "The LRU-K page replacement algorithm", 1993, with the
cost of GreedyDual-Size (Cao and Irani, 1997) and without LRU-K's collapsing of bursts, which makes a model in its
first burst look unused. Compared in ``bench/policies.py``.
"""

import math
from collections.abc import Collection, Iterable, Sequence

from modelhostd.core.resources import InstanceState
from modelhostd.core.values import dataclass

LRU = "lru"
COST_AWARE = "cost-aware"
POLICIES = (LRU, COST_AWARE)

LOAD_S_MIN = 1e-3
"""Below this a load costs nothing that is worth weighing: the clock's own error."""

KEPT_MAX = 8
"""How many of those that stay an eviction's event names, those that would go next first."""


@dataclass(frozen=True, slots=True)
class Holding:
    """One instance that holds bytes of a device, and what may keep it there. Times: monotonic seconds."""

    model: str
    device: str
    bytes: int
    state: InstanceState
    in_flight: int = 0
    queued: int = 0
    pinned: bool = False
    leased: bool = False
    last_used: float = 0.0
    """When it was last used, or became READY if that is later."""
    second_last_use: float = -math.inf
    """When the request before the last one came; -inf where there were fewer than two."""
    load_s: float = 0.0
    """What coming back is expected to take from the tier where it would land, from the loads it had."""
    ready_since: float = 0.0
    priority: int = 0
    bound: bool = False
    """Whether these bytes go with others only: the copy in host memory of what is on its way to or from its device."""

    @property
    def held(self) -> bool:
        """Whether an operator's pin or a client's lease forbids eviction."""
        return self.pinned or self.leased

    @property
    def told(self) -> str:
        """Its model, its bytes, and what keeps it, in words."""
        kept = ", pinned" if self.pinned else ", leased" if self.leased else ""
        return f"{self.model} ({self.bytes}{kept})"

    @property
    def idle(self) -> bool:
        """Whether it can be evicted now: ready or warm, nothing in flight, nothing queued, not held."""
        return (
            self.state in (InstanceState.READY, InstanceState.WARM)
            and not self.bound
            and self.in_flight == 0
            and self.queued == 0
            and not self.held
        )


@dataclass(frozen=True, slots=True)
class Policy:
    """Who goes first. ``min_residency_s`` guards instances that became READY just now."""

    name: str = LRU
    min_residency_s: float = 0.0

    def order(self, holdings: Iterable[Holding], now: float) -> Sequence[Holding]:
        """Return holdings in eviction order: low priority first, then by the policy."""
        if self.name == COST_AWARE:
            return sorted(holdings, key=lambda h: (h.priority, *_worth(h, now), h.model))
        return sorted(holdings, key=lambda h: (h.priority, h.last_used, h.model))

    def kept(self, holdings: Iterable[Holding], victims: Collection[str], now: float) -> str:
        """Return who stays where ``victims`` go, as an eviction's event names them."""
        staying = [h.model for h in self.order(holdings, now) if h.model not in victims]
        return ",".join(staying[:KEPT_MAX])

    def young(self, holding: Holding, now: float) -> bool:
        """Whether the guard still keeps an instance."""
        return now - holding.ready_since < self.min_residency_s


def _worth(holding: Holding, now: float) -> tuple[bool, float]:
    """Return what ranks a holding under ``cost-aware``: what is worth least comes first."""
    bytes_per_s = holding.bytes / max(holding.load_s, LOAD_S_MIN)
    known = math.isfinite(holding.second_last_use)
    # An age of 0 would make all bytes equal: whoever is used all the time still ranks by cost.
    age = max(now - holding.second_last_use, 1e-9) if known else 1.0
    return known, -age * bytes_per_s
