"""What bad input gets: code, reason and next step, before any side effect, and a daemon that goes on."""

import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.field_mask_pb2 import FieldMask

from modelhost.v1 import (
    devices_pb2,
    host_service_pb2,
    instances_pb2,
    model_service_pb2,
    models_pb2,
    operation_service_pb2,
    operations_pb2,
    residency_service_pb2,
    settings_pb2,
)
from tests.api.support import CALL_S, Served, failure, served

MODEL = "models/minilm"
UNKNOWN_OPERATION = f"operations/{uuid.UUID(int=7)}"


@dataclass
class Bad:
    """One wrong request: what is called, and what comes back."""

    id: str
    method: Callable[[Served], Callable[..., Any]]
    request: Any
    reason: str
    says: tuple[str, ...]
    metadata: dict[str, str] = field(default_factory=dict)


def _models(name: str) -> Callable[[Served], Callable[..., Any]]:
    return lambda it: getattr(it.admin.models, name)


def _residency(name: str) -> Callable[[Served], Callable[..., Any]]:
    return lambda it: getattr(it.admin.residency, name)


def _operations(name: str) -> Callable[[Served], Callable[..., Any]]:
    return lambda it: getattr(it.admin.operations, name)


def _hosts(name: str) -> Callable[[Served], Callable[..., Any]]:
    return lambda it: getattr(it.admin.host, name)


def _create(model_id: str = "new", uri: str = "hf://org/new", **fields: Any) -> Any:
    request = model_service_pb2.CreateModelRequest(model_id=model_id)
    request.model.CopyFrom(models_pb2.Model(**fields))
    request.model.source.uri = uri
    return request


def _config(**fields: Any) -> Any:
    return _create(config=models_pb2.ModelConfig(**fields))


def _update(*paths: str, **fields: Any) -> Any:
    return model_service_pb2.UpdateModelRequest(
        model=models_pb2.Model(name=MODEL, **fields), update_mask=FieldMask(paths=paths)
    )


def _nested(depth: int) -> Any:
    request = _create()
    struct = request.model.config.backend_options
    for _ in range(depth):
        struct.update({"a": {}})
        struct = struct.fields["a"].struct_value
    return request


def _settings(**fields: Any) -> Any:
    return host_service_pb2.UpdateSettingsRequest(settings=settings_pb2.Settings(**fields))


BAD_IDS = {
    "traversal": "../x",
    "dot": "..",
    "nul": "a\0b",
    "long": "a" * 300,
    "upper": "MiniLM",
    "cyrillic": "m\u0456nilm",
    "fullwidth": "\uff4dinilm",
    "slash": "a/b",
    "space": "a b",
    "newline": "minilm\n",
    "rtl": "\u202eminilm",
    "percent": "%2e%2e",
    "dash": "-a",
    "trailing": "a.",
}
NAMES = {
    "empty": "",
    "bare": "minilm",
    "collection": "models/",
    "other": "devices/minilm",
    **{name: f"models/{key}" for name, key in BAD_IDS.items()},
}

