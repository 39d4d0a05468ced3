"""Every error that modelhost raises: one class per meaning. Needs neither grpc nor protobuf.

What a call failed with and what an operation failed with are the same classes. ``reason`` is the word of
``modelhost.v1.Reason``; which reasons there are, and their metadata, stands in errors.proto.
"""

import enum
from collections.abc import Mapping
from typing import ClassVar


class Code(enum.IntEnum):
    """gRPC status codes by number. Source: https://grpc.io/docs/guides/status-codes/."""

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


class ModelhostError(Exception):
    """What every error of modelhost is.

    ``message`` says what happened, to which name and with which numbers; ``hint`` what to do next, where
    the client knows more than the message says; ``metadata`` has the numbers under the keys of errors.proto.
    ``retry_delay`` is in seconds, None where the daemon suggested none. ``request_id`` finds the call in
    the daemon's log; empty where the daemon gave none.
    """

    default_code: ClassVar[Code] = Code.UNKNOWN

    def __init__(
        self,
        message: str,
        *,
        code: Code | None = None,
        reason: str = "",
        metadata: Mapping[str, str] | None = None,
        hint: str = "",
        retry_delay: float | None = None,
        request_id: str = "",
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = self.default_code if code is None else code
        self.reason = reason
        self.metadata = dict(metadata or {})
        self.hint = hint
        self.retry_delay = retry_delay
        self.request_id = request_id

    def __str__(self) -> str:
        return self.message

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.message,), self.__dict__

    @property
    def retryable(self) -> bool:
        """Whether the same call may succeed later, with nothing else changed."""
        return self.code is Code.UNAVAILABLE or self.retry_delay is not None

    def _bytes(self, key: str) -> int | None:
        text = self.metadata.get(key, "")
        return int(text) if text.isascii() and text.isdigit() else None

    def _names(self, key: str) -> tuple[str, ...]:
        return tuple(part.strip() for part in self.metadata.get(key, "").split(",") if part)


class InvalidArgument(ModelhostError, ValueError):
    """What was asked for is malformed; ``metadata`` names ``field``, ``expected`` and ``actual``."""

    default_code = Code.INVALID_ARGUMENT


class NotFound(ModelhostError):
    """There is no such model, instance, operation, device, slot, lease or source."""

    default_code = Code.NOT_FOUND


class AlreadyExists(ModelhostError):
    """The name is taken."""

    default_code = Code.ALREADY_EXISTS


class PreconditionFailed(ModelhostError):
    """The thing is not in a state in which that can be done; ``reason`` and ``metadata`` say why."""

    default_code = Code.FAILED_PRECONDITION


class BudgetTooSmall(PreconditionFailed):
    """Pins and leases hold more than this budget of a device, or of host memory; it is what it was."""

    @property
    def needed_bytes(self) -> int | None:
        """The smallest budget that would be taken now."""
        return self._bytes("neededBytes")

    @property
    def held_by(self) -> tuple[str, ...]:
        """Who holds the memory, as the daemon names them."""
        return self._names("heldBy")


class Conflict(ModelhostError):
    """Someone else was there first: the etag is not current, or another operation runs."""

    default_code = Code.ABORTED


class PermissionDenied(ModelhostError):
    """The caller lacks the right."""

    default_code = Code.PERMISSION_DENIED


class ResourceExhausted(ModelhostError):
    """A limit is reached: disk space, a source's rate, a message's size, or what a subclass names."""

    default_code = Code.RESOURCE_EXHAUSTED


class OutOfMemory(ResourceExhausted):
    """The model does not fit: OUT_OF_DEVICE_MEMORY (not now) or MODEL_TOO_LARGE (on no device, ever).

    The numbers are bytes; None where the daemon gave none.
    """

    @property
    def needed_bytes(self) -> int | None:
        """Bytes that the load needs."""
        return self._bytes("neededBytes")

    @property
    def free_bytes(self) -> int | None:
        """Bytes that were free on the device."""
        return self._bytes("freeBytes")

    @property
    def evictable_bytes(self) -> int | None:
        """Bytes that evicting idle models would have added."""
        return self._bytes("evictableBytes")

    @property
    def budget_bytes(self) -> int | None:
        """The device's budget."""
        return self._bytes("budgetBytes")

    @property
    def held_by(self) -> tuple[str, ...]:
        """Who holds the memory, as the daemon names them."""
        return self._names("heldBy")


class QueueFull(ResourceExhausted):
    """Too many wait already; ``retry_delay`` says when to try again."""


class OutOfRange(ModelhostError):
    """The events asked for are no longer kept, or do not exist yet."""

    default_code = Code.OUT_OF_RANGE


class Unavailable(ModelhostError):
    """It does not work now: a source, a worker or the disk failed, or the daemon is shutting down."""

    default_code = Code.UNAVAILABLE


class Unreachable(Unavailable):
    """No daemon answers at the target, or the connection to it broke during the call."""


class Timeout(ModelhostError):
    """It took longer than the caller, or a setting of the host, allows."""

    default_code = Code.DEADLINE_EXCEEDED


