"""Wrong requests to every service but ModelService."""

import uuid
from typing import Any

from google.protobuf.duration_pb2 import Duration
from google.protobuf.field_mask_pb2 import FieldMask
from grpc_health.v1 import health_pb2

from modelhost.oip import open_inference_pb2 as oip
from modelhost.v1 import (
    devices_pb2,
    event_service_pb2,
    events_pb2,
    host_service_pb2,
    inference_service_pb2,
    instances_pb2,
    operation_service_pb2,
    operations_pb2,
    residency_service_pb2,
    settings_pb2,
)
from modelhostd.api.unimplemented import UNIMPLEMENTED_METHODS
from tests.api.bad_input import Bad
from tests.api.bad_models import MODEL

_i = inference_service_pb2
UNKNOWN_OPERATION = f"operations/{uuid.UUID(int=7)}"


def _settings(**fields: Any) -> Any:
    return host_service_pb2.UpdateSettingsRequest(settings=settings_pb2.Settings(**fields))


NOT_OFFERED = sorted(name.rpartition("/")[2] for name in UNIMPLEMENTED_METHODS)

_ROWS = [
    # --- what is not there
    Bad("load unknown", "LoadModel",
        residency_service_pb2.LoadModelRequest(name="models/no", download=True),
        "MODEL_NOT_FOUND", ("'no'",)),
    Bad("load on unknown device", "LoadModel",
        residency_service_pb2.LoadModelRequest(name=MODEL, device="devices/tpu", download=True),
        "DEVICE_NOT_FOUND", ("'tpu'", "sim-0")),
    Bad("load absent files", "LoadModel",
        residency_service_pb2.LoadModelRequest(name=MODEL), "MODEL_NOT_DOWNLOADED",
        ("DownloadModel",), {"model": "minilm", "state": "ABSENT"}),
    Bad("unknown instance", "GetInstance",
        residency_service_pb2.GetInstanceRequest(name=f"{MODEL}/instances/9"),
        "INSTANCE_NOT_FOUND", ("ListInstances",)),
    Bad("malformed instance", "GetInstance",
        residency_service_pb2.GetInstanceRequest(name=f"{MODEL}/instances/../x"),
        "INVALID_ARGUMENT", ("models/{model}/instances/{instance}",)),
    Bad("malformed only instance", "CheckInstance",
        residency_service_pb2.CheckInstanceRequest(name="models/../instances/-"),
        "INVALID_ARGUMENT", ("name",)),
    Bad("unknown operation", "GetOperation",
        operation_service_pb2.GetOperationRequest(name=UNKNOWN_OPERATION), "OPERATION_NOT_FOUND",
        (UNKNOWN_OPERATION.removeprefix("operations/"),)),
    Bad("wait for unknown", "WaitOperation",
        operation_service_pb2.WaitOperationRequest(name=UNKNOWN_OPERATION), "OPERATION_NOT_FOUND",
        ("not known",)),
    Bad("cancel unknown", "CancelOperation",
        operation_service_pb2.CancelOperationRequest(name=UNKNOWN_OPERATION),
        "OPERATION_NOT_FOUND", ("not known",)),
    Bad("unknown device", "GetDevice",
        host_service_pb2.GetDeviceRequest(name="devices/cuda-7"), "DEVICE_NOT_FOUND", ("sim-0",)),
    # --- fields out of range
    Bad("load priority", "LoadModel",
        residency_service_pb2.LoadModelRequest(name=MODEL, priority=-500), "INVALID_ARGUMENT",
        ("-100 to 100",)),
    Bad("negative wait", "WaitOperation",
        operation_service_pb2.WaitOperationRequest(
            name=UNKNOWN_OPERATION, timeout=Duration(seconds=-1)), "INVALID_ARGUMENT",
        ("0 s or more",)),
    Bad("budget", "UpdateDevice", host_service_pb2.UpdateDeviceRequest(
        device=devices_pb2.Device(name="devices/sim-0", budget_bytes=1 << 60)),
        "INVALID_ARGUMENT", ("1 to 10000",)),
    Bad("negative budget", "UpdateDevice", host_service_pb2.UpdateDeviceRequest(
        device=devices_pb2.Device(name="devices/sim-0", budget_bytes=-1),
        update_mask=FieldMask(paths=["budget_bytes"])), "INVALID_ARGUMENT", ("1 to 10000",)),
    Bad("budget of nothing", "UpdateDevice", host_service_pb2.UpdateDeviceRequest(
        device=devices_pb2.Device(name="devices/sim-0", budget_bytes=0)),
        "INVALID_ARGUMENT", ("device.budget_bytes", "no value in the mask")),
    Bad("loads", "UpdateSettings", _settings(max_concurrent_loads=1000),
        "INVALID_ARGUMENT", ("max_concurrent_loads",)),
    Bad("policy", "UpdateSettings", _settings(eviction_policy="random"),
        "INVALID_ARGUMENT", ("lru",)),
    Bad("log level", "UpdateSettings", _settings(log_level="loud"), "INVALID_ARGUMENT",
        ("warning",)),
    Bad("statistics", "GetStatistics",
        host_service_pb2.GetStatisticsRequest(models=["models/a"] * 101), "INVALID_ARGUMENT",
        ("at most 100",)),
    # --- masks, etags, pages, enums
    Bad("mask of settings", "UpdateSettings", host_service_pb2.UpdateSettingsRequest(
        update_mask=FieldMask(paths=["no"])), "INVALID_ARGUMENT", ("queue_limit",)),
    Bad("stale settings", "UpdateSettings", _settings(queue_limit=5, etag="99"),
        "ETAG_MISMATCH", ("settings",)),
    Bad("long token", "ListOperations",
        operation_service_pb2.ListOperationsRequest(page_token="A" * 5000), "INVALID_ARGUMENT",
        ("page_token",)),
    Bad("unspecified state", "ListInstances",
        residency_service_pb2.ListInstancesRequest(
            states=[instances_pb2.Instance.STATE_UNSPECIFIED]), "INVALID_ARGUMENT", ("states",)),
    Bad("kind", "ListOperations",
        operation_service_pb2.ListOperationsRequest(kinds=[77]), "INVALID_ARGUMENT", ("kinds",)),
    Bad("priority of unknown", "UpdateOperation",
        operation_service_pb2.UpdateOperationRequest(
            operation=operations_pb2.Operation(name=UNKNOWN_OPERATION, priority=1)),
        "OPERATION_NOT_FOUND", ("not known",)),
    # --- residency: what is left of it
    Bad("unload unknown", "UnloadModel", residency_service_pb2.UnloadModelRequest(name="models/no"),
        "MODEL_NOT_FOUND", ("'no'",)),
    Bad("reload negative version", "ReloadModel",
        residency_service_pb2.ReloadModelRequest(name=MODEL, version=-1), "INVALID_ARGUMENT",
        ("version",)),
    Bad("lease of unknown", "AcquireLease",
        residency_service_pb2.AcquireLeaseRequest(model="models/no"), "MODEL_NOT_FOUND", ("'no'",)),
    Bad("renew malformed", "RenewLease",
        residency_service_pb2.RenewLeaseRequest(name="leases/../x"), "INVALID_ARGUMENT",
        ("leases/{id}",)),
    Bad("release malformed", "ReleaseLease",
        residency_service_pb2.ReleaseLeaseRequest(name="minilm"), "INVALID_ARGUMENT",
        ("leases/{id}",)),
    Bad("plan on unknown device", "PlanLoad",
        residency_service_pb2.PlanLoadRequest(model=MODEL, device="devices/tpu"),
        "DEVICE_NOT_FOUND", ("'tpu'",)),
    *(
        Bad(f"{method} malformed", method, request(name="minilm"), "INVALID_ARGUMENT",
            ("models/{id}",), {"field": "name"})
        for method, request in (
            ("PinModel", residency_service_pb2.PinModelRequest),
            ("UnpinModel", residency_service_pb2.UnpinModelRequest),
            ("UnblockModel", residency_service_pb2.UnblockModelRequest),
        )
    ),
    *(
        Bad(f"{method} unknown", method, request(name=UNKNOWN_OPERATION), "OPERATION_NOT_FOUND",
            ("not known",))
        for method, request in (
            ("PauseOperation", operation_service_pb2.PauseOperationRequest),
            ("ResumeOperation", operation_service_pb2.ResumeOperationRequest),
            ("WatchOperation", operation_service_pb2.WatchOperationRequest),
        )
    ),
    # --- events
    Bad("watch from the future", "WatchEvents",
        event_service_pb2.WatchEventsRequest(start_sequence=10**9), "SEQUENCE_IN_FUTURE",
        ("1000000000", "store_id")),
    Bad("watch from before", "WatchEvents",
        event_service_pb2.WatchEventsRequest(start_sequence=-1), "INVALID_ARGUMENT",
        ("start_sequence",)),
    Bad("watch and snapshot", "WatchEvents",
        event_service_pb2.WatchEventsRequest(start_sequence=1, include_snapshot=True),
        "INVALID_ARGUMENT", ("include_snapshot",)),
    Bad("watch a kind", "WatchEvents", event_service_pb2.WatchEventsRequest(
        filter=events_pb2.EventFilter(kinds=[99])), "INVALID_ARGUMENT", ("filter.kinds[0]",)),
    Bad("watch a name", "WatchEvents", event_service_pb2.WatchEventsRequest(
        filter=events_pb2.EventFilter(names=["nothing/x"])), "INVALID_ARGUMENT",
        ("filter.names[0]",)),
    Bad("list negative", "ListEvents", event_service_pb2.ListEventsRequest(end_sequence=-1),
        "INVALID_ARGUMENT", ("end_sequence",)),
    Bad("list by a foreign token", "ListEvents",
        event_service_pb2.ListEventsRequest(page_token="AAAA"), "INVALID_ARGUMENT",
        ("next_page_token",)),
    Bad("statistics too often", "WatchStatistics",
        event_service_pb2.WatchStatisticsRequest(interval=Duration(nanos=1)), "INVALID_ARGUMENT",
        ("0.25 s to 60 s",)),
    Bad("statistics of unknown", "WatchStatistics",
        event_service_pb2.WatchStatisticsRequest(models=["models/no"]), "MODEL_NOT_FOUND",
        ("'no'",)),
    # --- the host: what is left of it
    Bad("devices by size", "ListDevices", host_service_pb2.ListDevicesRequest(page_size=-1),
        "INVALID_ARGUMENT", ("page_size",)),
    Bad("check by request id", "CheckStorage",
        host_service_pb2.CheckStorageRequest(request_id=" "), "INVALID_ARGUMENT", ("request_id",)),
    Bad("import nothing", "ImportRegistry", host_service_pb2.ImportRegistryRequest(),
        "INVALID_ARGUMENT", ("ExportRegistry",), {"field": "chunk"}),
    Bad("import another thing", "ImportRegistry",
        host_service_pb2.ImportRegistryRequest(chunk=b'{"format":"zip","version":1,"models":[]}'),
        "INVALID_ARGUMENT", ("format",)),
    Bad("import deep", "ImportRegistry",
        host_service_pb2.ImportRegistryRequest(chunk=b"[" * 100_000), "INVALID_ARGUMENT",
        ("JSON",)),
    Bad("import a conflict", "ImportRegistry",
        host_service_pb2.ImportRegistryRequest(chunk=b"{}", conflict=99),
        "INVALID_ARGUMENT", ("conflict",)),
    # --- slots
    Bad("switch to unknown", "SwitchSlot",
        residency_service_pb2.SwitchSlotRequest(slot="slots/s", model="models/no"),
        "MODEL_NOT_FOUND", ("'no'",)),
    Bad("switch a model's id", "SwitchSlot",
        residency_service_pb2.SwitchSlotRequest(slot="slots/minilm", model=MODEL),
        "ALREADY_EXISTS", ("another id for the slot",)),
    Bad("switch what has changed", "SwitchSlot",
        residency_service_pb2.SwitchSlotRequest(slot="slots/s", model=MODEL, etag="7"),
        "ETAG_MISMATCH", ("slots/s",)),
    Bad("switch without files", "SwitchSlot",
        residency_service_pb2.SwitchSlotRequest(slot="slots/s", model=MODEL),
        "MODEL_NOT_DOWNLOADED", ("DownloadModel",)),
    Bad("slot by path", "GetSlot", residency_service_pb2.GetSlotRequest(name="slots/../x"),
        "INVALID_ARGUMENT", ("slots/{id}",)),
    Bad("unknown slot", "ClearSlot", residency_service_pb2.ClearSlotRequest(name="slots/no"),
        "SLOT_NOT_FOUND", ("ListSlots",), {"slot": "no"}),
    Bad("slots of unknown", "ListSlots",
        residency_service_pb2.ListSlotsRequest(model="models/no"), "MODEL_NOT_FOUND", ("'no'",)),
    # --- leases
    Bad("lease unknown", "AcquireLease",
        residency_service_pb2.AcquireLeaseRequest(model="models/no"), "MODEL_NOT_FOUND", ("'no'",)),
    Bad("lease for ever", "AcquireLease",
        residency_service_pb2.AcquireLeaseRequest(
            model=MODEL, time_to_live=Duration(seconds=86_401)),
        "INVALID_ARGUMENT", ("time_to_live", "86400 s")),
    Bad("renew unknown", "RenewLease", residency_service_pb2.RenewLeaseRequest(name="leases/no"),
        "LEASE_NOT_FOUND", ("acquire a new one",), {"lease": "no"}),
    Bad("release by path", "ReleaseLease",
        residency_service_pb2.ReleaseLeaseRequest(name="leases/../x"), "INVALID_ARGUMENT",
        ("leases/{id}",)),
    # --- what is not offered yet: whatever is asked of it
    *(
        Bad(f"{method} not offered", method, b"", "UNIMPLEMENTED", (method, "README"))
        for method in NOT_OFFERED
    ),
    # --- storage
    Bad("prune by an odd id", "PruneStorage",
        host_service_pb2.PruneStorageRequest(request_id="no spaces"), "INVALID_ARGUMENT",
        ("request_id",)),
    Bad("quarantine of unknown", "ListQuarantine",
        host_service_pb2.ListQuarantineRequest(model="models/no"), "MODEL_NOT_FOUND", ("'no'",)),
    Bad("restore what is not there", "RestoreQuarantined",
        host_service_pb2.RestoreQuarantinedRequest(name="quarantine/1-0123456789ab"),
        "INVALID_ARGUMENT", ("ListQuarantine",)),
    Bad("delete by path", "DeleteQuarantined",
        host_service_pb2.DeleteQuarantinedRequest(name="quarantine/../blobs"),
        "INVALID_ARGUMENT", ("quarantine/{id}",)),
    # --- inference by task; the model is one of feature-extraction
    Bad("embed nothing", "Embed", _i.EmbedRequest(model=MODEL), "INVALID_ARGUMENT", ("texts", "1024"),
        {"field": "texts", "actual": "0"}),
    Bad("embed too much", "Embed", _i.EmbedRequest(model=MODEL, texts=["x"] * 1025),
        "INVALID_ARGUMENT", ("texts", "1024", "1025")),
    Bad("embed by a bare id", "Embed", _i.EmbedRequest(model="minilm", texts=["x"]),
        "INVALID_ARGUMENT", ("models/{id}",), {"field": "model"}),
    Bad("embed by unknown", "Embed", _i.EmbedRequest(model="models/no", texts=["x"]),
        "MODEL_NOT_FOUND", ("unknown model: 'no'",)),
    Bad("classify by unknown", "Classify", _i.ClassifyRequest(model="models/no", texts=["x"]),
        "MODEL_NOT_FOUND", ("unknown model: 'no'",)),
    Bad("generate by unknown", "Generate", _i.GenerateRequest(model="models/no", prompt="x"),
        "MODEL_NOT_FOUND", ("unknown model: 'no'",)),
    Bad("describe unknown", "DescribeModel", _i.DescribeModelRequest(model="models/no"),
        "MODEL_NOT_FOUND", ("unknown model: 'no'",)),
    # --- inference
    *(
        Bad(f"{method} of unknown", method, request(name="no"), "MODEL_NOT_FOUND",
            ("unknown model: 'no'",), {"model": "no"})
        for method, request in (
            ("ModelReady", oip.ModelReadyRequest),
            ("ModelMetadata", oip.ModelMetadataRequest),
            ("ModelConfig", oip.ModelConfigRequest),
            ("ModelStatistics", oip.ModelStatisticsRequest),
        )
    ),
    Bad("ready by path", "ModelReady", oip.ModelReadyRequest(name="../x"), "MODEL_NOT_FOUND",
        ("'../x'",)),
    Bad("infer unknown", "ModelInfer", oip.ModelInferRequest(model_name="no"), "MODEL_NOT_FOUND",
        ("unknown model: 'no'",)),
    Bad("infer nothing", "ModelInfer", b"", "MODEL_NOT_FOUND", ("unknown model",)),
    Bad("infer by groups", "ModelInfer", b"\x0b\x0c" * 100, "INVALID_ARGUMENT", ("wire type",),
        {"field": "request"}),
    Bad("infer a not downloaded model", "ModelInfer", oip.ModelInferRequest(model_name="minilm"),
        "MODEL_NOT_DOWNLOADED", ("minilm",)),
    Bad("index of a repository", "RepositoryIndex", oip.RepositoryIndexRequest(repository_name="r"),
        "INVALID_ARGUMENT", ("repository_name",)),
    Bad("repository load unknown", "RepositoryModelLoad",
        oip.RepositoryModelLoadRequest(model_name="no"), "MODEL_NOT_FOUND",
        ("failed to load 'no'", "modelhost pull")),
    Bad("repository load with files", "RepositoryModelLoad", oip.RepositoryModelLoadRequest(
        model_name="minilm", parameters={"file:1/m": oip.ModelRepositoryParameter()}),
        "PERMISSION_DENIED", ("file",)),
    Bad("repository unload with something", "RepositoryModelUnload",
        oip.RepositoryModelUnloadRequest(
            model_name="minilm", parameters={"x": oip.ModelRepositoryParameter()}),
        "INVALID_ARGUMENT", ("'x'",)),
    *(
        Bad(f"{method} not offered", method, b"", "UNIMPLEMENTED", (method, says))
        for method, says in (
            ("SystemSharedMemoryRegister", "raw_input_contents"),
            ("CudaSharedMemoryRegister", "raw_input_contents"),
        )
    ),
    *(
        Bad(f"{method} of something", method, request(name="mine"), "REGION_NOT_FOUND", ("'mine'",))
        for method, request in (
            ("SystemSharedMemoryStatus", oip.SystemSharedMemoryStatusRequest),
            ("CudaSharedMemoryStatus", oip.CudaSharedMemoryStatusRequest),
        )
    ),
    Bad("trace settings set", "TraceSetting", oip.TraceSettingRequest(
        settings={"trace_file": oip.TraceSettingRequest.SettingValue(value=["x"])}),
        "UNIMPLEMENTED", ("TraceSetting", "traces")),
    Bad("trace settings of nobody", "TraceSetting", oip.TraceSettingRequest(model_name="no"),
        "MODEL_NOT_FOUND", ("'no'",)),
    Bad("log settings set", "LogSettings", oip.LogSettingsRequest(
        settings={"log_file": oip.LogSettingsRequest.SettingValue(string_param="x")}),
        "UNIMPLEMENTED", ("LogSettings", "UpdateSettings")),
    Bad("repository load with a wrong config", "RepositoryModelLoad", oip.RepositoryModelLoadRequest(
        model_name="minilm",
        parameters={"config": oip.ModelRepositoryParameter(string_param='{"no": 1}')}),
        "INVALID_ARGUMENT", ("parameters[config].no", "max_batch_size")),
    Bad("health of nothing", "Check", health_pb2.HealthCheckRequest(service="no"),
        "MODEL_NOT_FOUND", ("model/<id>",)),
]  # fmt: skip

CASES = [bad for bad in _ROWS if bad.reason == "UNIMPLEMENTED" or bad.method not in NOT_OFFERED]
