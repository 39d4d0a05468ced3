"""What each method of the client asks the daemon, on both twins."""

from datetime import timedelta

import pytest

from modelhost import (
    AsyncOperationHandle,
    InvalidArgument,
    OperationHandle,
)
from modelhost.oip import open_inference_pb2 as oip
from modelhost.v1 import (
    devices_pb2,
    host_pb2,
    host_service_pb2,
    instances_pb2,
    model_service_pb2,
    models_pb2,
    operations_pb2,
    residency_service_pb2,
    settings_pb2,
    slots_pb2,
    storage_pb2,
)
from tests.client.double import Double

Model = models_pb2.Model
Operation = operations_pb2.Operation
DONE = Operation(name="operations/1", state="SUCCEEDED")

CALLS = [
    (
        lambda c: c.add(
            "hf://o/n", "a", task="other", labels={"k": "v"}, config={"autoload": True},
            base_model="b", allow_patterns=["*.x"],
        ),
        model_service_pb2.CreateModelRequest(
            model=Model(
                task="other",
                labels={"k": "v"},
                config=models_pb2.ModelConfig(autoload=True),
                base_model="models/b",
                source=models_pb2.Source(uri="hf://o/n", allow_patterns=["*.x"]),
            ),
            model_id="a",
        ),
        Model(name="models/a"),
    ),
    (lambda c: c.add(None, "a"), model_service_pb2.CreateModelRequest(model=Model(), model_id="a"), Model()),
    (lambda c: c.get("a"), model_service_pb2.GetModelRequest(name="models/a"), Model()),
    (lambda c: c.get("models/a"), model_service_pb2.GetModelRequest(name="models/a"), Model()),
    (
        lambda c: c.update("a", {"description": "d", "config.keep_alive": timedelta(seconds=5)}, etag="e"),
        model_service_pb2.UpdateModelRequest(
            model=Model(
                name="models/a", description="d", etag="e",
                config=models_pb2.ModelConfig(keep_alive=timedelta(seconds=5)),
            ),
            update_mask={"paths": ["description", "config.keep_alive"]},
        ),
        Model(),
    ),
    (
        lambda c: c.update("a", {"config.max_batch_size": None}),
        model_service_pb2.UpdateModelRequest(
            model=Model(name="models/a", config={}),
            update_mask={"paths": ["config.max_batch_size"]},
        ),
        Model(),
    ),
    (lambda c: c.delete("a", force=True, etag="e"), model_service_pb2.DeleteModelRequest(name="models/a", force=True, etag="e"), DONE),
    (lambda c: c.delete_files("a", version=2), model_service_pb2.DeleteModelFilesRequest(model="models/a", version=2), DONE),
    (lambda c: c.verify("a"), model_service_pb2.VerifyModelRequest(name="models/a"), DONE),
    (
        lambda c: c.inspect("hf://o/n", ignore_patterns=["*.y"]),
        model_service_pb2.InspectSourceRequest(source=models_pb2.Source(uri="hf://o/n", ignore_patterns=["*.y"])),
        model_service_pb2.InspectSourceResponse(),
    ),
    (
        lambda c: c.check_compatibility("a", "cpu"),
        model_service_pb2.CheckCompatibilityRequest(model="models/a", device="devices/cpu"),
        model_service_pb2.CheckCompatibilityResponse(),
    ),
    (
        lambda c: c.pull("a", priority=3, rate_limit_bytes_per_second=9, allow_unsafe=True),
        model_service_pb2.DownloadModelRequest(
            name="models/a", priority=3, rate_limit_bytes_per_second=9, allow_unsafe=True
        ),
        DONE,
    ),
    (
        lambda c: c.load("a", device="cuda-0", priority=-1, download=True),
        residency_service_pb2.LoadModelRequest(name="models/a", device="devices/cuda-0", priority=-1, download=True),
        DONE,
    ),
    (lambda c: c.unload("a", keep_warm=True, force=True), residency_service_pb2.UnloadModelRequest(name="models/a", keep_warm=True, force=True), DONE),
    (lambda c: c.reload("a", version=1), residency_service_pb2.ReloadModelRequest(name="models/a", version=1), DONE),
    (lambda c: c.plan("a"), residency_service_pb2.PlanLoadRequest(model="models/a"), residency_service_pb2.PlanLoadResponse()),
    (lambda c: c.instance("a"), residency_service_pb2.GetInstanceRequest(name="models/a/instances/-"), instances_pb2.Instance()),
    (lambda c: c.check_instance("models/a/instances/7"), residency_service_pb2.CheckInstanceRequest(name="models/a/instances/7"), instances_pb2.Instance()),
    (lambda c: c.pin("a"), residency_service_pb2.PinModelRequest(name="models/a"), Model()),
    (lambda c: c.unpin("a"), residency_service_pb2.UnpinModelRequest(name="models/a"), Model()),
    (lambda c: c.slot("role"), residency_service_pb2.GetSlotRequest(name="slots/role"), slots_pb2.Slot()),
    (
        lambda c: c.switch("role", "a", etag="1", unload_previous=True),
        residency_service_pb2.SwitchSlotRequest(slot="slots/role", model="models/a", etag="1", unload_previous=True),
        DONE,
    ),
    (lambda c: c.unblock("a"), residency_service_pb2.UnblockModelRequest(name="models/a"), Model()),
    (lambda c: c.host(), host_service_pb2.GetHostRequest(), host_pb2.Host()),
    (lambda c: c.device("cpu"), host_service_pb2.GetDeviceRequest(name="devices/cpu"), devices_pb2.Device()),
    (
        lambda c: c.set_budget("cpu", 5),
        host_service_pb2.UpdateDeviceRequest(
            device=devices_pb2.Device(name="devices/cpu", budget_bytes=5), update_mask={"paths": ["budget_bytes"]}
        ),
        devices_pb2.Device(),
    ),
    (
        lambda c: c.set_budget("cpu", None),
        host_service_pb2.UpdateDeviceRequest(
            device=devices_pb2.Device(name="devices/cpu"), update_mask={"paths": ["budget_bytes"]}
        ),
        devices_pb2.Device(),
    ),
    (
        lambda c: c.host_tier(),
        host_service_pb2.ListDevicesRequest(page_size=1),
        devices_pb2.HostTier(),
    ),
    (lambda c: c.settings(), host_service_pb2.GetSettingsRequest(), settings_pb2.Settings()),
    (
        lambda c: c.update_settings({"queue_limit": 7, "keep_alive": None}, etag="e"),
        host_service_pb2.UpdateSettingsRequest(
            settings=settings_pb2.Settings(queue_limit=7, etag="e"), update_mask={"paths": ["queue_limit", "keep_alive"]}
        ),
        settings_pb2.Settings(),
    ),
    (lambda c: c.statistics(["a"]), host_service_pb2.GetStatisticsRequest(models=["models/a"]), host_pb2.Statistics()),
    (lambda c: c.storage(), host_service_pb2.GetStorageRequest(), storage_pb2.Storage()),
    (lambda c: c.check_storage(deep=True, repair=True), host_service_pb2.CheckStorageRequest(deep=True, repair=True), DONE),
    (
        lambda c: c.restore_quarantined("1-a"),
        host_service_pb2.RestoreQuarantinedRequest(name="quarantine/1-a"),
        Model(name="models/a"),
    ),
    (lambda c: c.prune_storage(dry_run=True), host_service_pb2.PruneStorageRequest(dry_run=True), DONE),
    (lambda c: c.metadata("models/a", version=3), oip.ModelMetadataRequest(name="a", version="3"), oip.ModelMetadataResponse()),
]  # fmt: skip


