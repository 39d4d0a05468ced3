"""The contract: complete, in keeping with core, lint-free, and its stubs current."""

import importlib.util
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from google.protobuf import descriptor_pb2
from google.protobuf.descriptor import Descriptor, MethodDescriptor, ServiceDescriptor

from modelhost.oip import model_config_pb2, open_inference_pb2
from modelhost.v1 import (
    devices_pb2,
    errors_pb2,
    event_service_pb2,
    events_pb2,
    host_service_pb2,
    inference_service_pb2,
    instances_pb2,
    model_service_pb2,
    models_pb2,
    operation_service_pb2,
    operations_pb2,
    options_pb2,
    residency_service_pb2,
)
from modelhostd.core import resources
from modelhostd.core.errors import REASONS, Code

ROOT = Path(__file__).resolve().parent.parent
PROTOS = ROOT / "protos"

METHODS = {
    "InferenceService": "Embed Classify Generate DescribeModel",
    "ModelService": """CreateModel GetModel ListModels UpdateModel DeleteModel DeleteModelFiles InspectSource
        ListModelFiles DownloadModel VerifyModel UploadModelFiles CheckCompatibility ListCatalogModels""",
    "ResidencyService": """LoadModel UnloadModel ReloadModel PlanLoad GetInstance ListInstances
        CheckInstance PinModel UnpinModel AcquireLease RenewLease ReleaseLease ListSlots GetSlot SwitchSlot
        ClearSlot UnblockModel""",
    "OperationService": """GetOperation ListOperations UpdateOperation CancelOperation PauseOperation
        ResumeOperation WaitOperation WatchOperation""",
    "EventService": "WatchEvents ListEvents WatchStatistics",
    "HostService": """GetHost ListDevices GetDevice UpdateDevice GetSettings UpdateSettings GetStatistics
        GetStorage CheckStorage PruneStorage ListQuarantine RestoreQuarantined DeleteQuarantined
        ExportRegistry ImportRegistry""",
}

SERVICES: tuple[ServiceDescriptor, ...] = tuple(
    service
    for module in (
        inference_service_pb2,
        model_service_pb2,
        residency_service_pb2,
        operation_service_pb2,
        event_service_pb2,
        host_service_pb2,
    )
    for service in module.DESCRIPTOR.services_by_name.values()
)
RPCS: tuple[MethodDescriptor, ...] = tuple(m for service in SERVICES for m in service.methods)


def ids(method: MethodDescriptor) -> str:
    return method.name


