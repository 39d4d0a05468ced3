"""ModelService over a real socket: what each method does when it is used as it is meant."""

from pathlib import Path
from typing import Any

import pytest
from google.protobuf.field_mask_pb2 import FieldMask

from modelhost.v1 import model_service_pb2 as pb
from modelhost.v1 import models_pb2, operations_pb2
from modelhostd.api.facts import Backend
from tests.api.support import CALL_S, Served, failure, served

NAME = "models/minilm"


def _created(**fields: Any) -> models_pb2.Model:
    model = models_pb2.Model(**fields)
    model.source.uri = "hf://org/MiniLM"
    return model


async def _update(it: Served, model: models_pb2.Model, *paths: str) -> models_pb2.Model:
    request = pb.UpdateModelRequest(model=model, update_mask=FieldMask(paths=paths))
    return await it.tcp.models.UpdateModel(request, timeout=CALL_S)


async def test_a_model_is_what_was_registered(tmp_path: Path) -> None:
    """CreateModel derives the id, keeps every field as given, and GetModel answers the same."""
    async with served(tmp_path) as it:
        model = _created(
            display_name="MiniLM",
            description="small",
            labels={"team": "search"},
            licence="apache-2.0",
            task="feature-extraction",
            base_model="models/other",
        )
        model.source.revision = "v1"
        model.source.allow_patterns.append("*.safetensors")
        model.config.backend = "transformers"
        model.config.device = "devices/sim-0"
        model.config.max_batch_size = 8
        model.config.keep_alive.FromMilliseconds(1500)
        model.config.load_on_demand = False
        model.config.isolation = models_pb2.ModelConfig.PROCESS
        model.config.backend_options.update({"a": 1, "b": [True, None, "x"], "c": {"d": 0.5}})
        model.requirements.device_bytes = 7
        model.requirements.packages.append("sentencepiece>=0.2")
        made = await it.tcp.models.CreateModel(pb.CreateModelRequest(model=model), timeout=CALL_S)
        assert made.name == NAME
        for field in ("display_name", "labels", "task", "base_model", "config", "requirements"):
            assert getattr(made, field) == getattr(model, field), field
        assert (made.source.uri, made.source.revision) == ("hf://org/MiniLM", "v1")
        assert made.state == models_pb2.Artifact.ABSENT
        assert made.etag
        assert made.uid
        assert made.HasField("create_time")
        got = await it.user.models.GetModel(pb.GetModelRequest(name=NAME), timeout=CALL_S)
        assert got == made


async def test_a_revision_in_the_uri_moves_beside_it(tmp_path: Path) -> None:
    """hf://org/name@rev is stored as the canonical URI and its revision."""
    async with served(tmp_path) as it:
        request = pb.CreateModelRequest(model_id="a")
        request.model.source.uri = "hf://org/name@main"
        made = await it.tcp.models.CreateModel(request, timeout=CALL_S)
        assert (made.source.uri, made.source.revision) == ("hf://org/name", "main")


async def test_a_repeated_request_id_gets_the_first_answer(tmp_path: Path) -> None:
    """The same request twice makes one model; the same id with other content is refused."""
    async with served(tmp_path) as it:
        request = pb.CreateModelRequest(model=_created(), request_id="6f1c")
        first = await it.tcp.models.CreateModel(request, timeout=CALL_S)
        assert await it.tcp.models.CreateModel(request, timeout=CALL_S) == first
        request.model.display_name = "another"
        found = await failure(it.tcp.models.CreateModel(request))
        assert (found.reason, found.metadata) == ("REQUEST_ID_REUSED", {"requestId": "6f1c"})
        assert len(it.host.models.list()) == 1


