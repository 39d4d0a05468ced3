"""Residency: the plan that admits a load to the memory of devices, evicts for it, has it wait, or refuses it.

All pure. A plan never evicts in vain: it names victims only if they suffice. The order of admission is
always the same: fits, can never fit, held by pins and leases, evict idle ones, else wait.
"""

from collections.abc import Iterable, Mapping, Sequence

from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.eviction import Holding, Policy
from modelhostd.core.resources import InstanceState
from modelhostd.core.values import dataclass

BUSY_GRACE_S = 3.0
"""How long a load waits for busy instances before the least recently used of them is drained."""

RETRY_S = 5.0
"""After which to ask again for memory that is held by what ends at a time that nobody can tell: leases, requests, other processes."""


@dataclass(frozen=True, slots=True)
class DeviceView:
    """A device as the planner sees it: its usable bytes, and who holds how much of them."""

    id: str
    capacity_bytes: int
    holdings: Sequence[Holding] = ()
    claimed_bytes: int = 0
    """Bytes that earlier waiting loads have been promised."""
    taken_bytes: int = 0
    """Bytes of the budget that other processes have taken: the capacity is that much below it."""
    total_bytes: int = 0
    """What the device has for modelhost, whatever its budget is; 0 = that is not known, or does not matter."""

    @property
    def budget_bytes(self) -> int:
        """What modelhost may use while no other process uses the device."""
        return self.capacity_bytes + self.taken_bytes

    @property
    def free_bytes(self) -> int:
        """Bytes that nobody holds or was promised; negative when the budget was shrunk."""
        return self.capacity_bytes - self.claimed_bytes - sum(h.bytes for h in self.holdings)

    @property
    def coming_bytes(self) -> int:
        """Bytes that are on their way out."""
        return sum(h.bytes for h in self.holdings if h.state is InstanceState.DRAINING)

    @property
    def fitting_bytes(self) -> int:
        """Bytes that one more load may take at once: what was promised comes out of what is on its way out first, so
        that nobody waits for an eviction that is for another.
        """
        return self.free_bytes + min(self.claimed_bytes, self.coming_bytes)


@dataclass(frozen=True, slots=True)
class Want:
    """A load that waits for memory. ``device`` empty = any."""

    model: str
    bytes: int
    device: str = ""
    priority: int = 0
    since: float = 0.0
    working_bytes: int = 0
    """Of the bytes, those that are kept for its requests beside its weights."""

    @property
    def needs(self) -> str:
        """What it needs, in words."""
        if not self.working_bytes:
            return f"model '{self.model}' needs {self.bytes} bytes"
        return (
            f"model '{self.model}' needs {self.bytes} bytes ({self.working_bytes} of them for its requests beside its "
            f"weights)"
        )


@dataclass(frozen=True, slots=True)
class Fits:
    """Load now, on this device."""

    device: str


@dataclass(frozen=True, slots=True)
class Evict:
    """Evict these idle instances (in this order), then load on this device."""

    device: str
    victims: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Wait:
    """Nothing can be evicted now: wait for memory that is being freed or for busy instances.

    ``drain`` names the busy instances to set DRAINING now, because the wait has lasted long enough; ``behind``
    those whose going is enough for it, now or later: what is free beyond that is for other loads.
    """

    device: str
    drain: tuple[str, ...] = ()
    behind: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Refuse:
    """This load cannot be had now, and why, with numbers."""

    error: ModelhostError


Plan = Fits | Evict | Wait | Refuse


def plan(want: Want, devices: Mapping[str, DeviceView], now: float, policy: Policy) -> Plan:
    """Return what to do for one wanted load. ``devices`` must not be empty.

    Several devices: the one where it fits with the least left over; else where the fewest bytes are
    evicted; else where it waits.
    """
    usable = [devices[want.device]] if want.device else list(devices.values())
    possible = [d for d in usable if want.bytes <= d.capacity_bytes]
    if not possible:
        squeezed = [d for d in usable if want.bytes <= d.budget_bytes]
        if squeezed:
            return Refuse(held_by_others(want, max(squeezed, key=lambda d: (d.free_bytes, d.id))))
        return Refuse(too_large(want, usable, devices.values()))
    fitting = [d for d in possible if want.bytes <= d.fitting_bytes]
    if fitting:
        return Fits(min(fitting, key=lambda d: (d.free_bytes, d.id)).id)
    open_ones = [d for d in possible if want.bytes <= _reachable(d)]
    if not open_ones:
        return Refuse(held_by_others(want, max(possible, key=lambda d: (_reachable(d), d.id))))
    best: Evict | None = None
    best_cost = 0
    for device in sorted(open_ones, key=lambda d: d.id):
        if device.coming_bytes >= want.bytes - device.free_bytes:
            # Enough is being freed already: evicting more would be in vain.
            continue
        victims = choose_victims(device, want.bytes, now, policy)
        if victims is None:
            continue
        cost = sum(h.bytes for h in victims)
        if best is None or cost < best_cost:
            best, best_cost = Evict(device.id, tuple(h.model for h in victims)), cost
    if best is not None:
        return best
    waiting = max(open_ones, key=lambda d: (d.free_bytes + d.coming_bytes, d.id))
    go_one_day = [
        h
        for h in policy.order(waiting.holdings, now)
        if h.state is not InstanceState.DRAINING and not h.held
    ]
    ready = [h for h in go_one_day if h.state is InstanceState.READY and not policy.young(h, now)]
    busy = _enough(waiting, want.bytes, ready)
    behind = busy or _enough(waiting, want.bytes, go_one_day)
    return Wait(waiting.id, busy if now - want.since >= BUSY_GRACE_S else (), behind)


