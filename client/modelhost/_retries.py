"""Which calls grpc may repeat by itself, read from the contract's descriptors."""

import functools
import json
from collections.abc import Iterator

from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.descriptor_pb2 import MethodOptions

from modelhost.oip import open_inference_pb2
from modelhost.v1 import (
    event_service_pb2,
    host_service_pb2,
    inference_service_pb2,
    model_service_pb2,
    operation_service_pb2,
    residency_service_pb2,
)

# Hides a restart of the daemon of about a second. grpc caps the attempts at 5.
POLICY = {
    "maxAttempts": 5,
    "initialBackoff": "0.2s",
    "maxBackoff": "2s",
    "backoffMultiplier": 2,
    "retryableStatusCodes": ["UNAVAILABLE"],
}

# The published inference contract has no options to read. Never ModelInfer: a request that took a worker
# down would take the next one down, too; and never what loads or unloads.
_OIP_READS = frozenset(
    {
        *("ServerLive", "ServerReady", "ServerMetadata", "ModelReady", "ModelMetadata"),
        *("ModelConfig", "ModelStatistics", "RepositoryIndex"),
    }
)

# Safe to repeat, but UNAVAILABLE there is the source's: the daemon has tried already.
_ASKS_A_SOURCE = frozenset({"InspectSource"})


def services() -> Iterator[ServiceDescriptor]:
    """Yield every service of the contract."""
    for module in (
        *(model_service_pb2, residency_service_pb2, operation_service_pb2),
        *(event_service_pb2, host_service_pb2, inference_service_pb2, open_inference_pb2),
    ):
        yield from module.DESCRIPTOR.services_by_name.values()


def repeatable(method: MethodDescriptor) -> bool:
    """Whether a second run of a call does no more than the first.

    It says so itself, or its request carries a ``request_id``, which this client always sets. Not for
    streams of requests: what was sent is gone.
    """
    if method.client_streaming or method.name in _ASKS_A_SOURCE:
        return False
    if method.containing_service.name == "GRPCInferenceService":
        return method.name in _OIP_READS
    return (
        method.GetOptions().idempotency_level != MethodOptions.IDEMPOTENCY_UNKNOWN
        or "request_id" in method.input_type.fields_by_name
    )


@functools.cache
def service_config() -> str:
    """Return grpc's service config: JSON, the retry policy and the methods that it is for.

    Source: https://github.com/grpc/grpc/blob/master/doc/service_config.md, gRFC A6.
    """
    names = [
        {"service": service.full_name, "method": method.name}
        for service in services()
        for method in service.methods
        if repeatable(method)
    ]
    return json.dumps({"methodConfig": [{"name": names, "retryPolicy": POLICY}]})