CASES = [
    *(
        Bad(f"create id {n}", _models("CreateModel"), _create(key), "INVALID_ARGUMENT",
            ("model_id", "1 to 64"), {"field": "model_id"})
        for n, key in BAD_IDS.items()
    ),
    *(
        Bad(f"get name {n}", _models("GetModel"), model_service_pb2.GetModelRequest(name=key),
            "INVALID_ARGUMENT", ("name", "models/{id}"), {"field": "name"})
        for n, key in NAMES.items()
    ),
    # --- what is not there
    Bad("unknown model", _models("GetModel"), model_service_pb2.GetModelRequest(name="models/no"),
        "MODEL_NOT_FOUND", ("'no'", "modelhost ls"), {"model": "no"}),
    Bad("update unknown", _models("UpdateModel"), model_service_pb2.UpdateModelRequest(
        model=models_pb2.Model(name="models/no")), "MODEL_NOT_FOUND", ("modelhost pull",)),
    Bad("delete unknown", _models("DeleteModel"),
        model_service_pb2.DeleteModelRequest(name="models/no"), "MODEL_NOT_FOUND", ("'no'",)),
    Bad("download unknown", _models("DownloadModel"),
        model_service_pb2.DownloadModelRequest(name="models/no"), "MODEL_NOT_FOUND", ("'no'",)),
    Bad("load unknown", _residency("LoadModel"),
        residency_service_pb2.LoadModelRequest(name="models/no", download=True),
        "MODEL_NOT_FOUND", ("'no'",)),
    Bad("load on unknown device", _residency("LoadModel"),
        residency_service_pb2.LoadModelRequest(name=MODEL, device="devices/tpu", download=True),
        "DEVICE_NOT_FOUND", ("'tpu'", "sim-0")),
    Bad("load absent files", _residency("LoadModel"),
        residency_service_pb2.LoadModelRequest(name=MODEL), "MODEL_NOT_DOWNLOADED",
        ("DownloadModel",), {"model": "minilm", "state": "ABSENT"}),
    Bad("list files of absent", _models("ListModelFiles"),
        model_service_pb2.ListModelFilesRequest(model=MODEL), "MODEL_NOT_DOWNLOADED", ("pull",)),
    Bad("verify absent", _models("VerifyModel"),
        model_service_pb2.VerifyModelRequest(name=MODEL), "MODEL_NOT_DOWNLOADED", ("pull",)),
    Bad("unknown instance", _residency("GetInstance"),
        residency_service_pb2.GetInstanceRequest(name=f"{MODEL}/instances/9"),
        "INSTANCE_NOT_FOUND", ("ListInstances",)),
    Bad("malformed instance", _residency("GetInstance"),
        residency_service_pb2.GetInstanceRequest(name=f"{MODEL}/instances/../x"),
        "INVALID_ARGUMENT", ("models/{model}/instances/{instance}",)),
    Bad("malformed only instance", _residency("CheckInstance"),
        residency_service_pb2.CheckInstanceRequest(name="models/../instances/-"),
        "INVALID_ARGUMENT", ("name",)),
    Bad("unknown operation", _operations("GetOperation"),
        operation_service_pb2.GetOperationRequest(name=UNKNOWN_OPERATION), "OPERATION_NOT_FOUND",
        (UNKNOWN_OPERATION.removeprefix("operations/"),)),
    Bad("wait for unknown", _operations("WaitOperation"),
        operation_service_pb2.WaitOperationRequest(name=UNKNOWN_OPERATION), "OPERATION_NOT_FOUND",
        ("not known",)),
    Bad("cancel unknown", _operations("CancelOperation"),
        operation_service_pb2.CancelOperationRequest(name=UNKNOWN_OPERATION),
        "OPERATION_NOT_FOUND", ("not known",)),
    Bad("unknown device", _hosts("GetDevice"),
        host_service_pb2.GetDeviceRequest(name="devices/cuda-7"), "DEVICE_NOT_FOUND", ("sim-0",)),
    # --- sources
    *(
        Bad(f"source {n}", _models("CreateModel"), _create(uri=uri), "INVALID_ARGUMENT", (says,))
        for n, uri, says in (
            ("none", "", "source"),
            ("scheme", "ftp://host/x", "hf"),
            ("http", "http://host/x", "https"),
            ("bare", "org/name", "hf://"),
            ("nul", "hf://org/na\0me", "printable"),
            ("long", "hf://org/" + "a" * 2000, "1024 characters"),
            ("traversal", "hf://org/..", "source.uri"),
            ("query", "hf://org/name?x=1", "query"),
            ("revision", "hf://org/name@a..b", "branch, tag or commit"),
        )
    ),
    Bad("inspect scheme", _models("InspectSource"), model_service_pb2.InspectSourceRequest(
        source=models_pb2.Source(uri="ftp://x/y")), "INVALID_ARGUMENT", ("hf",)),
    Bad("inspect missing", _models("InspectSource"), model_service_pb2.InspectSourceRequest(
        source=models_pb2.Source(uri="hf://org/absent")), "SOURCE_NOT_FOUND", ("absent",),
        {"source": "hf://org/absent", "missing": "repository"}),
    Bad("inspect missing revision", _models("InspectSource"),
        model_service_pb2.InspectSourceRequest(
            source=models_pb2.Source(uri="hf://org/minilm", revision="v9")),
        "SOURCE_NOT_FOUND", ("revision",)),
    Bad("same id twice", _models("CreateModel"), _create("minilm"), "ALREADY_EXISTS",
        ("--name",), {"name": MODEL}),
    # --- fields out of range
    Bad("batch size", _models("CreateModel"), _config(max_batch_size=0), "INVALID_ARGUMENT",
        ("max_batch_size", "1 to 65536")),
    Bad("priority", _models("CreateModel"), _config(priority=101), "INVALID_ARGUMENT",
        ("-100 to 100",)),
    Bad("keep alive", _models("CreateModel"), _config(keep_alive=Duration(seconds=10**10)),
        "INVALID_ARGUMENT", ("keep_alive",)),
    Bad("no duration", _models("CreateModel"),
        _config(keep_alive=Duration(seconds=1, nanos=-5)), "INVALID_ARGUMENT", ("a Duration",)),
    Bad("precision", _models("CreateModel"), _config(precision="fp8"), "INVALID_ARGUMENT",
        ("fp16",)),
    Bad("config device", _models("CreateModel"), _config(device="devices/tpu"),
        "INVALID_ARGUMENT", ("model.config.device", "sim-0")),
    Bad("config device name", _models("CreateModel"), _config(device="tpu"), "INVALID_ARGUMENT",
        ("devices/{id}",)),
    Bad("isolation", _models("CreateModel"), _config(isolation=9), "INVALID_ARGUMENT",
        ("model.config.isolation",)),
    Bad("options depth", _models("CreateModel"), _nested(6), "INVALID_ARGUMENT", ("4 levels",)),
    Bad("options deeper", _models("CreateModel"), _nested(30), "INVALID_ARGUMENT", ("levels",)),
    Bad("text", _models("CreateModel"), _create(description="x" * 5000), "INVALID_ARGUMENT",
        ("4096 characters",)),
    Bad("nul in text", _models("CreateModel"), _create(display_name="a\0b"), "INVALID_ARGUMENT",
        ("NUL",)),
    Bad("labels", _models("CreateModel"), _create(labels={str(n): "" for n in range(65)}),
        "INVALID_ARGUMENT", ("64 labels",)),
    Bad("empty label", _models("CreateModel"), _create(labels={"": "x"}), "INVALID_ARGUMENT",
        ("labels",)),
    Bad("base model", _models("CreateModel"), _create(base_model="minilm"), "INVALID_ARGUMENT",
        ("models/{id}",)),
    Bad("requirement bytes", _models("CreateModel"),
        _create(requirements=models_pb2.Requirements(device_bytes=-1)), "INVALID_ARGUMENT",
        ("device_bytes",)),
    Bad("requirement capability", _models("CreateModel"),
        _create(requirements=models_pb2.Requirements(compute_capability="new")),
        "INVALID_ARGUMENT", ("8.0",)),
    Bad("download priority", _models("DownloadModel"),
        model_service_pb2.DownloadModelRequest(name=MODEL, priority=500), "INVALID_ARGUMENT",
        ("-100 to 100",)),
    Bad("load priority", _residency("LoadModel"),
        residency_service_pb2.LoadModelRequest(name=MODEL, priority=-500), "INVALID_ARGUMENT",
        ("-100 to 100",)),
    Bad("download rate", _models("DownloadModel"),
        model_service_pb2.DownloadModelRequest(name=MODEL, rate_limit_bytes_per_second=5),
        "UNIMPLEMENTED", ("rate_limit_bytes_per_second", "README")),
    Bad("negative version", _models("ListModelFiles"),
        model_service_pb2.ListModelFilesRequest(model=MODEL, version=-1), "INVALID_ARGUMENT",
        ("version",)),
    Bad("negative wait", _operations("WaitOperation"),
        operation_service_pb2.WaitOperationRequest(
            name=UNKNOWN_OPERATION, timeout=Duration(seconds=-1)), "INVALID_ARGUMENT",
        ("0 s or more",)),
    Bad("request id", _models("DownloadModel"),
        model_service_pb2.DownloadModelRequest(name=MODEL, request_id="a\nb"),
        "INVALID_ARGUMENT", ("request_id", "UUID")),
    Bad("budget", _hosts("UpdateDevice"), host_service_pb2.UpdateDeviceRequest(
        device=devices_pb2.Device(name="devices/sim-0", budget_bytes=1 << 60)),
        "INVALID_ARGUMENT", ("1 to 10000",)),
    Bad("negative budget", _hosts("UpdateDevice"), host_service_pb2.UpdateDeviceRequest(
        device=devices_pb2.Device(name="devices/sim-0", budget_bytes=-1),
        update_mask=FieldMask(paths=["budget_bytes"])), "INVALID_ARGUMENT", ("1 to 10000",)),
    Bad("loads", _hosts("UpdateSettings"), _settings(max_concurrent_loads=1000),
        "INVALID_ARGUMENT", ("max_concurrent_loads",)),
    Bad("policy", _hosts("UpdateSettings"), _settings(eviction_policy="random"),
        "INVALID_ARGUMENT", ("lru",)),
    Bad("log level", _hosts("UpdateSettings"), _settings(log_level="loud"), "INVALID_ARGUMENT",
        ("warning",)),
    Bad("statistics", _hosts("GetStatistics"),
        host_service_pb2.GetStatisticsRequest(models=["models/a"] * 101), "INVALID_ARGUMENT",
        ("at most 100",)),
    # --- masks, etags, pages, enums
    Bad("mask", _models("UpdateModel"), _update("nope"), "INVALID_ARGUMENT",
        ("'nope'", "config.keep_alive"), {"field": "update_mask"}),
    Bad("mask below", _models("UpdateModel"), _update("config.nope"), "INVALID_ARGUMENT",
        ("config.nope",)),
    Bad("mask too far", _models("UpdateModel"), _update("config.keep_alive.seconds"),
        "INVALID_ARGUMENT", ("config.keep_alive.seconds",)),
    Bad("mask into map", _models("UpdateModel"), _update("labels.a"), "INVALID_ARGUMENT",
        ("labels.a",)),
    Bad("empty path", _models("UpdateModel"), _update(""), "INVALID_ARGUMENT", ("update_mask",)),
    Bad("good and bad path", _models("UpdateModel"),
        _update("display_name", "nope", display_name="x"), "INVALID_ARGUMENT", ("nope",)),
    Bad("mask of settings", _hosts("UpdateSettings"), host_service_pb2.UpdateSettingsRequest(
        update_mask=FieldMask(paths=["no"])), "INVALID_ARGUMENT", ("queue_limit",)),
    Bad("other source", _models("UpdateModel"),
        _update(source=models_pb2.Source(uri="hf://org/other")), "INVALID_ARGUMENT",
        ("hf://org/minilm", "register another")),
    Bad("stale etag", _models("UpdateModel"), _update(display_name="x", etag="old-1"),
        "ETAG_MISMATCH", ("read it again",)),
    Bad("stale etag of delete", _models("DeleteModel"),
        model_service_pb2.DeleteModelRequest(name=MODEL, etag="old-1"), "ETAG_MISMATCH",
        ("old-1",)),
    Bad("stale settings", _hosts("UpdateSettings"), _settings(queue_limit=5, etag="99"),
        "ETAG_MISMATCH", ("settings",)),
    Bad("page size", _models("ListModels"), model_service_pb2.ListModelsRequest(page_size=-1),
        "INVALID_ARGUMENT", ("page_size", "1000")),
    Bad("page token", _models("ListModels"),
        model_service_pb2.ListModelsRequest(page_token="garbage!"), "INVALID_ARGUMENT",
        ("next_page_token",)),
    Bad("long token", _operations("ListOperations"),
        operation_service_pb2.ListOperationsRequest(page_token="A" * 5000), "INVALID_ARGUMENT",
        ("page_token",)),
    Bad("state", _models("ListModels"), model_service_pb2.ListModelsRequest(states=[99]),
        "INVALID_ARGUMENT", ("states",)),
    Bad("unspecified state", _residency("ListInstances"),
        residency_service_pb2.ListInstancesRequest(
            states=[instances_pb2.Instance.STATE_UNSPECIFIED]), "INVALID_ARGUMENT", ("states",)),
    Bad("kind", _operations("ListOperations"),
        operation_service_pb2.ListOperationsRequest(kinds=[77]), "INVALID_ARGUMENT", ("kinds",)),
    Bad("priority of unknown", _operations("UpdateOperation"),
        operation_service_pb2.UpdateOperationRequest(
            operation=operations_pb2.Operation(name=UNKNOWN_OPERATION, priority=1)),
        "OPERATION_NOT_FOUND", ("not known",)),
]  # fmt: skip

