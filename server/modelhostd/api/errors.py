"""Errors on their way out: a ModelhostError as a gRPC status with google.rpc details.

The details hold exactly one ``google.rpc.ErrorInfo`` (``domain`` "modelhost") and, where they apply and
at most once each, RetryInfo, BadRequest, PreconditionFailure and ResourceInfo; ``errors.proto`` says
when. They travel as gRPC's own trailer ``grpc-status-details-bin``:
https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md and google/rpc/status.proto.
"""

import uuid
from collections.abc import Mapping
from typing import Any, NoReturn
from urllib.parse import quote

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]

from modelhostd.core.errors import Code, ModelhostError, Reason

DOMAIN = "modelhost"
DETAILS_KEY = "grpc-status-details-bin"
REQUEST_ID_KEY = "x-request-id"

# A client refuses trailers above 8 KiB (grpc.max_metadata_size), and then sees no reason at all. The
# details go as base64 (4/3), the text a second time as grpc-message.
DETAILS_BYTES_MAX = 4000
MESSAGE_BYTES_MAX = 1200
_VALUE_LENGTHS = (2000, 1000, 300, 80)

STATUS_CODES: Mapping[int, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}

# Metadata key -> (type of the resource, its collection).
_RESOURCES: Mapping[str, tuple[str, str]] = {
    "operation": ("modelhost.v1.Operation", "operations/"),
    "instance": ("modelhost.v1.Instance", ""),
    "slot": ("modelhost.v1.Slot", "slots/"),
    "lease": ("modelhost.v1.Lease", "leases/"),
    "region": ("inference.SharedMemoryRegion", ""),
    "model": ("modelhost.v1.Model", "models/"),
    "device": ("modelhost.v1.Device", "devices/"),
    "source": ("modelhost.v1.Source", ""),
    "name": ("modelhost.v1.Model", ""),
}


def internal(error_id: str) -> ModelhostError:
    """Return INTERNAL with a fixed text and an opaque id; what happened stands in the log only."""
    return ModelhostError(
        Reason.INTERNAL,
        f"internal error {error_id}; the daemon's log tells more under this id, please report both",
        {"errorId": error_id},
    )


def new_error_id() -> str:
    """Return an opaque id for one unexpected error."""
    return uuid.uuid4().hex[:16]


def unimplemented(method: str, what: str = "") -> ModelhostError:
    """Return UNIMPLEMENTED for a method, or for ``what`` of it (a field, an option)."""
    short = method.rpartition("/")[2]
    return ModelhostError(
        Reason.UNIMPLEMENTED,
        f"{what or short} is not implemented by this daemon yet; the README's table says what works",
        {"method": short},
    )


def shutting_down(resume_sequence: int | None = None) -> ModelhostError:
    """Return what a call gets that begins, or is ended, while the daemon stops."""
    metadata = {} if resume_sequence is None else {"resumeSequence": str(resume_sequence)}
    return ModelhostError(
        Reason.SHUTTING_DOWN,
        "the daemon is shutting down; repeat the call in a few seconds, it may be restarting",
        metadata,
        retry_delay_s=2.0,
    )


def text(message: str) -> str:
    """Return a message as it is sent: printable, and short enough for the trailer that it goes in."""
    if not message.isprintable():
        # Names of tensors and parameters are the caller's, and end on a terminal or in a log.
        message = "".join(c if c.isprintable() else _escaped(c) for c in message)
    # There a byte beyond ASCII takes three.
    while len(quote(message, safe=" !\"#$&'()*+,/:;<=>?@[]^`{|}~")) > MESSAGE_BYTES_MAX:
        message = message[: len(message) * 3 // 4].rstrip(". ") + "..."
    return message


def status_of(error: ModelhostError) -> status_pb2.Status:
    """Return the status of an error, at most DETAILS_BYTES_MAX bytes: long metadata values are cut."""
    status = status_pb2.Status()
    for length in _VALUE_LENGTHS:
        status = _status(error, length)
        if status.ByteSize() <= DETAILS_BYTES_MAX:
            break
    return status


def trailers(error: ModelhostError, request_id: str = "") -> tuple[tuple[str, str | bytes], ...]:
    """Return the trailing metadata that carries an error's details and the request's id."""
    details: tuple[str, str | bytes] = (DETAILS_KEY, status_of(error).SerializeToString())
    return (details, (REQUEST_ID_KEY, request_id)) if request_id else (details,)


async def abort(
    context: "grpc.aio.ServicerContext[Any, Any]", error: ModelhostError, request_id: str = ""
) -> NoReturn:
    """End a call with an error. Raises grpc's own AbortError, always.

    Free what the call holds before: on a stream whose reader is gone this may not return for long.
    """
    code = STATUS_CODES[int(error.code)]
    # Their frames have the request, and one of them has the error.
    error.__traceback__ = error.__context__ = None
    await context.abort(code, text(error.message), trailers(error, request_id))
    raise AssertionError("abort returned")


def _status(error: ModelhostError, length: int) -> status_pb2.Status:
    message = text(error.message)
    metadata = {key: _cut(value, length) for key, value in error.metadata.items()}
    details: list[Message] = [
        error_details_pb2.ErrorInfo(reason=error.reason.value, domain=DOMAIN, metadata=metadata)
    ]
    if error.retry_delay_s is not None:
        delay = Duration()
        delay.FromNanoseconds(int(error.retry_delay_s * 1e9))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    details += _by_code(error, metadata, message)
    status = status_pb2.Status(code=int(error.code), message=message)
    for detail in details:
        packed = AnyMessage()
        packed.Pack(detail)
        status.details.append(packed)
    return status


def _by_code(error: ModelhostError, metadata: Mapping[str, str], message: str) -> list[Message]:
    kind, name = _resource(metadata)
    if error.code is Code.INVALID_ARGUMENT:
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=metadata.get("field", ""), description=message
        )
        return [error_details_pb2.BadRequest(field_violations=[violation])]
    if error.code is Code.FAILED_PRECONDITION:
        failed = error_details_pb2.PreconditionFailure.Violation(
            type=error.reason.value, subject=name, description=message
        )
        return [error_details_pb2.PreconditionFailure(violations=[failed])]
    if error.code in (Code.NOT_FOUND, Code.ALREADY_EXISTS):
        return [
            error_details_pb2.ResourceInfo(
                resource_type=kind, resource_name=name, description=message
            )
        ]
    return []


def _resource(metadata: Mapping[str, str]) -> tuple[str, str]:
    """Return the type and the full name of the resource that an error speaks of."""
    for key, (kind, collection) in _RESOURCES.items():
        value = metadata.get(key)
        if value:
            return kind, value if value.startswith(collection) else collection + value
    return "", ""


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def _cut(value: str, length: int) -> str:
    return value if len(value) <= length else value[: length - 3] + "..."
