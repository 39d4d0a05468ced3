"""Every error modelhost can answer with: reason, code and metadata keys on one page.

``protos/modelhost/v1/errors.proto`` documents the same table for clients; a test keeps the two equal.
A reason decides the gRPC code; a message says what happened, to which name, with which numbers, and
what to do next. Whatever the text says is in the metadata too.
"""

import enum
from collections.abc import Mapping
from dataclasses import field

from modelhostd.core.values import dataclass


class Code(enum.IntEnum):
    """gRPC status codes by number, so that core needs no grpc.

    Source: https://grpc.io/docs/guides/status-codes/
    """

    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    OUT_OF_RANGE = 11
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    DATA_LOSS = 15
    UNAUTHENTICATED = 16


class Reason(enum.StrEnum):
    """What went wrong, in one machine-readable word; ``google.rpc.ErrorInfo.reason`` on the wire."""

    INVALID_ARGUMENT = "INVALID_ARGUMENT"
    REQUEST_ID_REUSED = "REQUEST_ID_REUSED"
    MESSAGE_TOO_LARGE = "MESSAGE_TOO_LARGE"
    MODEL_NOT_FOUND = "MODEL_NOT_FOUND"
    INSTANCE_NOT_FOUND = "INSTANCE_NOT_FOUND"
    OPERATION_NOT_FOUND = "OPERATION_NOT_FOUND"
    DEVICE_NOT_FOUND = "DEVICE_NOT_FOUND"
    SLOT_NOT_FOUND = "SLOT_NOT_FOUND"
    LEASE_NOT_FOUND = "LEASE_NOT_FOUND"
    REGION_NOT_FOUND = "REGION_NOT_FOUND"
    ALREADY_EXISTS = "ALREADY_EXISTS"
    ETAG_MISMATCH = "ETAG_MISMATCH"
    CONFLICTING_OPERATION = "CONFLICTING_OPERATION"
    MODEL_NOT_DOWNLOADED = "MODEL_NOT_DOWNLOADED"
    MODEL_NOT_LOADED = "MODEL_NOT_LOADED"
    MODEL_LOADED = "MODEL_LOADED"
    MODEL_BUSY = "MODEL_BUSY"
    MODEL_BLOCKED = "MODEL_BLOCKED"
    MODEL_NOT_HERE = "MODEL_NOT_HERE"
    LOAD_FAILED = "LOAD_FAILED"
    BACKEND_NOT_AVAILABLE = "BACKEND_NOT_AVAILABLE"
    UNSUPPORTED_MODEL = "UNSUPPORTED_MODEL"
    INFERENCE_FAILED = "INFERENCE_FAILED"
    WRONG_STATE = "WRONG_STATE"
    BUDGET_TOO_SMALL = "BUDGET_TOO_SMALL"
    NETWORK_ERROR = "NETWORK_ERROR"
    OFFLINE = "OFFLINE"
    RATE_LIMITED = "RATE_LIMITED"
    AUTHENTICATION_REQUIRED = "AUTHENTICATION_REQUIRED"
    ACCESS_DENIED = "ACCESS_DENIED"
    GATED = "GATED"
    SOURCE_NOT_FOUND = "SOURCE_NOT_FOUND"
    SOURCE_NOT_ALLOWED = "SOURCE_NOT_ALLOWED"
    BAD_SOURCE_REPLY = "BAD_SOURCE_REPLY"
    CHECKSUM_MISMATCH = "CHECKSUM_MISMATCH"
    MALFORMED_FILE = "MALFORMED_FILE"
    UNSAFE_FILE = "UNSAFE_FILE"
    INSUFFICIENT_DISK_SPACE = "INSUFFICIENT_DISK_SPACE"
    PERMISSION_DENIED_ON_DISK = "PERMISSION_DENIED_ON_DISK"
    STORAGE_ERROR = "STORAGE_ERROR"
    OUT_OF_DEVICE_MEMORY = "OUT_OF_DEVICE_MEMORY"
    MODEL_TOO_LARGE = "MODEL_TOO_LARGE"
    QUEUE_FULL = "QUEUE_FULL"
    LOAD_TIMEOUT = "LOAD_TIMEOUT"
    WORKER_LOST = "WORKER_LOST"
    DAEMON_RESTARTED = "DAEMON_RESTARTED"
    SHUTTING_DOWN = "SHUTTING_DOWN"
    SEQUENCE_COMPACTED = "SEQUENCE_COMPACTED"
    SEQUENCE_IN_FUTURE = "SEQUENCE_IN_FUTURE"
    PERMISSION_DENIED = "PERMISSION_DENIED"
    CANCELLED = "CANCELLED"
    DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"
    UNIMPLEMENTED = "UNIMPLEMENTED"
    INTERNAL = "INTERNAL"


