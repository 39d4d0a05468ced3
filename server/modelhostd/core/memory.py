"""What is in memory, and what keeps it there: instances, devices, slots, leases. Plain immutable values."""

from modelhostd.core.states import DeviceKind, Health, InstanceState, Isolation, Tier
from modelhostd.core.values import dataclass
from modelhostd.core.work import StoredError


@dataclass(frozen=True, slots=True)
class Instance:
    """A model that is loaded, warm or on its way. Volatile: it ends with the daemon."""

    model: str
    id: str
    generation: int
    device: str
    state: InstanceState
    tier: Tier
    health: Health = Health.UNKNOWN
    health_message: str = ""
    health_time: float = 0.0
    backend: str = ""
    artifact_version: int = 0
    predicted_bytes: int = 0
    measured_bytes: int = 0
    working_bytes: int = 0
    host_bytes: int = 0
    create_time: float = 0.0
    ready_time: float = 0.0
    load_s: float = 0.0
    crash_count: int = 0
    config_edit: int = 0
    config_stale: bool = False
    operation: str = ""
    error: StoredError | None = None
    isolation: Isolation = Isolation.SHARED


@dataclass(frozen=True, slots=True)
class Device:
    """A place to compute, and the bytes modelhost may use of it."""

    id: str
    kind: DeviceKind
    display_name: str
    uuid: str
    total_bytes: int
    budget_bytes: int
    compute_capability: str = ""
    driver_version: str = ""
    headroom_bytes: int = 0
    foreign_bytes: int = 0
    reserved_bytes: int = 0
    resident_bytes: int = 0
    health: Health = Health.UNKNOWN


@dataclass(frozen=True, slots=True)
class Slot:
    """A stable name for a role whose active model can be switched."""

    id: str
    model: str
    update_time: float
    edit: int = 1


@dataclass(frozen=True, slots=True)
class Lease:
    """A client's reason not to evict a model, with an end."""

    id: str
    model: str
    principal: str
    create_time: float
    expire_time: float
