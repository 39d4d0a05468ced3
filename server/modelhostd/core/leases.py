"""Leases: a client's hold on a model, which ends by itself. Decisions only."""

from collections.abc import Mapping

from modelhostd.core.errors import ModelhostError, Reason, invalid
from modelhostd.core.resources import Kind, Lease
from modelhostd.core.state import Edit, State

TTL_MIN_S = 1.0
TTL_MAX_S = 86_400.0
TTL_DEFAULT_S = 60.0
PER_PRINCIPAL_MAX = 1_000
RETRY_S = 10.0


def check_ttl(ttl_s: float | None) -> float:
    """Return a time to live in seconds, the default where none is given. Raises INVALID_ARGUMENT."""
    if ttl_s is None:
        return TTL_DEFAULT_S
    if not TTL_MIN_S <= ttl_s <= TTL_MAX_S:
        expected = f"{TTL_MIN_S:g} s to {TTL_MAX_S:g} s"
        raise invalid("time_to_live", expected, f"{ttl_s:g} s")
    return ttl_s


def check_room(state: State, model: str, principal: str) -> None:
    """Raise QUEUE_FULL when a caller holds as many leases as one may."""
    held = sum(lease.principal == principal for lease in state.leases.values())
    if held >= PER_PRINCIPAL_MAX:
        raise ModelhostError(
            Reason.QUEUE_FULL,
            f"'{principal}' holds {held} leases (limit {PER_PRINCIPAL_MAX}); release some, or let "
            "them end",
            {"model": model, "queue": "leases", "limit": str(PER_PRINCIPAL_MAX)},
            retry_delay_s=RETRY_S,
        )


def edit(lease: Lease, reason: str) -> Edit:
    """Return the edit that stores a lease."""
    return Edit(Kind.LEASE, lease.id, lease, reason, _about(lease))


def ended(lease: Lease, reason: str) -> Edit:
    """Return the edit that ends a lease."""
    return Edit(Kind.LEASE, lease.id, None, reason, _about(lease))


def _about(lease: Lease) -> Mapping[str, str]:
    return {"model": lease.model, "principal": lease.principal}
