"""The host tier as a message."""

from modelhost.v1 import devices_pb2
from modelhostd.host.host_tier import HostTier


def host_tier(given: HostTier) -> devices_pb2.HostTier:
    """Return the bytes of host memory that weights may take, and those that they do."""
    return devices_pb2.HostTier(
        budget_bytes=given.budget_bytes,
        capacity_bytes=given.capacity_bytes,
        used_bytes=given.used_bytes,
        warm_bytes=given.warm_bytes,
        free_bytes=max(0, given.view().free_bytes),
    )
