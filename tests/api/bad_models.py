"""Wrong requests to ModelService."""

from typing import Any

from google.protobuf.duration_pb2 import Duration
from google.protobuf.field_mask_pb2 import FieldMask

from modelhost.v1 import model_service_pb2, models_pb2
from tests.api.bad_input import Bad

MODEL = "models/minilm"


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
        Bad(f"create id {n}", "CreateModel", _create(key), "INVALID_ARGUMENT",
            ("model_id", "1 to 64"), {"field": "model_id"})
        for n, key in BAD_IDS.items()
    ),
    *(
        Bad(f"get name {n}", "GetModel", model_service_pb2.GetModelRequest(name=key),
            "INVALID_ARGUMENT", ("name", "models/{id}"), {"field": "name"})
        for n, key in NAMES.items()
    ),
    # --- what is not there
    Bad("upload to unknown", "UploadModelFiles", model_service_pb2.UploadModelFilesRequest(
        model="models/no", start={}), "MODEL_NOT_FOUND", ("'no'",), {"model": "no"}),
    Bad("upload without start", "UploadModelFiles", model_service_pb2.UploadModelFilesRequest(
        model=MODEL, commit=True), "INVALID_ARGUMENT", ("start as the first",), {"field": "step"}),
    Bad("upload nothing", "UploadModelFiles", model_service_pb2.UploadModelFilesRequest(model=MODEL),
        "INVALID_ARGUMENT", ("start as the first",), {"field": "step"}),
    Bad("upload total", "UploadModelFiles", model_service_pb2.UploadModelFilesRequest(
        model=MODEL, start={"total_bytes": -1}), "INVALID_ARGUMENT", ("start.total_bytes",)),
    Bad("upload revision", "UploadModelFiles", model_service_pb2.UploadModelFilesRequest(
        model=MODEL, start={"revision": "a\nb"}), "INVALID_ARGUMENT", ("start.revision",)),
    Bad("upload request id", "UploadModelFiles", model_service_pb2.UploadModelFilesRequest(
        model=MODEL, start={"request_id": "a b"}), "INVALID_ARGUMENT", ("request_id",)),
    Bad("unknown model", "GetModel", model_service_pb2.GetModelRequest(name="models/no"),
        "MODEL_NOT_FOUND", ("'no'", "modelhost ls"), {"model": "no"}),
    Bad("update unknown", "UpdateModel", model_service_pb2.UpdateModelRequest(
        model=models_pb2.Model(name="models/no")), "MODEL_NOT_FOUND", ("modelhost pull",)),
    Bad("delete unknown", "DeleteModel",
        model_service_pb2.DeleteModelRequest(name="models/no"), "MODEL_NOT_FOUND", ("'no'",)),
    Bad("download unknown", "DownloadModel",
        model_service_pb2.DownloadModelRequest(name="models/no"), "MODEL_NOT_FOUND", ("'no'",)),
    Bad("list files of absent", "ListModelFiles",
        model_service_pb2.ListModelFilesRequest(model=MODEL), "MODEL_NOT_DOWNLOADED", ("pull",)),
    Bad("verify absent", "VerifyModel",
        model_service_pb2.VerifyModelRequest(name=MODEL), "MODEL_NOT_DOWNLOADED", ("pull",)),
    # --- sources
    *(
        Bad(f"source {n}", "CreateModel", _create(uri=uri), "INVALID_ARGUMENT", (says,))
        for n, uri, says in (
            ("none", "", "source"),
            ("scheme", "ftp://host/x", "hf"),
            ("password", "https://me:secret@host/x", "no user name or password"),
            ("bare", "org/name", "hf://"),
            ("nul", "hf://org/na\0me", "printable"),
            ("long", "hf://org/" + "a" * 2000, "1024 characters"),
            ("traversal", "hf://org/..", "source.uri"),
            ("query", "hf://org/name?x=1", "query"),
            ("revision", "hf://org/name@a..b", "branch, tag or commit"),
        )
    ),
    Bad("inspect scheme", "InspectSource", model_service_pb2.InspectSourceRequest(
        source=models_pb2.Source(uri="ftp://x/y")), "INVALID_ARGUMENT", ("hf",)),
    Bad("inspect missing", "InspectSource", model_service_pb2.InspectSourceRequest(
        source=models_pb2.Source(uri="hf://org/absent")), "SOURCE_NOT_FOUND", ("absent",),
        {"source": "hf://org/absent", "missing": "repository"}),
    Bad("inspect missing revision", "InspectSource",
        model_service_pb2.InspectSourceRequest(
            source=models_pb2.Source(uri="hf://org/minilm", revision="v9")),
        "SOURCE_NOT_FOUND", ("revision",)),
    Bad("same id twice", "CreateModel", _create("minilm"), "ALREADY_EXISTS",
        ("--name",), {"name": MODEL}),
    # --- fields out of range
    Bad("batch size", "CreateModel", _config(max_batch_size=0), "INVALID_ARGUMENT",
        ("max_batch_size", "1 to 65536")),
    Bad("priority", "CreateModel", _config(priority=101), "INVALID_ARGUMENT",
        ("-100 to 100",)),
    Bad("keep alive", "CreateModel", _config(keep_alive=Duration(seconds=10**10)),
        "INVALID_ARGUMENT", ("keep_alive",)),
    Bad("no duration", "CreateModel",
        _config(keep_alive=Duration(seconds=1, nanos=-5)), "INVALID_ARGUMENT", ("a Duration",)),
    Bad("precision", "CreateModel", _config(precision="fp8"), "INVALID_ARGUMENT",
        ("fp16",)),
    Bad("config device", "CreateModel", _config(device="devices/tpu"),
        "INVALID_ARGUMENT", ("model.config.device", "sim-0")),
    Bad("config device name", "CreateModel", _config(device="tpu"), "INVALID_ARGUMENT",
        ("devices/{id}",)),
    Bad("isolation", "CreateModel", _config(isolation=9), "INVALID_ARGUMENT",
        ("model.config.isolation",)),
    Bad("options depth", "CreateModel", _nested(6), "INVALID_ARGUMENT", ("4 levels",)),
    Bad("options deeper", "CreateModel", _nested(30), "INVALID_ARGUMENT", ("levels",)),
    Bad("text", "CreateModel", _create(description="x" * 5000), "INVALID_ARGUMENT",
        ("4096 characters",)),
    Bad("nul in text", "CreateModel", _create(display_name="a\0b"), "INVALID_ARGUMENT",
        ("NUL",)),
    Bad("labels", "CreateModel", _create(labels={str(n): "" for n in range(65)}),
        "INVALID_ARGUMENT", ("64 labels",)),
    Bad("empty label", "CreateModel", _create(labels={"": "x"}), "INVALID_ARGUMENT",
        ("labels",)),
    Bad("base model", "CreateModel", _create(base_model="minilm"), "INVALID_ARGUMENT",
        ("models/{id}",)),
    Bad("requirement bytes", "CreateModel",
        _create(requirements=models_pb2.Requirements(device_bytes=-1)), "INVALID_ARGUMENT",
        ("device_bytes",)),
    Bad("requirement capability", "CreateModel",
        _create(requirements=models_pb2.Requirements(compute_capability="new")),
        "INVALID_ARGUMENT", ("8.0",)),
    Bad("download priority", "DownloadModel",
        model_service_pb2.DownloadModelRequest(name=MODEL, priority=500), "INVALID_ARGUMENT",
        ("-100 to 100",)),
    Bad("download rate", "DownloadModel",
        model_service_pb2.DownloadModelRequest(name=MODEL, rate_limit_bytes_per_second=-5),
        "INVALID_ARGUMENT", ("rate_limit_bytes_per_second", "0 to")),
    Bad("negative version", "ListModelFiles",
        model_service_pb2.ListModelFilesRequest(model=MODEL, version=-1), "INVALID_ARGUMENT",
        ("version",)),
    Bad("request id", "DownloadModel",
        model_service_pb2.DownloadModelRequest(name=MODEL, request_id="a\nb"),
        "INVALID_ARGUMENT", ("request_id", "UUID")),
    # --- masks, etags, pages, enums
    Bad("mask", "UpdateModel", _update("nope"), "INVALID_ARGUMENT",
        ("'nope'", "config.keep_alive"), {"field": "update_mask"}),
    Bad("mask below", "UpdateModel", _update("config.nope"), "INVALID_ARGUMENT",
        ("config.nope",)),
    Bad("mask too far", "UpdateModel", _update("config.keep_alive.seconds"),
        "INVALID_ARGUMENT", ("config.keep_alive.seconds",)),
    Bad("mask into map", "UpdateModel", _update("labels.a"), "INVALID_ARGUMENT",
        ("labels.a",)),
    Bad("empty path", "UpdateModel", _update(""), "INVALID_ARGUMENT", ("update_mask",)),
    Bad("good and bad path", "UpdateModel",
        _update("display_name", "nope", display_name="x"), "INVALID_ARGUMENT", ("nope",)),
    Bad("other source", "UpdateModel",
        _update(source=models_pb2.Source(uri="hf://org/other")), "INVALID_ARGUMENT",
        ("hf://org/minilm", "register another")),
    Bad("stale etag", "UpdateModel", _update(display_name="x", etag="old-1"),
        "ETAG_MISMATCH", ("read it again",)),
    Bad("stale etag of delete", "DeleteModel",
        model_service_pb2.DeleteModelRequest(name=MODEL, etag="old-1"), "ETAG_MISMATCH",
        ("old-1",)),
    Bad("page size", "ListModels", model_service_pb2.ListModelsRequest(page_size=-1),
        "INVALID_ARGUMENT", ("page_size", "1000")),
    Bad("page token", "ListModels",
        model_service_pb2.ListModelsRequest(page_token="garbage!"), "INVALID_ARGUMENT",
        ("next_page_token",)),
    Bad("state", "ListModels", model_service_pb2.ListModelsRequest(states=[99]),
        "INVALID_ARGUMENT", ("states",)),
    # --- what is left of the service
    Bad("delete files of unknown", "DeleteModelFiles",
        model_service_pb2.DeleteModelFilesRequest(model="models/no"), "MODEL_NOT_FOUND", ("'no'",)),
    Bad("delete files of negative version", "DeleteModelFiles",
        model_service_pb2.DeleteModelFilesRequest(model=MODEL, version=-1), "INVALID_ARGUMENT",
        ("version",)),
    Bad("compatibility of unknown", "CheckCompatibility",
        model_service_pb2.CheckCompatibilityRequest(model="models/no"), "MODEL_NOT_FOUND",
        ("'no'",)),
    Bad("compatibility with unknown device", "CheckCompatibility",
        model_service_pb2.CheckCompatibilityRequest(model=MODEL, device="devices/tpu"),
        "DEVICE_NOT_FOUND", ("'tpu'",)),
]  # fmt: skip
