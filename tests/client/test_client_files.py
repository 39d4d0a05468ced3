"""Uploading files of this machine, and comparing models with their sources, by both clients."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from modelhost import InvalidArgument, ModelhostError
from modelhost._freshness import Freshness
from modelhost.v1 import model_service_pb2 as pb
from modelhost.v1 import models_pb2
from tests.client.conftest import Both
from tests.client.double import Double, failure

DATA = bytes(range(256)) * 2000
AVAILABLE = models_pb2.Artifact.AVAILABLE


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a model, and what does not belong to it."""
    made = tmp_path / "mine"
    (made / "nested").mkdir(parents=True)
    (made / ".git").mkdir()
    (made / ".git" / "HEAD").write_text("x")
    (made / "config.json").write_text("{}")
    (made / "nested" / "data.txt").write_bytes(DATA)
    (made / "left.out").write_text("x")
    return made


class Taking:
    """What a daemon does with uploads: tells what it has, then takes the rest."""

    def __init__(self, have: int = 0) -> None:
        self.have = have
        self.streams: list[list[Any]] = []

    def __call__(self, requests: Any, context: Any) -> pb.UploadModelFilesResponse:
        messages = list(requests)
        self.streams.append(messages)
        if not messages[0].start.dry_run:
            artifact = models_pb2.Artifact(version=3, state=AVAILABLE, file_count=2, size_bytes=9)
            model = models_pb2.Model(name="models/mine", artifacts=[artifact])
            return pb.UploadModelFilesResponse(model=model, version=3)
        files = [
            {"path": m.file.path, "have_bytes": self.have if m.file.path.endswith("txt") else 0}
            for m in messages[1:]
        ]
        return pb.UploadModelFilesResponse(files=files)


def test_an_upload_sends_what_is_not_there(both: Both, double: Double, folder: Path) -> None:
    """Files by their digests, the rest of one from its offset, commit at the end; progress to 100 %."""
    taking = Taking(have=1000)
    double.on("UploadModelFiles", taking)
    double.on("GetModel", models_pb2.Model(name="models/mine"))
    seen: list[Any] = []
    done = both(
        lambda c: c.upload("mine", [folder], exclude=["left.*"], revision="r", progress=seen.append)
    )
    assert done.version == 3
    question, stream = taking.streams
    assert [m.file.path for m in question[1:]] == ["config.json", "nested/data.txt"]
    assert question[2].file.sha256 == hashlib.sha256(DATA).hexdigest()
    assert stream[0].start.total_bytes == 2 + len(DATA) - 1000
    assert (stream[0].start.revision, bool(stream[0].start.request_id)) == ("r", True)
    assert b"".join(m.chunk for m in stream) == b"{}" + DATA[1000:]
    assert max(len(m.chunk) for m in stream) <= 192 * 1024
    (begun,) = [m.file for m in stream if m.file.path == "nested/data.txt"]
    assert begun.offset_bytes == 1000
    assert stream[-1].commit
    assert seen[-1].progress.done_bytes == seen[-1].progress.total_bytes == len(DATA) + 2


def test_an_upload_sets_the_task_of_what_is_registered(
    both: Both, double: Double, folder: Path
) -> None:
    """One that is asked for is the model's from then on; without one, or with its own, nothing is changed."""
    double.on("UploadModelFiles", Taking())
    double.on("GetModel", models_pb2.Model(name="models/mine", task="other"))
    double.on("UpdateModel", models_pb2.Model(name="models/mine"))
    for task in ("", "other", "text-classification"):
        both(lambda c, task=task: c.upload("mine", [folder], task=task))
    (changed,) = double.requests("UpdateModel")
    assert (changed.model.name, changed.model.task) == ("models/mine", "text-classification")