async def test_models_are_listed_by_name_in_pages(tmp_path: Path) -> None:
    """Pages continue by token, each says the sequence, and together they have every model once."""
    async with served(tmp_path) as it:
        for name in ("c", "a", "d", "b", "e"):
            await it.add(name)
        names, token, pages = [], "", 0
        while True:
            request = pb.ListModelsRequest(page_size=2, page_token=token)
            page = await it.tcp.models.ListModels(request, timeout=CALL_S)
            assert page.sequence == it.host.registry.journal.last_sequence
            assert page.store_id == it.host.registry.store_id
            names += [m.name for m in page.models]
            pages += 1
            token = page.next_page_token
            if not token:
                break
        assert names == [f"models/{m}" for m in "abcde"]
        assert pages == 3


async def test_a_page_stays_below_256_kib(tmp_path: Path) -> None:
    """Models with long texts make shorter pages, and none is lost."""
    async with served(tmp_path) as it:
        for number in range(60):
            request = pb.CreateModelRequest(model_id=f"m{number:02d}", model=_created())
            request.model.description = "d" * 4096
            request.model.display_name = "n" * 4096
            await it.tcp.models.CreateModel(request, timeout=CALL_S)
        names, token = [], ""
        while True:
            request = pb.ListModelsRequest(page_size=1000, page_token=token)
            page = await it.tcp.models.ListModels(request, timeout=CALL_S)
            assert page.ByteSize() < 256 * 1024
            names += [m.name for m in page.models]
            token = page.next_page_token
            if not token:
                break
        assert names == [f"models/m{number:02d}" for number in range(60)]


async def test_models_are_found_by_task_state_label_and_load(tmp_path: Path) -> None:
    """Each filter narrows the list, an empty label value means any, and filters narrow each other."""
    async with served(tmp_path) as it:
        await it.have("loaded")
        await it.load("loaded")
        await it.add("plain")
        labelled = models_pb2.Model(name="models/plain", labels={"team": "search"})
        await _update(it, labelled, "labels")

        async def found(**filters: Any) -> list[str]:
            page = await it.tcp.models.ListModels(pb.ListModelsRequest(**filters), timeout=CALL_S)
            return [m.name.removeprefix("models/") for m in page.models]

        state = models_pb2.Artifact
        assert await found() == ["loaded", "plain"]
        assert await found(task="feature-extraction") == ["loaded"]
        assert await found(states=[state.AVAILABLE]) == ["loaded"]
        assert await found(states=[state.ABSENT, state.FAILED]) == ["plain"]
        assert await found(labels={"team": ""}) == ["plain"]
        assert await found(labels={"team": "search"}) == ["plain"]
        assert await found(labels={"team": "x"}) == []
        assert await found(loaded_only=True) == ["loaded"]
        assert await found(loaded_only=True, states=[state.ABSENT]) == []


async def test_an_update_writes_what_the_mask_names(tmp_path: Path) -> None:
    """Named fields change, unnamed ones stay, a named one without a value is cleared."""
    async with served(tmp_path) as it:
        before = await it.tcp.models.CreateModel(
            pb.CreateModelRequest(
                model=_created(display_name="one", description="two", labels={"a": "b"})
            ),
            timeout=CALL_S,
        )
        model = models_pb2.Model(name=NAME, display_name="new", description="ignored")
        model.config.keep_alive.seconds = 60
        model.config.priority = 5
        after = await _update(it, model, "display_name", "config.keep_alive", "labels", "state")
        assert (after.display_name, after.description) == ("new", "two")
        assert not after.labels
        assert after.config.keep_alive.seconds == 60
        assert after.config.priority == 0
        assert after.etag != before.etag
        cleared = await _update(it, models_pb2.Model(name=NAME), "config.keep_alive")
        assert not cleared.config.HasField("keep_alive")


async def test_an_update_without_a_mask_writes_what_is_populated(tmp_path: Path) -> None:
    """Zeroes of plain fields mean "not given"; optional fields count as given when they are present."""
    async with served(tmp_path) as it:
        await it.add()
        model = models_pb2.Model(name=NAME, display_name="new")
        model.config.load_on_demand = False
        after = await _update(it, model)
        assert after.display_name == "new"
        assert after.config.HasField("load_on_demand")
        assert after.source.uri == "hf://org/minilm"


