"""Every RPC but ModelInfer, from its descriptor, with anything in its fields, against the real daemon."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.field_mask_pb2 import FieldMask
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from modelhost import Client
from modelhost.oip import open_inference_pb2
from modelhost.v1 import (
    event_service_pb2,
    host_service_pb2,
    inference_service_pb2,
    model_service_pb2,
    operation_service_pb2,
    residency_service_pb2,
)
from modelhost.v1.host_service_pb2_grpc import HostServiceStub
from modelhost.v1.operation_service_pb2_grpc import OperationServiceStub
from tests import event_validators as validate
from tests.hostile.good import good
from tests.hostile.json_values import encoded
from tests.hostile.judge import typed
from tests.hostile.live import CALL_S, Live, Recorder, have, live, snapshot
from tests.hostile.messages import UNKNOWN_OPERATION, mutated, payloads
from tests.hostile.profile import examples
from tests.support import wait_until

EXAMPLES = 50
WAIT_S = 1.0
DESCRIPTORS_MORE = 8
"""Connections to the hub that are kept, files of the database: some, however many the calls were."""
NEWER = {"grpc.reflection.v1.ServerReflection"}
"""The same messages by another name."""

_FILES = (
    *(model_service_pb2, residency_service_pb2, operation_service_pb2, event_service_pb2),
    *(host_service_pb2, inference_service_pb2, open_inference_pb2, health_pb2, reflection_pb2),
)
_RAW = ("ModelInfer", "ModelStreamInfer")  # test_fuzz_inference.py
METHODS: Sequence[MethodDescriptor] = [
    method
    for file in _FILES
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
    if method.name not in _RAW
]
# They end when their subject does, or with their caller; one message is enough of them.
_LASTING = ("WaitOperation", "WatchOperation", "WatchEvents", "WatchStatistics", "Watch")


@dataclass
class Scene:
    """A daemon under fire, with a watcher that has listened from the beginning."""

    at: Live
    recorder: Recorder
    document: bytes
    descriptors: int

    def operations(self) -> Sequence[str]:
        """Return the names of the newest operations."""
        request = operation_service_pb2.ListOperationsRequest(page_size=12)
        stub = OperationServiceStub(self.at.channel)
        return [o.name for o in stub.ListOperations(request, timeout=CALL_S).operations]


@pytest.fixture(scope="module")
def scene() -> Iterator[Scene]:
    """Start the daemon that all of these tests share."""
    with live("--set", "devices.sim_bytes=1000000") as at:
        recorder = Recorder(at.channel, include_snapshot=True)
        export = HostServiceStub(at.channel).ExportRegistry(
            host_service_pb2.ExportRegistryRequest(), timeout=CALL_S
        )
        document = b"".join(part.chunk for part in export)
        yield Scene(at, recorder, document, at.descriptors())
        recorder.cancel()


def restore(at: Live) -> None:
    """Put back what the methods before may have changed: settings, and two models, one loaded."""
    everything = host_service_pb2.UpdateSettingsRequest(update_mask=FieldMask(paths=["*"]))
    HostServiceStub(at.channel).UpdateSettings(everything, timeout=CALL_S)
    with Client(at.daemon.admin) as client:
        for device in client.devices():
            client.set_budget(device.name, None)
        for model in client.models():
            client.delete(model.name, force=True)
        for fresh in ("m", "victim"):
            have(client, fresh)
        client.load("m")


def path_of(method: MethodDescriptor) -> str:
    """Return the path of a method."""
    return f"/{method.containing_service.full_name}/{method.name}"


def call(channel: grpc.Channel, method: MethodDescriptor, requests: Sequence[bytes]) -> None:
    """Make one call with bytes; fails where the answer is not as any answer must be."""
    lasting = method.name in _LASTING
    deadline = WAIT_S if method.name == "WaitOperation" else CALL_S
    answers: Any
    try:
        if method.client_streaming and method.server_streaming:
            answers = channel.stream_stream(path_of(method))(iter(requests), timeout=deadline)
        elif method.client_streaming:
            channel.stream_unary(path_of(method))(iter(requests), timeout=deadline)
            return
        elif method.server_streaming:
            answers = channel.unary_stream(path_of(method))(requests[0], timeout=deadline)
        else:
            channel.unary_unary(path_of(method))(requests[0], timeout=deadline)
            return
        for _ in answers:
            if lasting:
                answers.cancel()
                return
    except grpc.RpcError as error:
        if lasting and error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
            return
        typed(error)


def requests_of(method: MethodDescriptor, scene: Scene) -> st.SearchStrategy[Sequence[bytes]]:
    """Return what may be sent to a method: one message, or some."""
    operations = [*scene.operations(), UNKNOWN_OPERATION]
    one = payloads(method.input_type, good(operations).get(method.input_type.full_name, ()))
    if not method.client_streaming:
        return st.lists(one, min_size=1, max_size=1)
    if method.name == "ImportRegistry":
        one = st.one_of(one, documents(scene.document))
    return st.lists(one, max_size=3)


def documents(document: bytes) -> st.SearchStrategy[bytes]:
    """Return import requests that hold the registry's own export, damaged or not."""
    kinds = st.sampled_from([0, 1, 2, 3, 99])

    def request(chunk: bytes, conflict: int, dry_run: bool, whole: bool) -> bytes:
        made = host_service_pb2.ImportRegistryRequest(
            chunk=chunk,
            conflict=conflict,  # type: ignore[arg-type]
            dry_run=dry_run,
            include_settings=whole,
        )
        return made.SerializeToString()

    damaged = encoded(json.loads(document), mutated)
    return st.builds(request, damaged, kinds, st.booleans(), st.booleans())


