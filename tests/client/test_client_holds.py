"""Leases, slots and quarantined files: what the client asks at their ends, on both twins."""

import pytest
from google.protobuf.empty_pb2 import Empty

from modelhost import AsyncClient, Client
from modelhost.v1 import residency_service_pb2, slots_pb2
from tests.client.double import Double


@pytest.fixture
def leased(double: Double) -> Double:
    """A double that gives out one lease."""
    for method in ("AcquireLease", "RenewLease"):
        double.on(method, slots_pb2.Lease(name="leases/one", model="models/a"))
    for method in ("ReleaseLease", "ClearSlot", "DeleteQuarantined"):
        double.on(method, Empty())
    return double


def asked_of_lease(double: Double) -> list[object]:
    """Return what was asked for: acquired for, renewed for, released."""
    return [
        *((r.model, r.time_to_live.ToMilliseconds()) for r in double.requests("AcquireLease")),
        *((r.name, r.time_to_live.ToMilliseconds()) for r in double.requests("RenewLease")),
        *(r.name for r in double.requests("ReleaseLease")),
    ]


LEASED = [("models/a", 90_500), ("leases/one", 10_000), "leases/one"]


def test_a_lease_lasts_as_long_as_its_block(leased: Double, client: Client) -> None:
    """It is asked for in seconds, renewed by name, and released at the end of its block."""
    with client.lease("a", 90.5) as held:
        assert (held.name, held.model) == ("leases/one", "models/a")
        held.renew(10)
    assert asked_of_lease(leased) == LEASED


async def test_a_lease_of_the_other_twin(leased: Double) -> None:
    """The asynchronous client's lease is released at the end of its block, too."""
    async with (
        AsyncClient(leased.target, retries=False) as client,
        await client.lease("a", 90.5) as held,
    ):
        await held.renew(10)
    assert asked_of_lease(leased) == LEASED


def test_a_slot_is_cleared(leased: Double, both) -> None:
    """clear_slot names slot and etag."""
    both(lambda c: c.clear_slot("role", etag="1"))
    (sent,) = leased.requests("ClearSlot")
    assert sent == residency_service_pb2.ClearSlotRequest(name="slots/role", etag="1")


def test_a_quarantined_file_is_deleted(leased: Double, both) -> None:
    """delete_quarantined names the file."""
    both(lambda c: c.delete_quarantined("quarantine/1-a"))
    (sent,) = leased.requests("DeleteQuarantined")
    assert sent.name == "quarantine/1-a"
