"""Leases over the wire: acquired, shown, renewed, released, and whose they are."""

from pathlib import Path

from google.protobuf.duration_pb2 import Duration

from modelhost.v1 import instances_pb2
from modelhost.v1 import residency_service_pb2 as pb
from tests.api.support import CALL_S, failure, served

NAME = "models/minilm"

LEASED = instances_pb2.InstanceActivity.EvictBlocker.Value("LEASED")


async def test_a_lease_is_visible_and_ends(tmp_path: Path) -> None:
    """A lease names model, holder and end; its model says that it is leased, until it is released."""
    async with served(tmp_path) as it:
        await it.have()
        await it.load()
        acquire = pb.AcquireLeaseRequest(model=NAME, time_to_live=Duration(seconds=90))
        lease = await it.tcp.residency.AcquireLease(acquire, timeout=CALL_S)
        assert (lease.model, lease.name.partition("/")[0]) == (NAME, "leases")
        assert lease.principal
        assert lease.expire_time.seconds - lease.create_time.seconds == 90
        get = pb.GetInstanceRequest(name=f"{NAME}/instances/-")
        shown = await it.tcp.residency.GetInstance(get, timeout=CALL_S)
        assert LEASED in shown.activity.evict_blockers
        assert shown.activity.eviction_rank == 0
        renew = pb.RenewLeaseRequest(name=lease.name)
        renewed = await it.tcp.residency.RenewLease(renew, timeout=CALL_S)
        assert renewed.name == lease.name
        release = pb.ReleaseLeaseRequest(name=lease.name)
        for _ in range(2):
            await it.tcp.residency.ReleaseLease(release, timeout=CALL_S)
        shown = await it.tcp.residency.GetInstance(get, timeout=CALL_S)
        assert LEASED not in shown.activity.evict_blockers
        found = await failure(it.tcp.residency.RenewLease(renew))
        assert (found.reason, found.metadata["lease"]) == (
            "LEASE_NOT_FOUND",
            lease.name.removeprefix("leases/"),
        )


async def test_a_lease_belongs_to_its_caller(tmp_path: Path) -> None:
    """Another caller can neither renew nor end a lease, unless it may operate."""
    async with served(tmp_path) as it:
        await it.have()
        acquire = pb.AcquireLeaseRequest(model=NAME)
        lease = await it.admin.residency.AcquireLease(acquire, timeout=CALL_S)
        for call in (
            it.user.residency.RenewLease(pb.RenewLeaseRequest(name=lease.name)),
            it.user.residency.ReleaseLease(pb.ReleaseLeaseRequest(name=lease.name)),
        ):
            found = await failure(call)
            assert (found.reason, found.metadata["right"]) == ("PERMISSION_DENIED", "OPERATE")
        assert len(it.host.registry.committed.leases) == 1
        lease = await it.user.residency.AcquireLease(acquire, timeout=CALL_S)
        release = pb.ReleaseLeaseRequest(name=lease.name)
        await it.admin.residency.ReleaseLease(release, timeout=CALL_S)
