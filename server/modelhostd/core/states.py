"""The words that resources are described with: kinds, states, phases, tiers. Values are what is stored."""

import enum


class ArtifactState(enum.StrEnum):
    """Where the files of one revision are on their way to disk."""

    ABSENT = "ABSENT"
    QUEUED = "QUEUED"
    DOWNLOADING = "DOWNLOADING"
    VERIFYING = "VERIFYING"
    AVAILABLE = "AVAILABLE"
    PAUSED = "PAUSED"
    FAILED = "FAILED"
    QUARANTINED = "QUARANTINED"


class InstanceState(enum.StrEnum):
    """Where a model is on its way to and from a device."""

    QUEUED = "QUEUED"
    LOADING = "LOADING"
    READY = "READY"
    DRAINING = "DRAINING"
    WARM = "WARM"
    FAILED = "FAILED"
    BLOCKED = "BLOCKED"


class OperationState(enum.StrEnum):
    """How far one piece of long work is."""

    QUEUED = "QUEUED"
    RUNNING = "RUNNING"
    PAUSED = "PAUSED"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"


FINAL_STATES = frozenset(
    {OperationState.SUCCEEDED, OperationState.FAILED, OperationState.CANCELLED}
)


class OperationKind(enum.StrEnum):
    """What an operation does."""

    DOWNLOAD = "DOWNLOAD"
    LOAD = "LOAD"
    UNLOAD = "UNLOAD"
    RELOAD = "RELOAD"
    VERIFY = "VERIFY"
    PRUNE = "PRUNE"
    SWITCH = "SWITCH"
    DELETE = "DELETE"
    CHECK_STORAGE = "CHECK_STORAGE"
    UPLOAD = "UPLOAD"


class Phase(enum.StrEnum):
    """What a running operation is busy with."""

    NONE = "NONE"
    WAITING = "WAITING"
    PLANNING = "PLANNING"
    DOWNLOADING = "DOWNLOADING"
    VERIFYING = "VERIFYING"
    COMMITTING = "COMMITTING"
    EVICTING = "EVICTING"
    STARTING_WORKER = "STARTING_WORKER"
    LOADING = "LOADING"
    CHECKING = "CHECKING"
    DRAINING = "DRAINING"
    UNLOADING = "UNLOADING"


class Tier(enum.StrEnum):
    """Where the weights of an instance are."""

    DISK = "DISK"
    HOST = "HOST"
    DEVICE = "DEVICE"


class Health(enum.StrEnum):
    """What the last real checks of an instance said."""

    UNKNOWN = "UNKNOWN"
    HEALTHY = "HEALTHY"
    DEGRADED = "DEGRADED"
    UNHEALTHY = "UNHEALTHY"


class DeviceKind(enum.StrEnum):
    """What kind of hardware a device is."""

    CPU = "CPU"
    CUDA = "CUDA"
    SIM = "SIM"


class Isolation(enum.StrEnum):
    """Whether a model shares the worker of its device or has one of its own."""

    SHARED = "SHARED"
    PROCESS = "PROCESS"


class Kind(enum.StrEnum):
    """The tables of the registry; the value is the collection's name in resource names."""

    MODEL = "models"
    INSTANCE = "instances"
    OPERATION = "operations"
    DEVICE = "devices"
    SLOT = "slots"
    LEASE = "leases"
    SETTINGS = "settings"