CODES = {
    "INVALID_ARGUMENT": (grpc.StatusCode.INVALID_ARGUMENT, "BadRequest"),
    "MODEL_NOT_FOUND": (grpc.StatusCode.NOT_FOUND, "ResourceInfo"),
    "INSTANCE_NOT_FOUND": (grpc.StatusCode.NOT_FOUND, "ResourceInfo"),
    "OPERATION_NOT_FOUND": (grpc.StatusCode.NOT_FOUND, "ResourceInfo"),
    "DEVICE_NOT_FOUND": (grpc.StatusCode.NOT_FOUND, "ResourceInfo"),
    "SOURCE_NOT_FOUND": (grpc.StatusCode.NOT_FOUND, "ResourceInfo"),
    "ALREADY_EXISTS": (grpc.StatusCode.ALREADY_EXISTS, "ResourceInfo"),
    "MODEL_NOT_DOWNLOADED": (grpc.StatusCode.FAILED_PRECONDITION, "PreconditionFailure"),
    "ETAG_MISMATCH": (grpc.StatusCode.ABORTED, "ErrorInfo"),
    "UNIMPLEMENTED": (grpc.StatusCode.UNIMPLEMENTED, "ErrorInfo"),
}


@pytest.mark.parametrize("bad", CASES, ids=lambda bad: bad.id)
async def test_bad_input_is_told_and_changes_nothing(tmp_path: Path, bad: Bad) -> None:
    """Each wrong request gets its code, reason, details and next step; no event comes of it."""
    async with served(tmp_path) as it:
        await it.add()
        sequence = it.host.registry.journal.last_sequence
        found = await failure(bad.method(it)(bad.request, timeout=CALL_S))
        code, detail = CODES[bad.reason]
        assert (found.reason, found.code) == (bad.reason, code)
        assert detail in found.details
        for text in bad.says:
            assert text in found.message, found.message
        assert bad.metadata.items() <= found.metadata.items()
        assert found.request_id
        assert "\0" not in found.message
        assert it.host.registry.journal.last_sequence == sequence
        alive = model_service_pb2.GetModelRequest(name=MODEL)
        await it.user.models.GetModel(alive, timeout=CALL_S)


