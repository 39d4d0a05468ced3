"""The resources modelhost keeps, as plain immutable values: settings and events, and all the others by one name.

The wire form of each stands in ``protos/modelhost/v1``; ``api/convert.py`` maps between the two, and
the database stores them as JSON. A change never edits a value: it replaces it.

Times are seconds since the epoch (UTC), durations seconds, sizes bytes, unless a name says otherwise.
"""

from collections.abc import Mapping
from dataclasses import field

from modelhostd.core.memory import Device, Instance, Lease, Slot
from modelhostd.core.models import (
    LIVE_CONFIG_FIELDS,
    Artifact,
    Model,
    ModelConfig,
    ModelFile,
    Requirements,
    Source,
)
from modelhostd.core.states import (
    FINAL_STATES,
    ArtifactState,
    DeviceKind,
    Health,
    InstanceState,
    Isolation,
    Kind,
    OperationKind,
    OperationState,
    Phase,
    Tier,
)
from modelhostd.core.values import dataclass
from modelhostd.core.work import Operation, Progress, Retry, StoredError


@dataclass(frozen=True, slots=True)
class Settings:
    """Limits and policies that can change while the daemon runs."""

    max_concurrent_downloads: int = 3
    download_rate_limit_bytes_per_second: int = 0
    max_concurrent_loads: int = 2
    keep_alive_s: float | None = None
    load_on_demand: bool = True
    queue_limit: int = 256
    eviction_policy: str = "lru"
    min_residency_s: float = 0.0
    drain_timeout_s: float = 30.0
    host_budget_bytes: int | None = None
    """Bytes of host memory that weights may take beside those on devices; None = by the machine's."""
    host_keep_alive_s: float | None = None
    log_level: str = "info"
    disk_budget_bytes: int = 0
    storage_policy: str = "off"
    storage_ttl_s: float = 30 * 86_400.0
    verify_interval_s: float = 0.0
    verify_rate_bytes_per_second: int = 64 << 20
    edit: int = 1


Resource = Model | Instance | Operation | Device | Slot | Lease | Settings


@dataclass(frozen=True, slots=True)
class Event:
    """A committed state change. ``resource`` is the state after it, ``None`` when it is gone.

    ``sequence`` rises by one for each event, host-wide, and is never used again.
    ``reason`` is one upper-case word for why (``EVICTED``, ``CRASHED``); ``details`` has its numbers.
    """

    sequence: int
    time: float
    kind: Kind
    key: str
    resource: Resource | None
    reason: str = ""
    details: Mapping[str, str] = field(default_factory=dict)
    principal: str = ""
    created: bool = False
    """Whether the resource did not exist before this event."""


__all__ = [
    "FINAL_STATES",
    "LIVE_CONFIG_FIELDS",
    "Artifact",
    "ArtifactState",
    "Device",
    "DeviceKind",
    "Event",
    "Health",
    "Instance",
    "InstanceState",
    "Isolation",
    "Kind",
    "Lease",
    "Model",
    "ModelConfig",
    "ModelFile",
    "Operation",
    "OperationKind",
    "OperationState",
    "Phase",
    "Progress",
    "Requirements",
    "Resource",
    "Retry",
    "Settings",
    "Slot",
    "Source",
    "StoredError",
    "Tier",
]
