"""HostService over a real socket: the host, its devices, settings, figures, storage, and the registry as a file."""

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.field_mask_pb2 import FieldMask

from modelhost.v1 import devices_pb2, host_pb2, settings_pb2
from modelhost.v1 import host_service_pb2 as pb
from modelhost.v1 import model_service_pb2 as models
from modelhostd.api.facts import Backend, SourceStatus
from modelhostd.core import registry as rules
from modelhostd.core.resources import Source
from tests.api.support import CALL_S, Failure, Served, failure, served

Import = pb.ImportRegistryRequest


class Setting:
    setting, value, effective, message = "M_ARENA_MAX", "1", False, "not this libc"


async def test_the_host_tells_what_it_is(tmp_path: Path) -> None:
    """GetHost has versions, sources, process settings, backends and the caller's principal."""
    async with served(
        tmp_path,
        settings=[Setting()],
        sources=lambda: [SourceStatus("hf", "https://hub", "REACHABLE", has_credential=True)],
        backends=lambda: [Backend("transformers", ["feature-extraction"], "5.0", False, "absent")],
    ) as it:
        host = await it.user.host.GetHost(pb.GetHostRequest(), timeout=CALL_S)
    assert (host.name, host.version, host.principal) == ("host", "1.2.3", "uds:user")
    assert list(host.api_versions) == ["modelhost.v1", "inference"]
    assert host.store_id
    assert host.python_version
    assert host.grpcio_version
    assert host.sources[0].state == host_pb2.Host.SourceStatus.REACHABLE
    assert host.sources[0].has_credential
    assert host.process_settings[0].message == "not this libc"
    assert not host.backends[0].available


async def test_devices_show_their_bytes_and_take_a_budget(tmp_path: Path) -> None:
    """Reserved, resident and free bytes follow loads; a smaller budget evicts idle models."""
    async with served(tmp_path, devices=2) as it:
        await it.have()
        await it.load()
        listed = await it.tcp.host.ListDevices(pb.ListDevicesRequest(page_size=1), timeout=CALL_S)
        assert [d.name for d in listed.devices] == ["devices/sim-0"]
        assert listed.next_page_token
        device = await it.tcp.host.GetDevice(
            pb.GetDeviceRequest(name="devices/sim-0"), timeout=CALL_S
        )
        assert device == listed.devices[0]
        assert (device.budget_bytes, device.resident_bytes, device.free_bytes) == (1000, 400, 600)
        assert device.reserved_bytes == 0
        assert device.kind == devices_pb2.Device.SIM
        request = pb.UpdateDeviceRequest(
            device=devices_pb2.Device(name="devices/sim-0", budget_bytes=300)
        )
        updated = await it.admin.host.UpdateDevice(request, timeout=CALL_S)
        assert updated.budget_bytes == 300
        await it.running.world.clock.advance(1.0)
        assert not it.running.workers.resident
        request.update_mask.paths[:] = ["total_bytes", "display_name"]
        request.device.budget_bytes = 1
        assert (await it.admin.host.UpdateDevice(request, timeout=CALL_S)).budget_bytes == 300
        request.update_mask.paths[:] = ["budget_bytes"]
        request.device.ClearField("budget_bytes")
        assert (await it.admin.host.UpdateDevice(request, timeout=CALL_S)).budget_bytes == 1000


async def test_a_budget_below_what_is_pinned_is_refused(tmp_path: Path) -> None:
    """UpdateDevice and an import name who holds how much of the device; nothing of either is done."""
    async with served(tmp_path) as it:
        await it.have()
        await it.load()
        await it.host.models.pin("minilm", pinned=True)
        request = pb.UpdateDeviceRequest(
            device=devices_pb2.Device(name="devices/sim-0", budget_bytes=399)
        )
        found = await failure(it.admin.host.UpdateDevice(request))
        assert (found.reason, found.code.name) == ("BUDGET_TOO_SMALL", "FAILED_PRECONDITION")
        assert found.metadata["neededBytes"] == "400"
        assert found.metadata["heldBy"] == "minilm"
        document = json.loads(await _export(it))
        document["devices"][0]["budget_bytes"] = 399
        document["models"].append({"id": "new", "spec": document["models"][0]["spec"]})
        data = json.dumps(document).encode()
        for dry_run in (True, False):
            options = {"conflict": Import.SKIP, "include_settings": True, "dry_run": dry_run}
            assert (await _refused(it, data, **options)).reason == "BUDGET_TOO_SMALL"
        assert "new" not in it.host.registry.decided.models
        assert it.host.registry.decided.devices["sim-0"].budget_bytes == 1000