class Cancelled(ModelhostError):
    """The operation, or the call, was cancelled."""

    default_code = Code.CANCELLED


class Unimplemented(ModelhostError):
    """This daemon cannot do that (yet)."""

    default_code = Code.UNIMPLEMENTED


class DataLoss(ModelhostError):
    """A file is not what it should be: its checksum or its format."""

    default_code = Code.DATA_LOSS


class Internal(ModelhostError):
    """A bug, or an inference that failed inside the model; the daemon's log has the rest."""

    default_code = Code.INTERNAL


_BY_REASON: Mapping[str, type[ModelhostError]] = {
    "BUDGET_TOO_SMALL": BudgetTooSmall,
    "OUT_OF_DEVICE_MEMORY": OutOfMemory,
    "MODEL_TOO_LARGE": OutOfMemory,
    "QUEUE_FULL": QueueFull,
    "UNREACHABLE": Unreachable,
}
_BY_CODE: Mapping[Code, type[ModelhostError]] = {
    kind.default_code: kind
    for kind in (
        *(InvalidArgument, NotFound, AlreadyExists, PreconditionFailed, Conflict),
        *(PermissionDenied, ResourceExhausted, OutOfRange, Unavailable, Timeout),
        *(Cancelled, Unimplemented, DataLoss, Internal),
    )
} | {Code.UNAUTHENTICATED: PermissionDenied, Code.UNKNOWN: Internal}

# What to type next, where the reason alone tells. {key} is filled from the metadata.
_HINTS: Mapping[str, str] = {
    "MODEL_NOT_FOUND": "`modelhost ls` lists the models, `modelhost pull SOURCE` adds one",
    "INSTANCE_NOT_FOUND": "`modelhost ps` lists what is loaded",
    "OPERATION_NOT_FOUND": "`modelhost ops ls` lists the operations that are kept",
    "DEVICE_NOT_FOUND": "`modelhost status` lists the devices",
    "ALREADY_EXISTS": "choose another id with `--name`, or look at it with `modelhost show {name}`",
    "CONFLICTING_OPERATION": "`modelhost ops wait {operation}`, or `modelhost cancel {operation}`",
    "MODEL_NOT_DOWNLOADED": "`modelhost pull {model}`",
    "MODEL_NOT_LOADED": "`modelhost load {model}`",
    "MODEL_LOADED": "`modelhost unload {model}` first, or repeat it with `--force`",
    "OUT_OF_DEVICE_MEMORY": "`modelhost plan {model}` shows who would have to go; `modelhost unload` and `modelhost unpin` make room",
    "BUDGET_TOO_SMALL": "`modelhost top` shows who is pinned or leased; `modelhost unpin`, or `modelhost budget {device} {neededBytes}`",
    "MODEL_TOO_LARGE": "`modelhost budget` shows and sets what a device may use",
    "UNSUPPORTED_MODEL": "where the task is wrong: `modelhost rm {model}`, then `modelhost pull SOURCE --task TASK`",
    "GATED": "accept the licence at the source, and give the daemon a token (HF_TOKEN)",
    "AUTHENTICATION_REQUIRED": "give the daemon a token for the source; `modelhost sources` shows which it has",
    "SOURCE_NOT_ALLOWED": "who runs the daemon may allow it in its configuration: {setting}",
    "SEQUENCE_COMPACTED": "start again with the whole state: `modelhost events --snapshot`",
    "SEQUENCE_IN_FUTURE": "start again with the whole state: `modelhost events --snapshot`",
    "PERMISSION_DENIED": "ask through the admin socket (`modelhost status` shows where it is): `--target unix:PATH`",
    "UNREACHABLE": "start it with `modelhost serve`, or name another with --target or MODELHOST_TARGET",
}


def error_class(code: Code, reason: str) -> type[ModelhostError]:
    """Return the class for a reason, else for a code."""
    return _BY_REASON.get(reason) or _BY_CODE[code]


def hint_for(reason: str, metadata: Mapping[str, str]) -> str:
    """Return the next step for a reason; empty where only the message can know it."""
    names = {key: value.partition("/")[2] or value for key, value in metadata.items()}
    try:
        return _HINTS.get(reason, "").format_map(names)
    except KeyError:
        return ""


def make_error(
    message: str,
    *,
    code: Code,
    reason: str,
    metadata: Mapping[str, str] | None = None,
    retry_delay: float | None = None,
    request_id: str = "",
) -> ModelhostError:
    """Return the error of the right class, with its hint."""
    return error_class(code, reason)(
        message,
        code=code,
        reason=reason,
        metadata=metadata,
        hint=hint_for(reason, metadata or {}),
        retry_delay=retry_delay,
        request_id=request_id,
    )


def invalid(field: str, expected: str, actual: str) -> InvalidArgument:
    """Return the error for an argument that the client itself can tell is wrong."""
    return InvalidArgument(
        f"{field}: expected {expected}, got {actual}",
        reason="INVALID_ARGUMENT",
        metadata={"field": field, "expected": expected, "actual": actual},
    )
