"""What holds for every call, whichever twin makes it."""

import uuid
from typing import Protocol, cast

from google.protobuf.message import Message

from modelhost._options import Options


class RequestIdCarrier(Protocol):
    """A request that can be repeated, since the daemon knows it again."""

    request_id: str


def begin(request: Message, timeout: float | None, options: Options) -> tuple[str, float]:
    """Make a request ready to be sent; return its method's name and its deadline in seconds.

    A request that can carry a ``request_id`` gets one, so that grpc may send it twice.
    """
    if "request_id" in request.DESCRIPTOR.fields_by_name:
        carrier = cast("RequestIdCarrier", request)
        carrier.request_id = carrier.request_id or make_request_id()
    return method_of(request), options.timeout if timeout is None else timeout


def make_request_id() -> str:
    """Return a new UUID."""
    return str(uuid.uuid4())


def method_of(request: Message) -> str:
    """Return the name of the method that a request belongs to."""
    return request.DESCRIPTOR.name.removesuffix("Request")