async def test_settings_act_at_once_and_go_back(tmp_path: Path) -> None:
    """A named field is written, one named without a value goes back to the configuration's."""
    async with served(tmp_path) as it:

        async def update(settings: settings_pb2.Settings, *paths: str) -> settings_pb2.Settings:
            request = pb.UpdateSettingsRequest(
                settings=settings, update_mask=FieldMask(paths=paths)
            )
            return await it.admin.host.UpdateSettings(request, timeout=CALL_S)

        before = await it.user.host.GetSettings(pb.GetSettingsRequest(), timeout=CALL_S)
        assert (before.name, before.max_concurrent_loads) == ("settings", 2)
        given = settings_pb2.Settings(max_concurrent_loads=5, log_level="debug")
        given.keep_alive.seconds = 60
        after = await update(given)
        assert (after.max_concurrent_loads, after.log_level) == (5, "debug")
        assert after.keep_alive.seconds == 60
        assert after.load_on_demand
        assert after.etag != before.etag
        back = await update(settings_pb2.Settings(), "max_concurrent_loads", "keep_alive", "name")
        assert (back.max_concurrent_loads, back.log_level) == (2, "debug")
        assert not back.HasField("keep_alive")
        off = await update(settings_pb2.Settings(), "load_on_demand")
        assert not off.load_on_demand
        same = await update(off, "*")
        assert same == off
        stale = pb.UpdateSettingsRequest(settings=before)
        assert (await failure(it.admin.host.UpdateSettings(stale))).reason == "ETAG_MISMATCH"


async def test_statistics_are_of_the_moment(tmp_path: Path) -> None:
    """Devices, instances, requests and counts are there; a model filter narrows them."""
    async with served(tmp_path, daemon_bytes=lambda: 77) as it:
        for name in ("a", "b"):
            await it.have(name)
            await it.load(name)
        await it.host.inference.infer("a", "", b"x", CALL_S)
        figures = await it.tcp.host.GetStatistics(
            pb.GetStatisticsRequest(models=["models/a"]), timeout=CALL_S
        )
        assert [i.model for i in figures.instances] == ["models/a"]
        assert figures.instances[0].device_bytes == 400
        assert figures.instances[0].activity.request_count == 1
        assert figures.devices[0].resident_bytes == 800
        assert (figures.model_count, figures.request_count, figures.error_count) == (2, 1, 0)
        assert figures.daemon_bytes == 77
        assert figures.store_id == it.host.registry.store_id


async def test_storage_is_counted_and_checked(tmp_path: Path) -> None:
    """GetStorage counts bytes by model; CheckStorage lists what differs, and repairs when asked."""
    async with served(tmp_path) as it:
        await it.have("a", 400)
        await it.have("b", 900)
        storage = await it.tcp.host.GetStorage(pb.GetStorageRequest(), timeout=CALL_S)
        assert [(m.model, m.size_bytes) for m in storage.models] == [
            ("models/b", 900),
            ("models/a", 400),
        ]
        assert storage.home == str(tmp_path)
        it.running.world.files.put("stray", 1, {"x": b"y"})
        for repair in (False, True):
            request = pb.CheckStorageRequest(repair=repair)
            done = await it.end(await it.admin.host.CheckStorage(request, timeout=CALL_S))
            result = done.check_storage_result
            kinds = [f.kind for f in result.findings]
            assert "stray_tree" in kinds
            assert result.finding_count == len(kinds)
            assert bool(result.repaired_count) is repair
        clean = await it.end(
            await it.admin.host.CheckStorage(pb.CheckStorageRequest(deep=True), timeout=CALL_S)
        )
        assert not clean.check_storage_result.findings


# --- the registry as a file -----------------------------------------------------------------------


async def _export(it: Served) -> bytes:
    call = it.tcp.host.ExportRegistry(pb.ExportRegistryRequest(), timeout=CALL_S)
    chunks = [c async for c in call]
    assert all(0 < len(c.chunk) <= 64 * 1024 for c in chunks)
    assert {c.store_id for c in chunks} == {it.host.registry.store_id}
    return b"".join(c.chunk for c in chunks)


def _parts(document: bytes, **first: Any) -> Sequence[Import]:
    size = 128 * 1024
    cut = [document[i : i + size] for i in range(0, len(document), size)] or [b""]
    return [Import(chunk=cut[0], **first), *(Import(chunk=c) for c in cut[1:])]