async def test_a_page_token_belongs_to_its_query(tmp_path: Path) -> None:
    """A token of another query, of another list, or a changed one is INVALID_ARGUMENT."""
    async with served(tmp_path) as it:
        for name in ("a", "b", "c"):
            await it.add(name)
        request = model_service_pb2.ListModelsRequest(page_size=1)
        token = (await it.tcp.models.ListModels(request, timeout=CALL_S)).next_page_token
        for wrong in (
            model_service_pb2.ListModelsRequest(page_token=token, task="x"),
            model_service_pb2.ListModelsRequest(page_token=token[:-2]),
            model_service_pb2.ListModelsRequest(page_token="A" + token),
        ):
            found = await failure(it.tcp.models.ListModels(wrong))
            assert found.metadata.get("field") == "page_token", wrong
        other = operation_service_pb2.ListOperationsRequest(page_token=token)
        assert (await failure(it.tcp.operations.ListOperations(other))).reason == (
            "INVALID_ARGUMENT"
        )
        larger = model_service_pb2.ListModelsRequest(page_token=token, page_size=5)
        page = await it.tcp.models.ListModels(larger, timeout=CALL_S)
        assert [m.name for m in page.models] == ["models/b", "models/c"]


@pytest.mark.parametrize("method", ["CreateModel", "DownloadModel", "DeleteModel", "VerifyModel"])
async def test_a_request_id_is_for_one_request(tmp_path: Path, method: str) -> None:
    """The same id for another method or other content is REQUEST_ID_REUSED, and nothing happens."""
    async with served(tmp_path) as it:
        await it.have("other")
        await it.add()
        used = model_service_pb2.DownloadModelRequest(name="models/other", request_id="u-1")
        await it.tcp.models.DownloadModel(used, timeout=CALL_S)
        sequence = it.host.registry.journal.last_sequence
        request = getattr(model_service_pb2, f"{method}Request")(request_id="u-1")
        if method == "CreateModel":
            request.model.source.uri = "hf://org/new"
        else:
            request.name = MODEL
        found = await failure(getattr(it.tcp.models, method)(request))
        assert (found.reason, found.metadata) == ("REQUEST_ID_REUSED", {"requestId": "u-1"})
        assert "new id" in found.message
        assert it.host.registry.journal.last_sequence == sequence


