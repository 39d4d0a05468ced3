"""gRPC statuses and ``modelhost.v1.Error`` messages, translated into the classes of ``_errors``."""

import re
from collections.abc import Iterable
from typing import Protocol

import grpc
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]

from modelhost import _errors
from modelhost._errors import Code, ModelhostError
from modelhost.v1 import errors_pb2, operations_pb2

DETAILS_KEY = "grpc-status-details-bin"
"""Trailing metadata with a serialised google.rpc.Status. Source: https://google.aip.dev/193."""

REQUEST_ID_KEY = "x-request-id"

DOMAIN = "modelhost"

# What grpc says when the connection went away in a call that had begun; codes other than UNAVAILABLE.
_BROKEN = ("RST_STREAM", "Stream removed", "stream removed", "GOAWAY")


class RpcFailure(Protocol):
    """What ``grpc.RpcError`` of a call and ``grpc.aio.AioRpcError`` have in common."""

    def code(self) -> grpc.StatusCode:
        """Return the status."""
        ...

    def details(self) -> str | None:
        """Return its text."""
        ...

    def trailing_metadata(self) -> Iterable[tuple[str, str | bytes]] | None:
        """Return what came behind the answer."""
        ...


def error_from_rpc(
    failure: RpcFailure, *, call: str, target: str, timeout: float | None
) -> ModelhostError:
    """Return the error that a failed call means.

    ``call`` is the method's name, ``timeout`` the deadline in seconds that it was made with: they are
    told where the daemon did not say anything itself.
    """
    code = Code(failure.code().value[0])
    text = failure.details() or ""
    # A tuple first: grpc.aio's Metadata has keys(), and in older versions they are pairs.
    trailing = dict(tuple(failure.trailing_metadata() or ()))
    request_id = _text(trailing.get(REQUEST_ID_KEY, ""))
    info, retry = _details(trailing.get(DETAILS_KEY, b""))
    if info is not None:
        return _errors.make_error(
            text or info.reason,
            code=code,
            reason=info.reason,
            metadata=info.metadata,
            retry_delay=_seconds(retry.retry_delay) if retry is not None else None,
            request_id=request_id,
        )
    code, reason, message = _undocumented(code, text, call, target, timeout)
    return _errors.make_error(message, code=code, reason=reason, request_id=request_id)


def error_from_message(error: errors_pb2.Error) -> ModelhostError:
    """Return what an operation, an artifact, an instance or a plan failed with."""
    delay = _seconds(error.retry_delay) if error.HasField("retry_delay") else None
    return _errors.make_error(
        error.message or error.reason,
        code=_known(error.code),
        reason=error.reason,
        metadata=error.metadata,
        retry_delay=delay,
    )


def error_from_operation(operation: operations_pb2.Operation) -> ModelhostError | None:
    """Return why an operation FAILED or was CANCELLED; None where it did not."""
    if operation.state in (operations_pb2.Operation.FAILED, operations_pb2.Operation.CANCELLED):
        error = error_from_message(operation.error)
        error.metadata.setdefault("operation", operation.name)
        return error
    return None


def _undocumented(
    code: Code, text: str, call: str, target: str, timeout: float | None
) -> tuple[Code, str, str]:
    """Return code, reason and message of a status that grpc made, not the daemon."""
    broken = code in (Code.INTERNAL, Code.UNKNOWN) and any(word in text for word in _BROKEN)
    if code is Code.UNAVAILABLE or broken:
        return Code.UNAVAILABLE, "UNREACHABLE", _unreachable(text, call, target)
    if code is Code.DEADLINE_EXCEEDED:
        limit = f"within {timeout:g} s" if timeout is not None else "in time"
        return code, "DEADLINE_EXCEEDED", f"{call} got no answer {limit} from {target}"
    if code is Code.UNIMPLEMENTED:
        return code, "UNIMPLEMENTED", f"the daemon at {target} does not serve {call} ({text})"
    if code is Code.RESOURCE_EXHAUSTED and "larger than max" in text:
        return code, "MESSAGE_TOO_LARGE", _too_large(text, call, target)
    return (
        code,
        code.name,
        f"{call} failed with {code.name} at {target}" + (f": {text}" if text else ""),
    )


def _too_large(text: str, call: str, target: str) -> str:
    sizes = re.search(r"\((\d+) vs\. (\d+)\)", text)
    if sizes is None:
        return f"{call}: {text}"
    who = f"the daemon at {target}" if "SERVER" in text else "this client"
    return (
        f"{call} needs a message of {sizes[1]} bytes, and {who} takes at most {sizes[2]}; "
        "send less at once, or raise that limit"
    )


def _unreachable(text: str, call: str, target: str) -> str:
    if text.startswith("failed to connect"):
        return f"no modelhost daemon answers at {target}: {text.rpartition(': ')[2]}"
    return f"the connection to the daemon at {target} broke in {call}: {text or 'no reason given'}"


def _details(
    value: str | bytes,
) -> tuple[error_details_pb2.ErrorInfo | None, error_details_pb2.RetryInfo | None]:
    """Return the ErrorInfo of modelhost and the RetryInfo, where there are any that can be read."""
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    has_info = has_retry = False
    try:
        status = status_pb2.Status.FromString(value if isinstance(value, bytes) else b"")
        for detail in status.details:
            has_info = detail.Unpack(info) or has_info
            has_retry = detail.Unpack(retry) or has_retry
    except DecodeError:
        return None, None
    ours = has_info and info.domain == DOMAIN
    return (info if ours else None), (retry if has_retry else None)


def _known(code: int) -> Code:
    return Code(code) if code in Code.__members__.values() else Code.UNKNOWN


def _seconds(duration: Message) -> float:
    assert hasattr(duration, "seconds")
    assert hasattr(duration, "nanos")
    return float(duration.seconds + duration.nanos / 1e9)


def _text(value: str | bytes) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value
