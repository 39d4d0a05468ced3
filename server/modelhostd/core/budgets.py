"""Budgets and what pins and leases hold of them: neither may make the other impossible. Decisions only."""

from dataclasses import replace

from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.eviction import Holding
from modelhostd.core.residency import DeviceView
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
    named = ", ".join(f"{h.model} ({h.bytes}, {_why(h)})" for h in holding[:NAMED_MAX])
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
    named = ", ".join(f"{h.model} ({h.bytes})" for h in holding[:NAMED_MAX]) or "nobody"
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


def _stays(holding: Holding) -> bool:
    """Whether these bytes stay for as long as a pin or a lease does."""
    return holding.held and holding.state is not InstanceState.DRAINING and holding.bytes > 0


def _why(holding: Holding) -> str:
    return "pinned" if holding.pinned else "leased"