async def test_a_star_replaces_all_that_can_be_written(tmp_path: Path) -> None:
    """`*` clears what has no value, and leaves the source's place and output-only fields alone."""
    async with served(tmp_path) as it:
        await it.add()
        await _update(it, models_pb2.Model(name=NAME, labels={"a": "b"}, licence="mit"))
        model = models_pb2.Model(name=NAME, task="other", pinned=True)
        model.source.revision = "v2"
        after = await _update(it, model, "*")
        assert (after.licence, dict(after.labels), after.task) == ("", {}, "other")
        assert (after.source.uri, after.source.revision) == ("hf://org/minilm", "v2")
        assert not after.pinned


async def test_an_update_that_changes_nothing_is_no_change(tmp_path: Path) -> None:
    """Same etag, no event; and an update of many paths is one event."""
    async with served(tmp_path) as it:
        before = await it.add()
        sequence = it.host.registry.journal.last_sequence
        assert await _update(it, before, "*") == before
        assert await _update(it, before) == before
        assert it.host.registry.journal.last_sequence == sequence


async def test_a_stale_etag_loses(tmp_path: Path) -> None:
    """Of two updates from the same state one wins, the other is ETAG_MISMATCH with both etags."""
    async with served(tmp_path) as it:
        before = await it.add()
        before.display_name = "first"
        after = await _update(it, before)
        before.display_name = "second"
        found = await failure(it.tcp.models.UpdateModel(pb.UpdateModelRequest(model=before)))
        assert found.reason == "ETAG_MISMATCH"
        assert found.metadata["actual"] == after.etag
        assert it.host.models.get("minilm").display_name == "first"


async def test_files_are_downloaded_listed_verified_and_deleted(tmp_path: Path) -> None:
    """The way of a model's files to disk and off it again, with the numbers on the way."""
    async with served(tmp_path) as it:
        model = await it.have()
        assert model.state == models_pb2.Artifact.AVAILABLE
        assert model.artifacts[0].size_bytes == 400
        listed = await it.tcp.models.ListModelFiles(
            pb.ListModelFilesRequest(model=NAME, page_size=1), timeout=CALL_S
        )
        assert [f.path for f in listed.files] == ["config.json"]
        assert listed.files[0].local_path.startswith(listed.local_path)
        assert listed.version == 1
        rest = await it.tcp.models.ListModelFiles(
            pb.ListModelFilesRequest(model=NAME, page_size=1, page_token=listed.next_page_token),
            timeout=CALL_S,
        )
        assert [f.path for f in rest.files] == ["model.safetensors"]
        assert not rest.next_page_token
        again = await it.tcp.models.DownloadModel(
            pb.DownloadModelRequest(name=NAME), timeout=CALL_S
        )
        assert again.state == operations_pb2.Operation.SUCCEEDED
        assert again.download_result.model == NAME
        assert again.download_result.reused_bytes == 400
        it.running.world.files.flip("minilm", 1, "config.json")
        verified = await it.end(
            await it.tcp.models.VerifyModel(pb.VerifyModelRequest(name=NAME), timeout=CALL_S)
        )
        assert [f.kind for f in verified.verify_result.findings] == ["corrupt_file"]
        assert verified.verify_result.file_count == 2
        (finding,) = verified.verify_result.findings
        damaged = await it.tcp.models.GetModel(pb.GetModelRequest(name=NAME), timeout=CALL_S)
        assert damaged.state == models_pb2.Artifact.QUARANTINED
        assert damaged.artifacts[0].error.reason == "CHECKSUM_MISMATCH"
        assert damaged.artifacts[0].error.metadata["actual"] == finding.actual_sha256
        assert (await it.have_again()).artifacts[0].state == models_pb2.Artifact.AVAILABLE
        deleted = await it.end(
            await it.tcp.models.DeleteModelFiles(
                pb.DeleteModelFilesRequest(model=NAME, version=1), timeout=CALL_S
            )
        )
        assert deleted.delete_result.freed_bytes > 0
        assert it.host.models.get("minilm").state.value == "ABSENT"