async def _import(it: Served, document: bytes, **first: Any) -> pb.ImportRegistryResponse:
    return await it.admin.host.ImportRegistry(iter(_parts(document, **first)), timeout=CALL_S)


async def _refused(it: Served, document: bytes, **first: Any) -> Failure:
    sequence = it.host.registry.journal.last_sequence
    found = await failure(
        it.admin.host.ImportRegistry(iter(_parts(document, **first)), timeout=CALL_S)
    )
    assert it.host.registry.journal.last_sequence == sequence
    return found


async def _rich(it: Served) -> None:
    for number in range(150):
        request = models.CreateModelRequest(model_id=f"m{number:03d}")
        request.model.source.uri = "hf://org/name@main"
        request.model.description = "é" * 900
        request.model.labels["n"] = str(number)
        request.model.config.keep_alive.seconds = number
        request.model.config.backend_options.update({"deep": {"list": [1, 2.5, None]}})
        await it.tcp.models.CreateModel(request, timeout=CALL_S)


async def _shown(it: Served) -> dict[str, Any]:
    """Return every model without what belongs to this host alone."""
    found = {}
    for model in it.host.models.list():
        shown = await it.tcp.models.GetModel(
            models.GetModelRequest(name=f"models/{model.id}"), timeout=CALL_S
        )
        for field in ("uid", "etag", "create_time", "update_time", "artifacts", "state"):
            shown.ClearField(field)
        found[model.id] = shown
    return found


async def test_an_export_makes_the_same_registry_elsewhere(tmp_path: Path) -> None:
    """Models, settings and budgets of one host appear on another, in one commit."""
    async with served(tmp_path / "a") as one:
        await _rich(one)
        settings = pb.UpdateSettingsRequest(settings=settings_pb2.Settings(queue_limit=7))
        await one.admin.host.UpdateSettings(settings, timeout=CALL_S)
        document, expected = await _export(one), await _shown(one)
        assert len(document) > 3 * 64 * 1024
    async with served(tmp_path / "b", budget=500) as two:
        dry = await _import(two, document, dry_run=True, include_settings=True)
        assert len(dry.created_models) == 150
        assert not two.host.models.list()
        commits = two.host.registry.commit_count
        done = await _import(two, document, include_settings=True, request_id="once")
        assert two.host.registry.commit_count == commits + 1
        assert list(done.created_models) == list(dry.created_models)
        assert done.settings_changed
        assert await _shown(two) == expected
        assert two.host.registry.committed.settings.queue_limit == 7
        assert two.host.registry.committed.device("sim-0").budget_bytes == 1000
        again = await _import(two, document, include_settings=True, request_id="once")
        assert again.created_models == done.created_models
        assert await _export(two) != b""


async def test_settings_are_imported_only_when_asked(tmp_path: Path) -> None:
    """Without include_settings models alone are taken."""
    async with served(tmp_path / "a") as one:
        document = await _export(one)
    changed = json.loads(document)
    changed["settings"]["queue_limit"] = 9
    async with served(tmp_path / "b", budget=500) as two:
        done = await _import(two, json.dumps(changed).encode())
        assert not done.settings_changed
        assert two.host.registry.committed.settings.queue_limit == 256
        assert two.host.registry.committed.device("sim-0").budget_bytes == 500


async def test_a_conflict_is_decided_as_asked(tmp_path: Path) -> None:
    """FAIL imports nothing, SKIP leaves what is there, UPDATE replaces it unless its source differs."""
    async with served(tmp_path) as it:
        await it.add("a")
        await it.add("b")
        document = json.loads(await _export(it))
        document["models"][0]["spec"]["display_name"] = "imported"
        document["models"].append({"id": "new", "spec": document["models"][0]["spec"]})
        data = json.dumps(document).encode()
        found = await _refused(it, data)
        assert (found.reason, found.metadata["name"]) == ("ALREADY_EXISTS", "models/a")
        skipped = await _import(it, data, conflict=Import.SKIP, dry_run=True)
        assert list(skipped.skipped_models) == ["models/a", "models/b"]
        assert list(skipped.created_models) == ["models/new"]
        updated = await _import(it, data, conflict=Import.UPDATE)
        assert list(updated.updated_models) == ["models/a"]
        assert list(updated.skipped_models) == ["models/b"]
        assert it.host.models.get("a").display_name == "imported"
        document["models"][1]["spec"]["source"]["uri"] = "hf://org/other"
        found = await _refused(it, json.dumps(document).encode(), conflict=Import.UPDATE)
        assert found.reason == "ALREADY_EXISTS"
        assert "another source" in found.message


