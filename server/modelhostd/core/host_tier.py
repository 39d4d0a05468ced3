"""The host tier: weights kept in the machine's memory, beside those on devices. Decisions only.

The planner sees host memory as one more place with a budget, and whatever is there goes by the same policy as on
devices: the copy of a model that is on no device any more (WARM), which is then on disk alone, and the copy beside
a model that is on a device, which goes on serving and leaves that for disk later. One order for both is never worse
than to keep the latter, which to let go first may be (``bench/tiers.py``). A load whose copy finds no room goes on
without one: host memory never keeps a model from a device.
"""

from collections.abc import Sequence
from dataclasses import replace

from modelhostd.core.eviction import Policy
from modelhostd.core.residency import DeviceView, choose_victims
from modelhostd.core.values import dataclass

HOST = "host"
"""The name of host memory in the ledger; no device is called so."""

LEFT_FREE_BYTES = 4 << 30
"""What the default budget leaves of the memory that is free when the daemon starts."""

HEADROOM_BYTES = 512 << 20
"""What is kept free for what nobody can predict, whatever the budget is."""


def default_budget_bytes(limit_bytes: int, available_bytes: int) -> int:
    """Return the smaller of half of what the machine (or the control group) has and the free memory less 4 GiB."""
    return max(0, min(limit_bytes // 2, available_bytes - LEFT_FREE_BYTES))


@dataclass(frozen=True, slots=True)
class Room:
    """What a copy in host memory would have to wait for: these copies going, or those that go already."""

    victims: tuple[str, ...] = ()
    waits: bool = False


def make_room(view: DeviceView, needed_bytes: int, now: float, policy: Policy) -> Room | None:
    """Return what it takes to keep ``needed_bytes`` in host memory; None = it cannot be had, keep nothing."""
    if needed_bytes > view.capacity_bytes:
        return None
    if needed_bytes <= view.fitting_bytes:
        return Room()
    victims = choose_victims(view, needed_bytes, now, _unguarded(policy))
    if victims is None:
        return None
    return Room(tuple(v.model for v in victims), waits=True)


def over_budget(view: DeviceView, now: float, policy: Policy) -> Sequence[str]:
    """Return the copies to drop where more is held than the budget allows; all that may go where they do not suffice."""
    policy = _unguarded(policy)
    enough = choose_victims(view, 0, now, policy)
    if enough is None:
        enough = [h for h in policy.order(view.holdings, now) if h.idle and h.bytes]
    return [h.model for h in enough]


def _unguarded(policy: Policy) -> Policy:
    """Return the policy without its guard of what came just now: that guards devices against thrash."""
    return replace(policy, min_residency_s=0.0)