async def test_an_oversized_message_is_refused_in_type(tmp_path: Path) -> None:
    """Control methods take 256 KiB, whatever the server takes for inference; grpc refuses the rest."""
    async with served(tmp_path) as it:
        request = model_service_pb2.CreateModelRequest(model_id="x")
        request.model.description = "x" * 300_000
        found = await failure(it.tcp.models.CreateModel(request))
        assert found.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert found.reason == "MESSAGE_TOO_LARGE"
        assert found.metadata["limitBytes"] == "262144"
        request.model.description = "x" * 8_000_000
        found = await failure(it.tcp.models.CreateModel(request))
        assert found.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert not it.host.models.list()


async def test_bytes_that_are_no_message_are_refused(tmp_path: Path) -> None:
    """Garbage, cut messages, text that is not UTF-8 and deep nesting are INVALID_ARGUMENT."""
    deep = b""
    for _ in range(200):
        # config.backend_options of a model, a Struct in a Struct ...
        deep = b"\x0a" + _varint(len(deep)) + deep
    async with served(tmp_path) as it:
        call = it.tcp.raw("/modelhost.v1.ModelService/CreateModel")
        for data in (b"\xff\xff\xff", b"\x0a\x05ab", b"\x12\x02\xc3\x28"):
            found = await failure(call(data, timeout=CALL_S))
            assert (found.reason, found.metadata["field"]) == ("INVALID_ARGUMENT", "request")
            assert "modelhost.v1.CreateModelRequest" in found.message
        await failure(call(deep, timeout=CALL_S))
        assert not it.host.models.list()


def _varint(number: int) -> bytes:
    made = bytearray()
    while number > 0x7F:
        made.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*made, number])