@pytest.mark.parametrize(
    ("call", "request_", "answer"),
    CALLS,
    ids=[f"{type(r).__name__}-{i}" for i, (_, r, _) in enumerate(CALLS)],
)
def test_a_method_asks_for_what_it_says(double: Double, both, call, request_, answer) -> None:
    """The request on the wire is the one its arguments mean; the answer is handed back."""
    method = type(request_).__name__.removesuffix("Request")
    double.on(method, answer)
    result = both(call)
    (sent,) = double.requests(method)
    if "request_id" in sent.DESCRIPTOR.fields_by_name:
        assert sent.request_id
        sent.request_id = ""
    assert sent == request_
    handle = isinstance(result, OperationHandle | AsyncOperationHandle)
    assert (result.operation if handle else result) == answer


LISTS = [
    (lambda c: c.models(task="t", states=["available"], labels={"a": ""}, loaded_only=True), "ListModels", "models", Model(name="models/a")),
    (lambda c: c.files("a", version=2), "ListModelFiles", "files", models_pb2.ModelFile(path="p")),
    (lambda c: c.instances("a", device="cpu", states=["READY"]), "ListInstances", "instances", instances_pb2.Instance(name="i")),
    (lambda c: c.devices(), "ListDevices", "devices", devices_pb2.Device(name="d")),
    (lambda c: c.slots("a"), "ListSlots", "slots", slots_pb2.Slot(name="slots/s")),
    (lambda c: c.quarantine("a"), "ListQuarantine", "quarantined_files", storage_pb2.QuarantinedFile(name="q")),
]  # fmt: skip


