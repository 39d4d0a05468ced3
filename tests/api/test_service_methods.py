"""Which methods of a service are offered."""

from types import SimpleNamespace

from google.protobuf import descriptor_pb2, descriptor_pool
from grpc_health.v1 import health_pb2

from modelhost.v1 import options_pb2
from modelhostd.api.methods import Service


def test_a_method_that_a_newer_library_adds_is_not_offered() -> None:
    """The health protocol has grown (List): a daemon beside a newer library starts all the same."""
    grown = descriptor_pb2.FileDescriptorProto()
    health_pb2.DESCRIPTOR.CopyToProto(grown)
    grown.service[0].method.add(
        name="Later",
        input_type=".grpc.health.v1.HealthCheckRequest",
        output_type=".grpc.health.v1.HealthCheckResponse",
    )
    pool = descriptor_pool.DescriptorPool()
    pool.Add(grown)
    rights = {"Check": options_pb2.READ, "Watch": options_pb2.READ}
    descriptor = pool.FindServiceByName("grpc.health.v1.Health")
    service = Service(descriptor, SimpleNamespace(check=print, watch=print), rights=rights)
    assert service.methods().keys() == {"Check", "Watch"}
