"""Budgets: who leaves for one that became smaller, and which are refused for what pins and leases hold. Decisions only."""

from collections.abc import Sequence
from dataclasses import replace

from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.eviction import Holding, Policy
from modelhostd.core.residency import RETRY_S, DeviceView, choose_victims
from modelhostd.core.resources import InstanceState

NAMED_MAX = 8
"""How many of those that hold a place an error names."""


def check_budget(view: DeviceView, place: str, budget_bytes: int) -> None:
    """Raise BUDGET_TOO_SMALL for a budget below what pins and leases hold of a place: no eviction would reach it.

    ``place`` is the place in words. What is busy or loads leaves in time, so it forbids nothing.
    """
    holding = [h for h in view.holdings if _stays(h)]
    needed = sum(h.bytes for h in holding)
    if needed <= budget_bytes:
        return
    named = ", ".join(h.told for h in holding[:NAMED_MAX])
    more = f" and {len(holding) - NAMED_MAX} more" if len(holding) > NAMED_MAX else ""
    raise ModelhostError(
        Reason.BUDGET_TOO_SMALL,
        f"{place} cannot have a budget of {budget_bytes} bytes: {needed} are held by {named}{more}; unpin them, "
        f"release their leases or wait for their end, or give at least {needed} bytes; nothing was changed",
        {
            "device": view.id,
            "budgetBytes": str(budget_bytes),
            "neededBytes": str(needed),
            "heldBy": ",".join(h.model for h in holding[:NAMED_MAX]),
        },
    )


def check_hold(view: DeviceView, budget_bytes: int, model: str) -> None:
    """Raise OUT_OF_DEVICE_MEMORY for a pin or a lease that would keep a device above its budget for good.

    So it is for a model that is to leave when its requests end.
    """
    own = next((h for h in view.holdings if h.model == model and not h.held), None)
    if own is None or not _stays(replace(own, pinned=True)):
        return
    holding = [h for h in view.holdings if _stays(h)]
    held = sum(h.bytes for h in holding)
    if held + own.bytes <= budget_bytes:
        return
    named = ", ".join(h.told for h in holding[:NAMED_MAX]) or "nobody"
    raise ModelhostError(
        Reason.OUT_OF_DEVICE_MEMORY,
        f"model '{model}' has {own.bytes} bytes of devices/{view.id}, whose budget is {budget_bytes} now, "
        f"{held} of them held by {named}: it leaves when its requests end; raise the budget to keep it",
        {
            "model": model,
            "device": view.id,
            "neededBytes": str(own.bytes),
            "freeBytes": str(max(0, budget_bytes - held)),
            "heldBy": ",".join(h.model for h in holding[:NAMED_MAX]),
        },
    )


def check_loaded(view: DeviceView, model: str, predicted_bytes: int) -> None:
    """Raise OUT_OF_DEVICE_MEMORY for a load that took so much more than predicted that its device would be above its budget for
    good: pinned or leased itself, beside what else is, so that no eviction would reach it.

    One that nothing holds stays until the budget is enforced: others go before it.
    """
    own = next((h for h in view.holdings if h.model == model), None)
    holding = [h for h in view.holdings if _stays(h) and h.model != model]
    held = sum(h.bytes for h in holding)
    if own is None or not own.held or held + own.bytes <= view.capacity_bytes:
        return
    if own.bytes <= predicted_bytes:
        # Others took the memory meanwhile: what is held stays, as it would a moment later.
        return
    beside = ", ".join(h.told for h in holding[:NAMED_MAX])
    pinned = sum(h.bytes for h in holding if h.pinned)
    larger = " or raise the budget" if view.total_bytes > view.budget_bytes else ""
    raise ModelhostError(
        Reason.OUT_OF_DEVICE_MEMORY,
        f"model '{model}', which is {'pinned' if own.pinned else 'leased'}, took {own.bytes} bytes of devices/{view.id} "
        f"where {predicted_bytes} were predicted, and {view.capacity_bytes} are there{' beside ' if beside else ''}{beside}; "
        f"it was unloaded: {'free some of it, ' if beside else ''}use a smaller precision{larger}",
        {
            "model": model,
            "device": view.id,
            "neededBytes": str(own.bytes),
            "predictedBytes": str(predicted_bytes),
            "freeBytes": str(max(0, view.capacity_bytes - held)),
            "heldBy": ",".join(h.model for h in holding[:NAMED_MAX]),
        },
        retry_delay_s=RETRY_S if own.bytes <= view.budget_bytes - pinned else None,
    )


def over_budget(device: DeviceView, now: float, policy: Policy, *, busy: bool) -> Sequence[Holding]:
    """Return whom to evict from a device that holds more than its budget.

    Idle ones, as few as suffice, or all that hold any bytes where they do not; then also ``busy`` ones, which
    end their requests first. What is pinned or leased stays where other processes took the memory: the device stays above its
    budget. A load that took too much for that is refused (:func:`check_loaded`).
    """
    policy = replace(policy, min_residency_s=0.0)
    if (enough := choose_victims(device, 0, now, policy)) is not None:
        return enough
    missing = -device.free_bytes - device.coming_bytes
    in_order = policy.order(device.holdings, now)
    chosen = [h for h in in_order if h.idle and h.bytes]
    missing -= sum(h.bytes for h in chosen)
    for holding in in_order if busy else ():
        if (
            missing > 0
            and holding.bytes
            and holding.state is InstanceState.READY
            and not (holding.held or holding.idle)
        ):
            chosen.append(holding)
            missing -= holding.bytes
    return chosen


def _stays(holding: Holding) -> bool:
    """Whether these bytes stay for as long as a pin or a lease does."""
    return holding.held and holding.state is not InstanceState.DRAINING and holding.bytes > 0
