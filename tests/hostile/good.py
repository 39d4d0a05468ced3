"""Requests that work on the daemon of ``live.py``: fuzzing begins from them, or it stays at the door."""

from collections.abc import Mapping, Sequence

from google.protobuf.duration_pb2 import Duration
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.message import Message
from google.protobuf.struct_pb2 import Struct
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from modelhost.oip import open_inference_pb2 as oip
from modelhost.v1 import (
    devices_pb2,
    event_service_pb2,
    events_pb2,
    host_service_pb2,
    inference_service_pb2,
    model_service_pb2,
    models_pb2,
    operation_service_pb2,
    operations_pb2,
    residency_service_pb2,
    settings_pb2,
)

M = "models/m"
VICTIM = "models/victim"
"""A model that these requests may take away, as CreateModel brings it back."""


def _options() -> Struct:
    made = Struct()
    made.update({"a": {"b": [1, "x", None]}})
    return made


def _model(name: str = "") -> models_pb2.Model:
    return models_pb2.Model(
        name=name,
        display_name="a name",
        labels={"team": "x"},
        task="other",
        licence="mit",
        source=models_pb2.Source(uri="hf://org/tiny", allow_patterns=["*.safetensors"]),
        config=models_pb2.ModelConfig(
            backend="identity",
            device="devices/sim-0",
            priority=5,
            max_batch_size=8,
            keep_alive=Duration(seconds=60),
            backend_options=_options() if name else None,
        ),
        requirements=models_pb2.Requirements(device_bytes=100, packages=["torch>=2"]),
    )


_FILTER = events_pb2.EventFilter(kinds=[1, 3], names=[M], models=[M], reasons=["CREATED"])

_i = inference_service_pb2
_m, _r, _o, _e, _h = (
    model_service_pb2,
    residency_service_pb2,
    operation_service_pb2,
    event_service_pb2,
    host_service_pb2,
)


def good(operations: Sequence[str]) -> Mapping[str, Sequence[Message]]:
    """Return requests by the type that they are of; ``operations`` are names of some."""
    some = [
        *_of_models(),
        *_of_residency(),
        *_of_inference(),
        *_of_events_and_host(),
        *_of_others(),
        *(of_operation for name in operations for of_operation in _of_operation(name)),
    ]
    found: dict[str, list[Message]] = {}
    for message in some:
        found.setdefault(message.DESCRIPTOR.full_name, []).append(message)
    return found


def _of_models() -> Sequence[Message]:
    uri = models_pb2.Source(uri="hf://org/tiny")
    return [
        _m.CreateModelRequest(model_id="victim", model=_model(), request_id="c-1"),
        _m.CreateModelRequest(model_id="victim", model=models_pb2.Model(source=uri)),
        _m.CreateModelRequest(
            model=models_pb2.Model(source=models_pb2.Source(uri="hf://org/none"))
        ),
        _m.GetModelRequest(name=M),
        _m.ListModelsRequest(page_size=1, task="other", labels={"team": ""}, states=[1]),
        _m.UpdateModelRequest(model=_model(M), update_mask=FieldMask(paths=["config", "labels"])),
        _m.UpdateModelRequest(model=models_pb2.Model(name=M, display_name="x")),
        _m.DeleteModelRequest(name=VICTIM, force=True),
        _m.DeleteModelRequest(name=VICTIM, request_id="d-1"),
        _m.DeleteModelFilesRequest(model=VICTIM, version=1, force=True),
        _m.InspectSourceRequest(source=uri),
        _m.InspectSourceRequest(source=models_pb2.Source(uri="hf://org/bare", revision="main")),
        _m.ListModelFilesRequest(model=M, version=1, page_size=1),
        _m.DownloadModelRequest(name=M, priority=1, request_id="w-1"),
        _m.DownloadModelRequest(name=VICTIM),
        _m.VerifyModelRequest(name=M, version=1),
        _m.CheckCompatibilityRequest(model=M, device="devices/cpu"),
    ]