def load_generator() -> ModuleType:
    """Return protos/generate.py as a module."""
    spec = importlib.util.spec_from_file_location("generate", PROTOS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(*command: str, cwd: Path = PROTOS) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


def nested(message: Descriptor) -> Iterator[Descriptor]:
    """Yield a message and all messages in it."""
    yield message
    for inner in message.nested_types:
        yield from nested(inner)


# --- the methods --------------------------------------------------------------------------------------


def test_every_method_of_the_design_is_there() -> None:
    """The services have exactly the methods that the design lists."""
    found = {s.name: [m.name for m in s.methods] for s in SERVICES}
    assert found == {name: methods.split() for name, methods in METHODS.items()}


@pytest.mark.parametrize("method", RPCS, ids=ids)
def test_every_method_states_its_right(method: MethodDescriptor) -> None:
    """A method has a right, and only those that read are marked to be free of side effects."""
    options = method.GetOptions()
    right = options.Extensions[options_pb2.right]
    assert right != options_pb2.RIGHT_UNSPECIFIED
    pure = options.idempotency_level == descriptor_pb2.MethodOptions.NO_SIDE_EFFECTS
    assert pure == (right == options_pb2.READ)


def test_every_inference_method_states_its_right() -> None:
    """A method of the Open Inference Protocol has its right as the last word of its comment."""
    text = (PROTOS / "modelhost" / "oip" / "open_inference.proto").read_text()
    stated = re.findall(r"((?:  //[^\n]*\n)+)  rpc (\w+)\(", text)
    service = open_inference_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"]
    assert [name for _, name in stated] == [m.name for m in service.methods]
    for comment, name in stated:
        words = " ".join(line.strip(" /") for line in comment.splitlines())
        assert re.search(r"Right: (READ|INFER|MANAGE|OPERATE)\.\Z", words), name


@pytest.mark.parametrize("method", RPCS, ids=ids)
def test_the_model_is_field_1(method: MethodDescriptor) -> None:
    """A request that addresses a model has it in field 1, where a router finds it without parsing."""
    request = method.input_type
    if "model" in request.fields_by_name:
        assert request.fields_by_name["model"].number == 1
    if method.name.endswith("Model") and "model" not in request.fields_by_name:
        first = request.fields_by_number[1]
        assert first.name == "name" or first.message_type is models_pb2.Model.DESCRIPTOR


@pytest.mark.parametrize("method", [m for m in RPCS if m.name.startswith("List")], ids=ids)
def test_lists_have_pages_and_say_their_sequence(method: MethodDescriptor) -> None:
    """A List is paged from the first release and says as of which sequence it is."""
    assert {"page_size", "page_token"} <= set(method.input_type.fields_by_name)
    assert {"next_page_token", "sequence", "store_id"} <= set(method.output_type.fields_by_name)


@pytest.mark.parametrize("method", RPCS, ids=ids)
def test_methods_that_start_work_can_be_repeated(method: MethodDescriptor) -> None:
    """What creates or starts something takes a request id, in its message or its first step."""
    options = method.GetOptions()
    repeatable = options.idempotency_level != descriptor_pb2.MethodOptions.IDEMPOTENCY_UNKNOWN
    guarded = any("request_id" in m.fields_by_name for m in nested(method.input_type))
    etagged = "etag" in method.input_type.fields_by_name or method.name.startswith("Update")
    # Inference starts nothing that lasts; a file that was restored is not there to be restored again.
    lasts = options.Extensions[options_pb2.right] != options_pb2.INFER
    assert repeatable or guarded or etagged or not lasts or method.name == "RestoreQuarantined"


# --- in keeping with core -----------------------------------------------------------------------------


def test_reasons_are_those_of_core() -> None:
    """errors.proto and core.errors hold the same reasons with the same codes and metadata keys."""
    wire = {}
    for value in errors_pb2.Reason.DESCRIPTOR.values:
        if value.number:
            spec = value.GetOptions().Extensions[errors_pb2.error_spec]
            wire[value.name] = (int(spec.code), tuple(spec.keys))
    core = {reason.value: (int(spec.code), spec.keys) for reason, spec in REASONS.items()}
    assert wire == core


def test_codes_are_those_of_core() -> None:
    """Error.Code has gRPC's names and numbers."""
    wire = {v.name: v.number for v in errors_pb2.Error.Code.DESCRIPTOR.values if v.number}
    assert wire == {code.name: code.value for code in Code}


@pytest.mark.parametrize(
    ("wire", "core", "unspecified"),
    [
        (models_pb2.Artifact.State, resources.ArtifactState, set()),
        (instances_pb2.Instance.State, resources.InstanceState, set()),
        (instances_pb2.Instance.Tier, resources.Tier, set()),
        (instances_pb2.Health.Status, resources.Health, set()),
        (operations_pb2.Operation.State, resources.OperationState, set()),
        (operations_pb2.Operation.Kind, resources.OperationKind, set()),
        (operations_pb2.OperationProgress.Phase, resources.Phase, {"NONE"}),
        (devices_pb2.Device.Kind, resources.DeviceKind, set()),
        (models_pb2.ModelConfig.Isolation, resources.Isolation, set()),
        (events_pb2.Resource.Kind, resources.Kind, set()),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_enums_are_those_of_core(wire, core, unspecified: set[str]) -> None:
    """An enum has the same names on the wire as in core, so that mapping is by name."""
    names = {value.name for value in wire.DESCRIPTOR.values if value.number}
    assert names == {member.name for member in core} - unspecified


# --- the stubs ----------------------------------------------------------------------------------------


def test_the_protos_pass_their_checks() -> None:
    """Stubs are current, buf finds nothing, and nothing released is broken."""
    done = run(sys.executable, "check.py")
    assert done.returncode == 0, done.stdout + done.stderr


def test_edited_missing_and_orphaned_stubs_are_found(tmp_path: Path, monkeypatch) -> None:
    """The check names each stub that is not as generated, and writing repairs all of them."""
    generator = load_generator()
    files = generator.generate()
    monkeypatch.setattr(generator, "REPOSITORY", tmp_path)
    generator.write(files)
    assert generator.differences(files) == []

    stubs = tmp_path / "client" / "modelhost" / "v1"
    with (stubs / "models_pb2.py").open("a") as stub:
        stub.write("# edited\n")
    (stubs / "errors_pb2.pyi").unlink()
    (stubs / "old_pb2_grpc.py").write_text("")
    assert generator.differences(files) == [
        "missing:  client/modelhost/v1/errors_pb2.pyi",
        "differs:  client/modelhost/v1/models_pb2.py",
        "orphaned: client/modelhost/v1/old_pb2_grpc.py",
    ]

    generator.write(files)
    assert generator.differences(files) == []


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("operations.proto", "int32 queue_position = 5;", "int64 queue_position = 5;"),
        ("operations.proto", "string principal = 12;", "string caller = 12;"),
        ("errors.proto", "  MODEL_NOT_FOUND = ", "  MODEL_UNKNOWN = "),
        ("event_service.proto", "rpc ListEvents(", "rpc FindEvents("),
    ],
    ids=["type", "field name", "reason", "method"],
)
def test_a_broken_contract_is_found(tmp_path: Path, file: str, old: str, new: str) -> None:
    """What would break a client of the released contract fails the comparison with it."""
    copy = tmp_path / "protos"
    shutil.copytree(PROTOS, copy)
    proto = copy / "modelhost" / "v1" / file
    text = proto.read_text()
    assert text.count(old) == 1
    proto.write_text(text.replace(old, new))
    buf = str(Path(sys.executable).parent / "buf")
    done = run(buf, "breaking", "--against", "released/baseline.binpb", cwd=copy)
    assert done.returncode == 100, done.stdout + done.stderr
    assert file in done.stdout


# --- the Open Inference Protocol ----------------------------------------------------------------------

OIP = "from modelhost.oip import open_inference_pb2, open_inference_pb2_grpc"
TRITON = "import tritonclient.grpc"
EXCHANGE = """
from tritonclient.grpc import service_pb2
ours = open_inference_pb2.ModelConfigResponse()
ours.config.name = "minilm"
ours.config.parameters["device"].string_value = "cpu"
ours.config.input.add(name="text", dims=[-1])
theirs = service_pb2.ModelConfigResponse.FromString(ours.SerializeToString())
assert theirs.config.input[0].dims == [-1] and theirs.config.parameters["device"].string_value == "cpu"
assert open_inference_pb2.ModelConfigResponse.FromString(theirs.SerializeToString()) == ours
"""


@pytest.mark.parametrize(
    "lines", [(OIP, TRITON), (TRITON, OIP)], ids=["ours first", "theirs first"]
)
def test_tritonclient_imports_in_the_same_process(lines: tuple[str, str]) -> None:
    """Our stubs and tritonclient's import in either order and read each other's messages."""
    code = "\n".join(
        [f"import sys; sys.path.insert(0, {str(ROOT / 'client')!r})", *lines, EXCHANGE]
    )
    done = run(sys.executable, "-c", code)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def triton_protos() -> dict[str, descriptor_pb2.FileDescriptorProto]:
    """The two files of the protocol as tritonclient ships them."""
    from tritonclient.grpc import model_config_pb2 as config
    from tritonclient.grpc import service_pb2 as service

    return {"config": file_proto(config), "service": file_proto(service)}


def file_proto(module: ModuleType) -> descriptor_pb2.FileDescriptorProto:
    proto = descriptor_pb2.FileDescriptorProto()
    module.DESCRIPTOR.CopyToProto(proto)
    return proto


def wire_facts(message: descriptor_pb2.DescriptorProto, prefix: str = "") -> dict[str, tuple]:
    """Return what decides the bytes of each field of a message and of those in it, by path."""
    path = f"{prefix}{message.name}"
    facts = {
        f"{path}.{f.name}": (
            f.number,
            f.type,
            f.label,
            f.type_name,
            message.oneof_decl[f.oneof_index].name if f.HasField("oneof_index") else "",
        )
        for f in message.field
    }
    for inner in message.nested_type:
        facts.update(wire_facts(inner, f"{path}."))
    return facts


def test_the_service_is_the_published_one(triton_protos) -> None:
    """Methods, messages and fields of the inference service are exactly those that clients have."""
    ours, theirs = file_proto(open_inference_pb2), triton_protos["service"]
    assert methods_of(ours) == methods_of(theirs)
    assert facts_of(ours) == facts_of(theirs)


def methods_of(proto: descriptor_pb2.FileDescriptorProto) -> list[tuple]:
    return [
        (m.name, m.input_type, m.output_type, m.client_streaming, m.server_streaming)
        for m in proto.service[0].method
    ]


def facts_of(proto: descriptor_pb2.FileDescriptorProto) -> dict[str, tuple]:
    facts: dict[str, tuple] = {}
    for message in proto.message_type:
        facts.update(wire_facts(message))
    return facts


def test_the_configuration_is_a_part_of_the_published_one(triton_protos) -> None:
    """What we send of a model's configuration has the names and numbers that clients have."""
    ours, theirs = file_proto(model_config_pb2), triton_protos["config"]
    assert facts_of(ours).items() <= facts_of(theirs).items()
    enums = {e.name: {(v.name, v.number) for v in e.value} for e in theirs.enum_type}
    for enum in ours.enum_type:
        assert {(v.name, v.number) for v in enum.value} == enums[enum.name]