def choose_victims(
    device: DeviceView, needed_bytes: int, now: float, policy: Policy
) -> Sequence[Holding] | None:
    """Return the idle instances that make room for ``needed_bytes``, or None.

    Bytes that are already on their way out count as free. A victim that a later choice made
    superfluous is spared: freeing 4 of {1, 4} evicts only the 4.
    """
    missing = needed_bytes - device.free_bytes - device.coming_bytes
    chosen: list[Holding] = []
    for holding in policy.order(device.holdings, now):
        if missing <= 0:
            break
        if holding.idle and not policy.young(holding, now):
            chosen.append(holding)
            missing -= holding.bytes
    if missing > 0:
        return None
    for holding in list(chosen):
        if missing + holding.bytes <= 0:
            chosen.remove(holding)
            missing += holding.bytes
    return chosen


def too_large(
    want: Want, usable: Sequence[DeviceView], devices: Iterable[DeviceView] = ()
) -> ModelhostError:
    """Return MODEL_TOO_LARGE: it fits none of the ``usable`` devices even when that is empty; ``devices`` are all there are."""
    # Where a larger budget would help the device that could have it, else the largest.
    device = max(
        usable, key=lambda d: (d.total_bytes >= want.bytes, d.budget_bytes, d.total_bytes, d.id)
    )
    smaller = "use a smaller precision" + (
        " or fewer cache_tokens (backend_options)" if want.working_bytes else ""
    )
    if device.total_bytes >= want.bytes:
        why = (
            f"the budget of devices/{device.id} is {device.budget_bytes} bytes, of {device.total_bytes} that it has; "
            f"raise that budget or {smaller}"
        )
    else:
        other = next((d.id for d in devices if d.total_bytes >= want.bytes), "")
        why = (
            f"devices/{device.id} has {device.total_bytes} bytes, of which {device.budget_bytes} are its budget: no budget "
            f"there would be enough; {f'use devices/{other}, ' if other else ''}{smaller} or a smaller model"
        )
    return ModelhostError(
        Reason.MODEL_TOO_LARGE,
        f"{want.needs}, and {why}",
        {
            "model": want.model,
            "neededBytes": str(want.bytes),
            "device": device.id,
            "budgetBytes": str(device.budget_bytes),
            "deviceBytes": str(device.total_bytes),
        },
    )


def held_by_others(want: Want, device: DeviceView) -> ModelhostError:
    """Return OUT_OF_DEVICE_MEMORY: pins, leases, loads or other processes hold what is missing.

    With a delay after which it may be asked again, unless pins alone hold too much: these have no end of their own.
    """
    holders = [h for h in device.holdings if h.held and h.bytes]
    evictable = sum(h.bytes for h in device.holdings if h.idle)
    held = [h.told for h in holders[:8]]
    if device.taken_bytes > 0:
        held.append(f"other processes ({device.taken_bytes})")
    shown = ", ".join(held) or "loads in progress"
    pinned = sum(h.bytes for h in device.holdings if h.pinned)
    later = want.bytes <= device.budget_bytes - pinned
    ways = ["free some of it"]
    ways += ["try again later"] if later else []
    ways += ["raise the budget"] if device.total_bytes > device.budget_bytes else []
    return ModelhostError(
        Reason.OUT_OF_DEVICE_MEMORY,
        f"{want.needs} on devices/{device.id}: "
        f"{max(0, device.free_bytes)} free, {evictable} evictable, the rest held by {shown}; "
        f"{', '.join(ways[:-1])}{' or ' if ways[1:] else ''}{ways[-1]}",
        {
            "model": want.model,
            "device": device.id,
            "neededBytes": str(want.bytes),
            "freeBytes": str(max(0, device.free_bytes)),
            "evictableBytes": str(evictable),
            "heldBy": ",".join(h.model for h in holders[:8]),
        },
        retry_delay_s=RETRY_S if later else None,
    )


def retry_delay_s(model: str, device: DeviceView) -> float | None:
    """Return after how long a load or a request that found too little memory may find more: none where all that others have is
    pinned, so that nothing would be free later that is not free now.
    """
    others = any(h.bytes and not h.pinned for h in device.holdings if h.model != model)
    return RETRY_S if others or device.taken_bytes > 0 else None


def _reachable(device: DeviceView) -> int:
    """Bytes that are free once everything that is not held has gone."""
    return device.capacity_bytes - sum(h.bytes for h in device.holdings if h.held)


def _enough(device: DeviceView, needed: int, candidates: Sequence[Holding]) -> tuple[str, ...]:
    """Return the first whose bytes, with those that are free and on their way out, are enough; or nobody."""
    missing = needed - device.free_bytes - device.coming_bytes
    chosen: list[str] = []
    for holding in candidates:
        if missing <= 0:
            break
        chosen.append(holding.model)
        missing -= holding.bytes
    return tuple(chosen) if missing <= 0 else ()
