"""What is repeated without being asked, and what never is."""

import json

import grpc
import pytest
from google.protobuf.descriptor_pb2 import MethodOptions

from modelhost import Client, ModelhostError, Unreachable, _retries
from modelhost.oip import open_inference_pb2
from modelhost.v1 import models_pb2, operations_pb2
from tests.client.double import Double, failure

AWAY = failure(grpc.StatusCode.UNAVAILABLE)
SHUTTING_DOWN = failure(grpc.StatusCode.UNAVAILABLE, "SHUTTING_DOWN")


def configured() -> set[str]:
    (entry,) = json.loads(_retries.service_config())["methodConfig"]
    assert entry["retryPolicy"]["maxAttempts"] == 5
    assert entry["retryPolicy"]["retryableStatusCodes"] == ["UNAVAILABLE"]
    return {f"{name['service']}/{name['method']}" for name in entry["name"]}


def test_what_may_be_repeated_follows_from_the_contract() -> None:
    """A method is repeated when it says it may be, or when its request carries a request_id."""
    found = configured()
    for service in _retries.services():
        for method in service.methods:
            name = f"{service.full_name}/{method.name}"
            if service.full_name.startswith("modelhost.v1") and method.name != "InspectSource":
                safe = (
                    method.GetOptions().idempotency_level != MethodOptions.IDEMPOTENCY_UNKNOWN
                    or "request_id" in method.input_type.fields_by_name
                )
                assert (name in found) == (safe and not method.client_streaming), name


@pytest.mark.parametrize(
    "method",
    [
        "inference.GRPCInferenceService/ModelInfer",
        "inference.GRPCInferenceService/ModelStreamInfer",
        "inference.GRPCInferenceService/RepositoryModelLoad",
        "inference.GRPCInferenceService/RepositoryModelUnload",
        "modelhost.v1.ModelService/UpdateModel",
        "modelhost.v1.ModelService/UploadModelFiles",
        "modelhost.v1.ModelService/InspectSource",
        "modelhost.v1.HostService/ImportRegistry",
        "modelhost.v1.HostService/UpdateSettings",
    ],
)
def test_what_must_not_run_twice_is_never_repeated(method) -> None:
    """Inference, changes without a request_id, uploads and questions to a source are made once."""
    assert method not in configured()


@pytest.mark.parametrize("answer", [AWAY, SHUTTING_DOWN], ids=["bare", "shutting down"])
def test_a_read_is_repeated_while_the_daemon_is_away(double: Double, answer) -> None:
    """A read that is answered UNAVAILABLE is made again, unseen by the caller."""
    double.on("GetModel", answer, models_pb2.Model(name="models/a"))
    with Client(double.target) as client:
        assert client.get("a").name == "models/a"
    assert len(double.requests("GetModel")) == 2


def test_a_change_is_repeated_with_its_own_request_id(double: Double) -> None:
    """Both tries of one call carry the same id, another call another one."""
    double.on("CreateModel", AWAY, models_pb2.Model(name="models/a"))
    with Client(double.target) as client:
        client.add("hf://org/a")
        client.add("hf://org/b")
    first, again, other = [r.request_id for r in double.requests("CreateModel")]
    assert first == again != other
    assert len(first) == 36


def test_inference_is_made_once(double: Double) -> None:
    """UNAVAILABLE ends a ModelInfer: its request may be what took the worker down."""
    double.on("ModelInfer", AWAY, open_inference_pb2.ModelInferResponse())
    with Client(double.target) as client, pytest.raises(Unreachable):
        client.infer("a", {})
    assert len(double.requests("ModelInfer")) == 1


@pytest.mark.parametrize("code", ["INTERNAL", "RESOURCE_EXHAUSTED", "ABORTED"])
def test_other_failures_are_not_repeated(double: Double, code) -> None:
    """Only UNAVAILABLE is: a full queue must not be filled by clients that insist."""
    double.on("GetModel", failure(grpc.StatusCode[code], "QUEUE_FULL", retry_delay=0.01))
    with Client(double.target) as client, pytest.raises(ModelhostError):
        client.get("a")
    assert len(double.requests("GetModel")) == 1


def test_a_client_without_retries_makes_one_try(double: Double, client: Client) -> None:
    """What the command line uses fails at once."""
    double.on("DownloadModel", AWAY, operations_pb2.Operation())
    with pytest.raises(Unreachable):
        client.pull("a")
    assert len(double.requests("DownloadModel")) == 1