def _of_residency() -> Sequence[Message]:
    return [
        _r.LoadModelRequest(name=M, device="devices/sim-0", priority=3),
        _r.LoadModelRequest(name=VICTIM, download=True),
        _r.UnloadModelRequest(name=M),
        _r.ReloadModelRequest(name=M, version=1),
        _r.PlanLoadRequest(model=M, device="devices/cpu"),
        _r.PlanLoadRequest(model=VICTIM),
        _r.GetInstanceRequest(name=f"{M}/instances/-"),
        _r.ListInstancesRequest(model=M, device="devices/sim-0", states=[3], page_size=1),
        _r.CheckInstanceRequest(name=f"{M}/instances/-"),
        _r.AcquireLeaseRequest(model=M, time_to_live=Duration(seconds=60), request_id="l-1"),
        _r.RenewLeaseRequest(name="leases/l", time_to_live=Duration(seconds=60)),
        _r.ReleaseLeaseRequest(name="leases/l"),
        _r.SwitchSlotRequest(slot="slots/s", model=M, unload_previous=True, request_id="s-1"),
        _r.SwitchSlotRequest(slot="slots/s", model=VICTIM),
        _r.ListSlotsRequest(model=M, page_size=1),
        _r.GetSlotRequest(name="slots/s"),
        _r.ClearSlotRequest(name="slots/s"),
        _r.PinModelRequest(name=M),
        _r.UnpinModelRequest(name=M),
        _r.UnblockModelRequest(name=M),
    ]


def _of_inference() -> Sequence[Message]:
    sampling = _i.SamplingParameters(max_tokens=4, temperature=0.5, seed=1, stop=["x"])
    return [
        _i.EmbedRequest(model=M, texts=["a", "b"]),
        _i.ClassifyRequest(model=M, texts=["a"], top_k=2),
        _i.GenerateRequest(model=M, prompt="a", sampling=sampling),
        _i.DescribeModelRequest(model=M),
        _i.GenerateRequest(model=M, messages=[_i.ChatMessage(role="user", content="a")]),
    ]


def _of_operation(name: str) -> Sequence[Message]:
    return [
        _o.GetOperationRequest(name=name),
        _o.UpdateOperationRequest(operation=operations_pb2.Operation(name=name, priority=4)),
        _o.CancelOperationRequest(name=name),
        _o.PauseOperationRequest(name=name),
        _o.ResumeOperationRequest(name=name),
        _o.WaitOperationRequest(name=name, timeout=Duration(nanos=1000)),
        _o.WatchOperationRequest(name=name),
    ]


def _of_events_and_host() -> Sequence[Message]:
    return [
        _o.ListOperationsRequest(model=M, kinds=[1], states=[4], page_size=1),
        _e.WatchEventsRequest(include_snapshot=True, filter=_FILTER, include_progress=True),
        _e.WatchEventsRequest(start_sequence=1),
        _e.ListEventsRequest(start_sequence=1, end_sequence=9, filter=_FILTER, page_size=2),
        _e.WatchStatisticsRequest(interval=Duration(seconds=1), models=[M]),
        _h.ListDevicesRequest(page_size=1),
        _h.GetDeviceRequest(name="devices/sim-0"),
        _h.UpdateDeviceRequest(device=devices_pb2.Device(name="devices/sim-0", budget_bytes=9999)),
        _h.UpdateSettingsRequest(settings=settings_pb2.Settings(max_concurrent_loads=2)),
        _h.UpdateSettingsRequest(
            settings=settings_pb2.Settings(keep_alive=Duration(seconds=600)),
            update_mask=FieldMask(paths=["keep_alive", "queue_limit"]),
        ),
        _h.GetStatisticsRequest(models=[M]),
        _h.CheckStorageRequest(deep=True, repair=True),
    ]


def _of_others() -> Sequence[Message]:
    return [
        oip.ModelReadyRequest(name="m", version="1"),
        oip.ModelMetadataRequest(name="m"),
        oip.ModelConfigRequest(name="m"),
        oip.ModelStatisticsRequest(name="m"),
        oip.RepositoryIndexRequest(ready=True),
        oip.RepositoryModelLoadRequest(model_name="m"),
        oip.RepositoryModelUnloadRequest(model_name="m"),
        health_pb2.HealthCheckRequest(service="model/m"),
        reflection_pb2.ServerReflectionRequest(list_services=""),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol="modelhost.v1.Model"),
        reflection_pb2.ServerReflectionRequest(
            file_containing_extension=reflection_pb2.ExtensionRequest(
                containing_type="google.protobuf.MethodOptions", extension_number=57411
            )
        ),
        reflection_pb2.ServerReflectionRequest(
            all_extension_numbers_of_type="inference.ModelConfig"
        ),
    ]