GOOD = {"id": "x", "spec": {"source": {"uri": "hf://org/x"}}}


def _document(*entries: Any, **top: Any) -> bytes:
    return json.dumps(
        {"format": "modelhost-registry", "version": 1, "models": entries, **top}
    ).encode()


@pytest.mark.parametrize(
    ("document", "says"),
    [
        (b"", "chunk"),
        (b"{", "chunk"),
        (b"[" * 100_000, "chunk"),
        (b'{"format": 1}', "format"),
        (_document(format="else"), "modelhost-registry"),
        (_document(version=2), "version 1 to 1"),
        (_document({"id": "x"}), "spec"),
        (_document(GOOD, GOOD), "models[1].id"),
        (_document(GOOD, {**GOOD, "id": "../y"}), "models[1]"),
        (_document(GOOD, {"id": "y", "spec": {"source": {"uri": "ftp://x/y"}}}), "models[1]"),
        (
            _document({"id": "y", "spec": {**GOOD["spec"], "config": {"priority": 101}}}),
            "priority",
        ),
        (
            _document({"id": "y", "spec": {**GOOD["spec"], "config": {"device": "tpu-0"}}}),
            "model.config.device",
        ),
        (_document(GOOD, settings={"queue_limit": 0}), "settings.queue_limit"),
        (
            _document(GOOD, devices=[{"id": "sim-0", "uuid": "", "budget_bytes": -1}]),
            "devices[0].budget_bytes",
        ),
    ],
    ids=[
        "empty", "cut", "deep", "type", "format", "version", "spec", "twice", "id", "scheme", "range",
        "device", "settings", "budget",
    ],
)  # fmt: skip
async def test_a_bad_document_changes_nothing(tmp_path: Path, document: bytes, says: str) -> None:
    """A document that is wrong anywhere is INVALID_ARGUMENT that says where, and nothing of it is kept."""
    async with served(tmp_path) as it:
        found = await _refused(it, document, include_settings=True)
        assert found.reason == "INVALID_ARGUMENT"
        assert says in found.message
        assert not it.host.models.list()


async def test_an_import_has_a_bound(tmp_path: Path) -> None:
    """More than 16 MiB in all is refused while it comes."""
    async with served(tmp_path) as it:
        chunks = (Import(chunk=b" " * 190_000) for _ in range(100))
        found = await failure(it.admin.host.ImportRegistry(chunks, timeout=CALL_S))
        assert found.reason == "INVALID_ARGUMENT"
        assert "16777216" in found.message


async def test_slots_come_with_their_models(tmp_path: Path) -> None:
    """An exported slot is there after the import, and an other one of its name only where asked for."""
    async with served(tmp_path) as it:
        document = _document(GOOD, {**GOOD, "id": "other"}, slots=[{"id": "s", "model": "x"}])
        done = await _import(it, document)
        assert list(done.slots) == ["slots/s"]
        assert it.host.registry.committed.slots["s"].model == "x"
        assert not (await _import(it, document, conflict=Import.SKIP)).slots
        other = _document(slots=[{"id": "s", "model": "other"}])
        assert (await _refused(it, other)).reason == "ALREADY_EXISTS"
        assert not (await _import(it, other, conflict=Import.SKIP)).slots
        assert list((await _import(it, other, conflict=Import.UPDATE)).slots) == ["slots/s"]
        exported = b"".join([chunk async for chunk in it.host.registry_io.export()])
        assert json.loads(exported)["slots"] == [{"id": "s", "model": "other"}]
        for slot, says in (
            ({"id": "t", "model": "no"}, "'no'"),
            ({"id": "../s", "model": "x"}, "slots[0]"),
            ({"id": "x", "model": "x"}, "another id for the slot"),
        ):
            assert says in (await _refused(it, _document(slots=[slot]))).message


async def test_an_import_decides_again_when_a_model_comes_meanwhile(tmp_path: Path) -> None:
    """A model that is registered while a document is read is not overwritten."""
    async with served(tmp_path) as it:
        reader = it.host.registry_io
        entries = [{**GOOD, "id": f"m{n}"} for n in range(100)]
        document = await reader.read(_document(*entries))
        spec = rules.ModelSpec(source=Source("hf://org/mine"))
        done, _ = await asyncio.gather(
            reader.apply(document, conflict="SKIP", include_settings=False, dry_run=False),
            it.host.models.create(spec, "m7"),
        )
        assert list(done.skipped) == ["m7"]
        assert len(done.created) == 99
        assert it.host.models.get("m7").source.uri == "hf://org/mine"