@dataclass(frozen=True, slots=True)
class ReasonSpec:
    """The code a reason is sent with, and the metadata keys its errors carry (some may be absent)."""

    code: Code
    keys: tuple[str, ...] = ()


REASONS: Mapping[Reason, ReasonSpec] = {
    Reason.INVALID_ARGUMENT: ReasonSpec(Code.INVALID_ARGUMENT, ("field", "expected", "actual")),
    Reason.REQUEST_ID_REUSED: ReasonSpec(Code.INVALID_ARGUMENT, ("requestId",)),
    Reason.MESSAGE_TOO_LARGE: ReasonSpec(Code.RESOURCE_EXHAUSTED, ("limitBytes", "actualBytes")),
    Reason.MODEL_NOT_FOUND: ReasonSpec(Code.NOT_FOUND, ("model",)),
    Reason.INSTANCE_NOT_FOUND: ReasonSpec(Code.NOT_FOUND, ("instance",)),
    Reason.OPERATION_NOT_FOUND: ReasonSpec(Code.NOT_FOUND, ("operation",)),
    Reason.DEVICE_NOT_FOUND: ReasonSpec(Code.NOT_FOUND, ("device",)),
    Reason.SLOT_NOT_FOUND: ReasonSpec(Code.NOT_FOUND, ("slot",)),
    Reason.LEASE_NOT_FOUND: ReasonSpec(Code.NOT_FOUND, ("lease",)),
    Reason.REGION_NOT_FOUND: ReasonSpec(Code.NOT_FOUND, ("region",)),
    Reason.ALREADY_EXISTS: ReasonSpec(Code.ALREADY_EXISTS, ("name",)),
    Reason.ETAG_MISMATCH: ReasonSpec(Code.ABORTED, ("name", "expected", "actual")),
    Reason.CONFLICTING_OPERATION: ReasonSpec(Code.ABORTED, ("model", "operation")),
    Reason.MODEL_NOT_DOWNLOADED: ReasonSpec(Code.FAILED_PRECONDITION, ("model", "state")),
    Reason.MODEL_NOT_LOADED: ReasonSpec(Code.FAILED_PRECONDITION, ("model", "state")),
    Reason.MODEL_LOADED: ReasonSpec(Code.FAILED_PRECONDITION, ("model", "instance")),
    Reason.MODEL_BUSY: ReasonSpec(Code.FAILED_PRECONDITION, ("model", "inFlight")),
    Reason.MODEL_BLOCKED: ReasonSpec(Code.FAILED_PRECONDITION, ("model", "crashes", "stderr")),
    Reason.MODEL_NOT_HERE: ReasonSpec(Code.FAILED_PRECONDITION, ("model", "host")),
    Reason.LOAD_FAILED: ReasonSpec(Code.FAILED_PRECONDITION, ("model", "backend", "cause")),
    Reason.BACKEND_NOT_AVAILABLE: ReasonSpec(
        Code.FAILED_PRECONDITION, ("backend", "missing", "available")
    ),
    Reason.UNSUPPORTED_MODEL: ReasonSpec(Code.FAILED_PRECONDITION, ("model", "task", "cause")),
    Reason.INFERENCE_FAILED: ReasonSpec(Code.INTERNAL, ("model", "errorId")),
    Reason.WRONG_STATE: ReasonSpec(Code.FAILED_PRECONDITION, ("name", "state")),
    Reason.BUDGET_TOO_SMALL: ReasonSpec(
        Code.FAILED_PRECONDITION, ("device", "budgetBytes", "neededBytes", "heldBy")
    ),
    Reason.NETWORK_ERROR: ReasonSpec(Code.UNAVAILABLE, ("source", "cause", "status")),
    Reason.OFFLINE: ReasonSpec(Code.UNAVAILABLE, ("source",)),
    Reason.RATE_LIMITED: ReasonSpec(Code.RESOURCE_EXHAUSTED, ("source", "retryAfterSeconds")),
    Reason.AUTHENTICATION_REQUIRED: ReasonSpec(Code.FAILED_PRECONDITION, ("source", "credential")),
    Reason.ACCESS_DENIED: ReasonSpec(Code.FAILED_PRECONDITION, ("source",)),
    Reason.GATED: ReasonSpec(Code.FAILED_PRECONDITION, ("source", "credential")),
    Reason.SOURCE_NOT_FOUND: ReasonSpec(Code.NOT_FOUND, ("source", "missing")),
    Reason.SOURCE_NOT_ALLOWED: ReasonSpec(Code.FAILED_PRECONDITION, ("source", "setting")),
    Reason.BAD_SOURCE_REPLY: ReasonSpec(Code.UNAVAILABLE, ("source", "cause")),
    Reason.CHECKSUM_MISMATCH: ReasonSpec(Code.DATA_LOSS, ("file", "expected", "actual")),
    Reason.MALFORMED_FILE: ReasonSpec(Code.DATA_LOSS, ("file", "cause")),
    Reason.UNSAFE_FILE: ReasonSpec(Code.FAILED_PRECONDITION, ("source", "file", "cause")),
    Reason.INSUFFICIENT_DISK_SPACE: ReasonSpec(
        Code.RESOURCE_EXHAUSTED, ("path", "neededBytes", "freeBytes")
    ),
    Reason.PERMISSION_DENIED_ON_DISK: ReasonSpec(Code.FAILED_PRECONDITION, ("path",)),
    Reason.STORAGE_ERROR: ReasonSpec(Code.UNAVAILABLE, ("path", "cause")),
    Reason.OUT_OF_DEVICE_MEMORY: ReasonSpec(
        Code.RESOURCE_EXHAUSTED,
        (
            "model",
            "device",
            "neededBytes",
            "freeBytes",
            "evictableBytes",
            "heldBy",
            "predictedBytes",
        ),
    ),
    Reason.MODEL_TOO_LARGE: ReasonSpec(
        Code.RESOURCE_EXHAUSTED, ("model", "neededBytes", "device", "budgetBytes", "deviceBytes")
    ),
    Reason.QUEUE_FULL: ReasonSpec(Code.RESOURCE_EXHAUSTED, ("model", "queue", "limit")),
    Reason.LOAD_TIMEOUT: ReasonSpec(Code.DEADLINE_EXCEEDED, ("model", "timeoutSeconds")),
    Reason.WORKER_LOST: ReasonSpec(Code.UNAVAILABLE, ("model", "device", "exit")),
    Reason.DAEMON_RESTARTED: ReasonSpec(Code.UNAVAILABLE, ("operation",)),
    Reason.SHUTTING_DOWN: ReasonSpec(Code.UNAVAILABLE, ("resumeSequence",)),
    Reason.SEQUENCE_COMPACTED: ReasonSpec(
        Code.OUT_OF_RANGE, ("startSequence", "firstSequence", "currentSequence")
    ),
    Reason.SEQUENCE_IN_FUTURE: ReasonSpec(
        Code.OUT_OF_RANGE, ("startSequence", "firstSequence", "currentSequence")
    ),
    Reason.PERMISSION_DENIED: ReasonSpec(Code.PERMISSION_DENIED, ("method", "right")),
    Reason.CANCELLED: ReasonSpec(Code.CANCELLED, ("operation",)),
    Reason.DEADLINE_EXCEEDED: ReasonSpec(Code.DEADLINE_EXCEEDED, ("method",)),
    Reason.UNIMPLEMENTED: ReasonSpec(Code.UNIMPLEMENTED, ("method",)),
    Reason.INTERNAL: ReasonSpec(Code.INTERNAL, ("errorId",)),
}


@dataclass(eq=False)
class ModelhostError(Exception):
    """An error a caller can be told of: a reason, a sentence, and the numbers behind the sentence.

    ``metadata`` keys are those of ``REASONS[reason].keys``. ``retry_delay_s`` becomes RetryInfo.
    Not frozen: ``contextlib`` must be able to set the traceback.
    """

    reason: Reason
    message: str
    metadata: dict[str, str] = field(default_factory=dict)
    retry_delay_s: float | None = None

    def __post_init__(self) -> None:
        super().__init__(self.message)

    def __str__(self) -> str:
        return self.message

    @property
    def code(self) -> Code:
        """The gRPC code this reason is sent with."""
        return REASONS[self.reason].code


def invalid(field_path: str, expected: str, actual: object) -> ModelhostError:
    """Return INVALID_ARGUMENT for one request field: its path, what is expected, what came.

    ``actual`` is cut to 200 characters and printed with ``repr``, so that it cannot break a log line.
    """
    shown = repr(actual)
    shown = shown if len(shown) <= 200 else shown[:197] + "..."
    return ModelhostError(
        Reason.INVALID_ARGUMENT,
        f"{field_path}: expected {expected}, got {shown}",
        {"field": field_path, "expected": expected, "actual": shown},
    )