def test_an_upload_registers_a_model_that_is_new(both: Both, double: Double, folder: Path) -> None:
    """Without a source, with its task."""
    double.on("UploadModelFiles", Taking())
    double.on("GetModel", failure(grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND"))
    double.on("CreateModel", models_pb2.Model(name="models/mine"))
    both(lambda c: c.upload("mine", [folder / "config.json"], task="other"))
    (request,) = double.requests("CreateModel")
    assert (request.model_id, request.model.task) == ("mine", "other")
    assert not request.model.HasField("source")


def test_what_cannot_be_uploaded_is_told_before_any_call(
    both: Both, double: Double, folder: Path
) -> None:
    """Nothing left by the patterns, two files of one path, a file that is not there."""
    with pytest.raises(InvalidArgument, match="at least one file"):
        both(lambda c: c.upload("mine", [folder], include=["*.nothing"]))
    with pytest.raises(InvalidArgument, match="one file for config"):
        both(lambda c: c.upload("mine", [folder, folder / "config.json"]))
    with pytest.raises(FileNotFoundError):
        both(lambda c: c.upload("mine", [folder / "gone"]))
    assert double.calls == []


def test_a_file_that_goes_away_on_the_way_ends_without_commit(
    both: Both, double: Double, folder: Path
) -> None:
    """The caller gets the OSError; the daemon gets no commit."""
    streams: list[list[Any]] = []

    def take(requests: Any, context: Any) -> Any:
        messages = list(requests)
        streams.append(messages)
        if messages[0].start.dry_run:
            (folder / "nested" / "data.txt").unlink()
            return pb.UploadModelFilesResponse()
        return failure(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_ARGUMENT")(messages[0], context)

    double.on("UploadModelFiles", take)
    double.on("GetModel", models_pb2.Model(name="models/mine"))
    with pytest.raises(FileNotFoundError):
        both(lambda c: c.upload("mine", [folder]))
    assert not any(message.commit for message in streams[-1])


def test_an_upload_that_is_refused_while_it_is_sent_says_why(
    both: Both, double: Double, folder: Path
) -> None:
    """The daemon's own words, each time: grpc.aio puts its own over a status that meets a message on its way."""
    (folder / "nested" / "data.txt").write_bytes(DATA * 8)

    def take(requests: Iterator[Any], context: Any) -> Any:
        if next(requests).start.dry_run:
            return pb.UploadModelFilesResponse()
        next(requests)
        return failure(grpc.StatusCode.RESOURCE_EXHAUSTED, "INSUFFICIENT_DISK_SPACE")(None, context)

    double.streamed.add("UploadModelFiles")
    double.on("UploadModelFiles", take)
    double.on("GetModel", models_pb2.Model(name="models/mine"))
    for _ in range(40):
        with pytest.raises(ModelhostError) as caught:
            both(lambda c: c.upload("mine", [folder]))
        assert caught.value.reason == "INSUFFICIENT_DISK_SPACE", caught.value


def test_what_the_progress_raises_ends_the_upload(both: Both, double: Double, folder: Path) -> None:
    """It comes out of the call as it is, and the daemon gets no commit."""
    taking = Taking()
    double.on("UploadModelFiles", taking)
    double.on("GetModel", models_pb2.Model(name="models/mine"))

    def report(operation: Any) -> None:
        if operation.progress.phase == 0:
            raise LookupError("no more")

    with pytest.raises(LookupError):
        both(lambda c: c.upload("mine", [folder / "nested"], progress=report))
    assert not taking.streams[-1][-1].commit


def _model(name: str, uri: str, *revisions: str) -> models_pb2.Model:
    model = models_pb2.Model(name=f"models/{name}")
    if uri:
        model.source.uri = uri
    for version, revision in enumerate(revisions, start=1):
        model.artifacts.add(version=version, revision=revision, state=AVAILABLE)
    return model


@pytest.fixture
def aged(double: Double) -> Double:
    """A daemon with a model of each kind."""
    models = [
        _model("absent", "hf://org/a"),
        _model("current", "hf://org/a", "old", "new"),
        _model("down", "hf://org/down", "x"),
        _model("outdated", "hf://org/a", "old"),
        _model("uploaded", "", "abc"),
    ]

    def inspect(request: Any, context: Any) -> Any:
        if request.source.uri == "hf://org/down":
            return failure(grpc.StatusCode.UNAVAILABLE, "NETWORK_ERROR")(request, context)
        return pb.InspectSourceResponse(revision="new")

    double.on("ListModels", pb.ListModelsResponse(models=models))
    double.on("GetModel", models[1])
    double.on("InspectSource", inspect)
    return double


def test_outdated_compares_each_model_with_its_source(both: Both, aged: Double) -> None:
    """Each source is asked once; one that fails is told, and stops nothing."""
    found = both(lambda c: c.outdated())
    assert [(c.model.partition("/")[2], c.freshness.value) for c in found] == [
        ("absent", "absent"),
        ("current", "current"),
        ("down", "unknown"),
        ("outdated", "outdated"),
        ("uploaded", "no source"),
    ]
    assert found[2].error.reason == "NETWORK_ERROR"
    assert len(aged.requests("InspectSource")) == 2
    (one,) = both(lambda c: c.outdated(["current"]))
    assert (one.freshness, one.revision, one.newest) == (Freshness.CURRENT, "new", "new")


def test_the_command_says_by_its_exit_code_what_is_outdated(aged: Double, run: Any) -> None:
    """1 for a source that could not be asked, 5 for an outdated model, 0 for neither."""
    done = run("outdated")
    assert done.exit_code == 1
    assert "outdated" in done.output
    assert run("outdated", "current").exit_code == 0
    aged.on("GetModel", _model("old", "hf://org/a", "old"))
    done = run("outdated", "old", "--json")
    assert done.exit_code == 5
    assert json.loads(done.stdout)[0]["freshness"] == "OUTDATED"


def test_the_command_uploads(double: Double, run: Any, folder: Path) -> None:
    """It says what the version is; --json gives the contract's answer."""
    double.on("UploadModelFiles", Taking())
    double.on("GetModel", models_pb2.Model(name="models/mine"))
    done = run("upload", "mine", str(folder))
    assert done.exit_code == 0, done.output
    assert "upload mine: 2 files, 9 B, version 3" in done.output
    lines = run("upload", "mine", str(folder), "--json").stdout.splitlines()
    assert json.loads(lines[-1])["version"] == "3"
    assert run("upload", "mine", str(folder / "gone")).exit_code == 2