@pytest.mark.parametrize("method", METHODS, ids=lambda m: f"{m.containing_service.name}.{m.name}")
def test_any_request_is_answered_in_type(method: MethodDescriptor, scene: Scene) -> None:
    """Whatever a request holds, it succeeds or gets an error of the contract; never INTERNAL."""

    @settings(
        max_examples=examples(EXAMPLES),
        suppress_health_check=list(HealthCheck),
        # What an example does depends on what those before it did: there is nothing to replay.
        database=None,
    )
    @given(requests_of(method, scene))
    def attempt(requests: Sequence[bytes]) -> None:
        call(scene.at.channel, method, requests)

    restore(scene.at)
    attempt()
    scene.at.check_alive()
    scene.at.check_log()


def test_every_service_of_the_daemon_is_among_them(scene: Scene) -> None:
    """What reflection lists is what is called here, and ModelInfer with its stream elsewhere."""
    ask = reflection_pb2.ServerReflectionRequest(list_services="")
    (answer,) = reflection_pb2_grpc.ServerReflectionStub(scene.at.channel).ServerReflectionInfo(
        iter([ask]), timeout=CALL_S
    )
    served = {service.name for service in answer.list_services_response.service}
    assert served - NEWER == {method.containing_service.full_name for method in METHODS}


def test_no_call_and_no_descriptor_is_left_over(scene: Scene) -> None:
    """However they were broken off, all calls have ended but the one that is still listened to."""
    wait_until(lambda: scene.at.open_calls() == {"WatchEvents": 1}, what="all calls end")
    most = scene.descriptors + DESCRIPTORS_MORE
    wait_until(lambda: scene.at.descriptors() <= most, what="the descriptors return")


def test_what_all_of_this_leaves_is_whole(scene: Scene) -> None:
    """The watcher missed nothing, holds the state, gets its last word; the home passes fsck.

    The last of this file: it ends the daemon.
    """
    truth = snapshot(scene.at.channel)
    stream = scene.recorder.until(truth.snapshot_sequence)
    seen = [e for e in stream.events if e.sequence <= truth.snapshot_sequence]
    validate.check_contiguous(seen, stream.snapshot_sequence + 1, truth.snapshot_sequence)
    stream.events = seen
    validate.check_state(stream, truth.snapshot)
    scene.at.check_alive()
    assert scene.at.daemon.stop() == 0
    last = typed(scene.recorder.ended())
    assert last.reason == "SHUTTING_DOWN"
    assert int(last.metadata["resumeSequence"]) == scene.recorder.stream.position + 1
    scene.at.check_log()
    checked = scene.at.fsck()
    assert checked.returncode == 0, checked.stdout + checked.stderr
