"""The resources modelhost keeps, as plain immutable values.

The wire form of each stands in ``protos/modelhost/v1``; ``api/convert.py`` maps between the two, and
the database stores them as JSON. A change never edits a value: it replaces it.

Times are seconds since the epoch (UTC), durations seconds, sizes bytes, unless a name says otherwise.
"""

from collections.abc import Mapping
from dataclasses import field
from typing import Any

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


@dataclass(frozen=True, slots=True)
class StoredError:
    """An error as an operation or instance remembers it: what the same failed call would carry."""

    reason: str
    message: str
    metadata: Mapping[str, str] = field(default_factory=dict)
    retry_delay_s: float | None = None


@dataclass(frozen=True, slots=True)
class Source:
    """Where a model's files come from; the patterns belong to the model, not to one request.

    ``uri`` is canonical and carries no revision (``hf://org/name``); ``revision`` is what was asked
    for (a branch, tag or commit; empty = the source's default). Empty patterns = the default choice.
    ``more_uris`` are further URLs beside the one of a file, one file each.
    """

    uri: str
    revision: str = ""
    allow_patterns: tuple[str, ...] = ()
    ignore_patterns: tuple[str, ...] = ()
    more_uris: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """How a model is loaded and kept. ``None`` = the host's default. See ModelConfig in the protos.

    A negative ``keep_alive_s`` = never unloaded for being idle, whatever the host's default is;
    ``host_keep_alive_s`` says the same of host memory. Which fields act at once is in
    ``LIVE_CONFIG_FIELDS``; the rest needs a reload.
    """

    backend: str = ""
    device: str = ""
    precision: str = ""
    max_batch_size: int | None = None
    max_sequence_length: int | None = None
    keep_alive_s: float | None = None
    load_timeout_s: float | None = None
    load_on_demand: bool | None = None
    autoload: bool = False
    priority: int = 0
    queue_limit: int | None = None
    isolation: Isolation = Isolation.SHARED
    backend_options: Mapping[str, Any] = field(default_factory=dict)
    host_keep_alive_s: float | None = None
    fallback_model: str = ""
    max_batch_delay_s: float | None = None
    dynamic_batching: bool | None = None


LIVE_CONFIG_FIELDS = frozenset(
    {
        "keep_alive_s",
        "host_keep_alive_s",
        "load_on_demand",
        "autoload",
        "priority",
        "queue_limit",
        "load_timeout_s",
        "fallback_model",
    }
)


@dataclass(frozen=True, slots=True)
class Requirements:
    """What a model says that it needs; zero and empty = nothing said."""

    device_bytes: int = 0
    compute_capability: str = ""
    packages: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ModelFile:
    """One file of an artifact: its path inside the model (``/``-separated), size and digest."""

    path: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Artifact:
    """One revision of a model's files on disk as a whole.

    ``version`` rises by one with each new revision of the model and is OIP's ``model_version``.
    ``revision`` is the source's own (a commit on the Hub); empty until planned.
    ``predicted_bytes`` is what loading takes on a device, from the safetensors headers; 0 = unknown.
    """

    version: int
    state: ArtifactState
    revision: str = ""
    size_bytes: int = 0
    file_count: int = 0
    predicted_bytes: int = 0
    create_time: float = 0.0
    available_time: float = 0.0
    operation: str = ""
    error: StoredError | None = None
    source: Source | None = None
    """What the model's source was when this artifact was asked for; another one needs a download."""
    allow_unsafe: bool = False
    """Whether files that can run code when loaded may be among its files."""
    verify_time: float = 0.0
    """When its files were last hashed again and found right; 0 = never."""


@dataclass(frozen=True, slots=True)
class Model:
    """A registered model. ``edit`` counts changes of client-writable fields; it makes the etag.

    ``artifacts`` stand oldest first; ``last_version`` is the highest version ever given out.
    """

    id: str
    uid: str
    source: Source
    create_time: float
    update_time: float
    display_name: str = ""
    description: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    licence: str = ""
    task: str = ""
    config: ModelConfig = field(default_factory=ModelConfig)
    requirements: Requirements = field(default_factory=Requirements)
    base_model: str = ""
    pinned: bool = False
    artifacts: tuple[Artifact, ...] = ()
    last_version: int = 0
    chosen_version: int = 0
    """The version that ReloadModel rolled back to; 0 = the newest."""
    edit: int = 1

    @property
    def etag(self) -> str:
        """Opaque version of the client-writable fields."""
        return f"{self.uid[:8]}-{self.edit}"

    @property
    def newest(self) -> Artifact | None:
        """The newest artifact whose files are whole and verified."""
        return next(
            (a for a in reversed(self.artifacts) if a.state is ArtifactState.AVAILABLE), None
        )

    @property
    def available(self) -> Artifact | None:
        """What a load takes: the chosen version while its files are there, else the newest."""
        if self.chosen_version:
            for artifact in self.artifacts:
                whole = artifact.state is ArtifactState.AVAILABLE
                if whole and artifact.version == self.chosen_version:
                    return artifact
        return self.newest

    @property
    def state(self) -> ArtifactState:
        """The state of the model's files: AVAILABLE if any artifact is, else the newest one's."""
        if self.available is not None:
            return ArtifactState.AVAILABLE
        return self.artifacts[-1].state if self.artifacts else ArtifactState.ABSENT


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
class Retry:
    """What failed last, and when it is tried again.

    ``attempt``: failed tries in a row without a gain. ``next_time``: seconds since the epoch.
    """

    attempt: int
    reason: str
    message: str
    next_time: float


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a running operation is. ``total_bytes`` is 0 until the plan is known."""

    phase: Phase = Phase.NONE
    done_bytes: int = 0
    total_bytes: int = 0
    done_files: int = 0
    total_files: int = 0
    bytes_per_second: float = 0.0
    eta_s: float | None = None
    reused_bytes: int = 0
    file: str = ""
    attempt: int = 0
    retry: Retry | None = None
    restarted_files: int = 0


@dataclass(frozen=True, slots=True)
class Operation:
    """One piece of long work. ``join_key`` tells equal work; ``result`` is JSON-like, by kind."""

    id: str
    kind: OperationKind
    state: OperationState
    create_time: float
    model: str = ""
    join_key: str = ""
    start_time: float = 0.0
    end_time: float = 0.0
    queue_position: int = 0
    priority: int = 0
    rate_limit_bytes_per_second: int = 0
    progress: Progress = field(default_factory=Progress)
    result: Mapping[str, Any] = field(default_factory=dict)
    error: StoredError | None = None
    principal: str = ""
    cancel_requested: bool = False


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