@pytest.mark.parametrize(("call", "method", "field", "item"), LISTS, ids=[x[1] for x in LISTS])
def test_lists_read_every_page(double: Double, both, call, method, field, item) -> None:
    """Pages are asked for with the same filters and the token of the one before."""
    kinds = {
        "ListModels": model_service_pb2.ListModelsResponse,
        "ListModelFiles": model_service_pb2.ListModelFilesResponse,
        "ListInstances": residency_service_pb2.ListInstancesResponse,
        "ListDevices": host_service_pb2.ListDevicesResponse,
        "ListSlots": residency_service_pb2.ListSlotsResponse,
        "ListQuarantine": host_service_pb2.ListQuarantineResponse,
    }
    kind = kinds[method]
    double.on(
        method, kind(**{field: [item, item], "next_page_token": "x"}), kind(**{field: [item]})
    )
    assert both(call) == [item, item, item]
    first, second = double.requests(method)
    assert (first.page_token, second.page_token) == ("", "x")
    second.page_token = ""
    assert first == second


@pytest.mark.parametrize(
    ("changes", "config"),
    [
        ({"config.keep_alive": 300}, {"keep_alive": {"seconds": 300}}),
        ({"config.keep_alive": -0.5}, {"keep_alive": {"nanos": -500_000_000}}),
        ({"config": {"keep_alive": 1.5}}, {"keep_alive": {"seconds": 1, "nanos": 500_000_000}}),
        ({"config": {"backend_options": {"a": [1]}}}, {"backend_options": {"a": [1]}}),
    ],
    ids=["seconds", "negative", "nested", "options"],
)
def test_spans_may_be_seconds(double: Double, both, changes, config) -> None:
    """A number where the contract has a span is in seconds; options of a backend are a dictionary."""
    double.on("UpdateModel", Model())
    both(lambda c: c.update("a", changes))
    (sent,) = double.requests("UpdateModel")
    assert sent.model.config == models_pb2.ModelConfig(**config)
    assert list(sent.update_mask.paths) == list(changes)


# --- the registry as a file -------------------------------------------------------------------------


def test_export_puts_the_chunks_together(double: Double, both) -> None:
    """The document is the bytes of all chunks in order."""
    kind = host_service_pb2.ExportRegistryResponse
    double.on("ExportRegistry", [kind(chunk=b"ab", sequence=3), kind(chunk=b"c")])
    assert both(lambda c: c.export_registry()) == b"abc"


def test_import_sends_chunks_that_fit(double: Double, both) -> None:
    """The document goes in chunks of at most 192 KiB; the first says what holds for all."""
    double.on(
        "ImportRegistry", host_service_pb2.ImportRegistryResponse(created_models=["models/a"])
    )
    document = bytes(range(256)) * 1600
    answer = both(lambda c: c.import_registry(document, conflict="skip", dry_run=True))
    assert list(answer.created_models) == ["models/a"]
    (messages,) = double.requests("ImportRegistry")
    assert b"".join(m.chunk for m in messages) == document
    assert max(len(m.chunk) for m in messages) == 192 * 1024
    assert messages[0].request_id
    assert messages[0].dry_run
    assert host_service_pb2.ImportRegistryRequest.Conflict.Name(messages[0].conflict) == "SKIP"


@pytest.mark.parametrize(
    "call",
    [
        lambda c: c.models(states=["shiny"]),
        lambda c: c.operations(kinds=["nap"]),
        lambda c: c.instances(states=["KIND_UNSPECIFIED"]),
        lambda c: c.import_registry(b"", conflict="maybe"),
        lambda c: c.update("a", {"colour": 1}),
        lambda c: c.update("a", {"config.colour": 1}),
        lambda c: c.update("a", {"description.x": 1}),
        lambda c: c.update("a", {"description": 5}),
        lambda c: c.update("a", {"config.keep_alive": "soon"}),
        lambda c: c.pull("org/name"),
        lambda c: c.add("hf://o/n", config={"colour": 1}),
    ],
    ids=[
        "state",
        "kind",
        "state2",
        "conflict",
        "field",
        "subfield",
        "path",
        "value",
        "span",
        "scheme",
        "config",
    ],
)
def test_words_that_the_contract_does_not_have_are_refused(double: Double, both, call) -> None:
    """A name or a field that is none is InvalidArgument before any call."""
    with pytest.raises(InvalidArgument):
        both(call)
    assert double.calls == []