async def test_a_loaded_model_is_deleted_by_force_only(tmp_path: Path) -> None:
    """MODEL_LOADED without force; with it, it is drained, freed and gone; a repeat has the same answer."""
    async with served(tmp_path) as it:
        await it.have()
        await it.load()
        found = await failure(it.tcp.models.DeleteModel(pb.DeleteModelRequest(name=NAME)))
        assert found.reason == "MODEL_LOADED"
        assert found.details["PreconditionFailure"].violations[0].type == "MODEL_LOADED"
        request = pb.DeleteModelRequest(name=NAME, force=True, request_id="once")
        done = await it.end(await it.tcp.models.DeleteModel(request, timeout=CALL_S))
        assert not it.running.workers.resident
        assert (await failure(it.tcp.models.GetModel(pb.GetModelRequest(name=NAME)))).reason == (
            "MODEL_NOT_FOUND"
        )
        repeated = await it.tcp.models.DeleteModel(request, timeout=CALL_S)
        assert repeated.name == done.name


async def test_a_source_is_inspected_without_registering(tmp_path: Path) -> None:
    """InspectSource answers files, sizes, skipped files, the id and the mapped task."""
    async with served(tmp_path) as it:
        it.running.world.downloads.add(
            "hf://org/MiniLM",
            {"config.json": b"{}", "model.safetensors": b"w" * 10, "model.bin": b"p"},
            task="sentence-similarity",
            licence="mit",
            gated=True,
        )
        request = pb.InspectSourceRequest()
        request.source.uri = "hf://org/MiniLM"
        answer = await it.tcp.models.InspectSource(request, timeout=CALL_S)
        assert [f.path for f in answer.files] == ["config.json", "model.safetensors"]
        assert (answer.file_count, answer.size_bytes) == (2, 12)
        assert [f.path for f in answer.skipped_files] == ["model.bin"]
        assert (answer.model_id, answer.task, answer.source_task) == (
            "minilm",
            "feature-extraction",
            "sentence-similarity",
        )
        assert answer.gated
        assert not it.host.models.list()


@pytest.mark.parametrize(
    ("change", "failed"),
    [
        ({}, set()),
        ({"device_bytes": 5000}, {"device_memory"}),
        ({"compute_capability": "8.0"}, {"compute_capability"}),
        ({"packages": ["absent>=1"]}, {"packages"}),
        ({"packages": ["present>=2"]}, {"packages"}),
        ({"packages": ["present>=1,<2"]}, set()),
    ],
    ids=["fits", "memory", "capability", "missing", "older", "present"],
)
async def test_compatibility_is_told_with_numbers(
    tmp_path: Path, change: dict[str, Any], failed: set[str]
) -> None:
    """Each requirement is one check; what fails says what is needed and what is there."""
    async with served(
        tmp_path,
        installed=lambda name: {"present": "1.5"}.get(name, ""),
        backends=lambda: [Backend("identity", ["*"])],
    ) as it:
        await it.add()
        model = models_pb2.Model(name=NAME, requirements=models_pb2.Requirements(**change))
        await _update(it, model, "requirements")
        answer = await it.tcp.models.CheckCompatibility(
            pb.CheckCompatibilityRequest(model=NAME), timeout=CALL_S
        )
        outcomes = pb.CheckCompatibilityResponse.Check
        assert {c.id for c in answer.checks if c.outcome == outcomes.FAILED} == failed
        assert answer.compatible is not bool(failed)
        assert answer.device == "devices/sim-0"
        for check in answer.checks:
            assert check.message
            if check.outcome == outcomes.FAILED:
                assert check.needed
