"""Wrong requests: what is called with what, and what must come back. The tables stand beside this."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2

from modelhost.oip import open_inference_pb2
from modelhost.v1 import (
    event_service_pb2,
    host_service_pb2,
    inference_service_pb2,
    model_service_pb2,
    operation_service_pb2,
    residency_service_pb2,
)
from tests.api.support import CALL_S

_FILES = (
    *(model_service_pb2, residency_service_pb2, operation_service_pb2, event_service_pb2),
    *(host_service_pb2, inference_service_pb2, open_inference_pb2, health_pb2),
)
METHODS: Mapping[str, MethodDescriptor] = {
    method.name: method
    for file in _FILES
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}
"""Every method of every service by its name, which no two share."""

NEVER_REFUSED: Mapping[str, str] = {
    "ModelStreamInfer": "a wrong request is answered in the stream, which goes on",
    "Watch": "grpc.health.v1: an unknown name is watched until it is known",
    **dict.fromkeys(
        ("SystemSharedMemoryUnregister", "CudaSharedMemoryUnregister"), "nothing is registered"
    ),
}
"""Methods with fields of which no value is wrong, and why."""


@dataclass
class Bad:
    """One wrong request: what is called, and what comes back. ``request`` may be bytes."""

    id: str
    method: str
    request: Message | bytes
    reason: str
    says: tuple[str, ...] = ()
    metadata: dict[str, str] = field(default_factory=dict)


def answer(channel: grpc.aio.Channel, name: str, requests: Sequence[Message | bytes]) -> Any:
    """Call a method by its name; return what gives its answer, or the first of a stream of them."""
    method = METHODS[name]
    path = f"/{method.containing_service.full_name}/{name}"
    data = [r if isinstance(r, bytes) else r.SerializeToString() for r in requests]
    if method.client_streaming and method.server_streaming:
        return channel.stream_stream(path)(iter(data), timeout=CALL_S).read()
    if method.client_streaming:
        return channel.stream_unary(path)(iter(data), timeout=CALL_S)
    if method.server_streaming:
        return channel.unary_stream(path)(data[0], timeout=CALL_S).read()
    return channel.unary_unary(path)(data[0], timeout=CALL_S)
