"""pull: models are registered where they are new, and taken as they are where they are not."""

import grpc
import pytest

from modelhost import AlreadyExists, Client, InvalidArgument
from modelhost.v1 import models_pb2, operations_pb2
from tests.client.double import Double, failure
from tests.client.told import RUNNING

Model = models_pb2.Model
Operation = operations_pb2.Operation
DONE = Operation(name="operations/1", state="SUCCEEDED")


def taken(name: str):
    return failure(grpc.StatusCode.ALREADY_EXISTS, "ALREADY_EXISTS", metadata={"name": name})


def test_pull_registers_what_is_new(double: Double, both) -> None:
    """An unknown source is registered under the id that the daemon derives, then downloaded."""
    double.on("CreateModel", Model(name="models/n"))
    double.on("DownloadModel", DONE)
    both(lambda c: c.pull("hf://o/N", task="other"))
    (created,) = double.requests("CreateModel")
    assert (created.model.source.uri, created.model_id, created.model.task) == (
        "hf://o/N",
        "",
        "other",
    )
    assert [r.name for r in double.requests("DownloadModel")] == ["models/n"]


@pytest.mark.parametrize(
    ("asked", "uri", "revision"),
    [
        ("hf://o/N", "hf://o/N", ""),
        ("HF://o/N@v1", "hf://o/N", "v1"),
        ("ollama://library/q:0.6b", "ollama://q", "0.6b"),
        ("github://o/r@v1/a.bin", "github://o/r/a.bin", "v1"),
        ("https://h/a.bin", "https://h/a.bin", ""),
    ],
)
def test_pull_again_is_no_error(double: Double, both, asked, uri, revision) -> None:
    """A model of the same id and source is downloaded, not registered twice."""
    double.on("CreateModel", taken("models/n"))
    stored = Model(name="models/n", source=models_pb2.Source(uri=uri, revision=revision))
    double.on("GetModel", stored)
    double.on("DownloadModel", DONE)
    both(lambda c: c.pull(asked, "n"))
    assert [r.name for r in double.requests("DownloadModel")] == ["models/n"]


@pytest.mark.parametrize("asked", ["hf://o/N", "n", "models/n"])
def test_pull_sets_the_task_of_what_is_registered(double: Double, both, asked) -> None:
    """A task that is asked for is the model's from then on, by source or by id."""
    double.on("CreateModel", taken("models/n"))
    stored = Model(name="models/n", source=models_pb2.Source(uri="hf://o/N"), task="other")
    double.on("GetModel", stored)
    double.on("UpdateModel", stored)
    double.on("DownloadModel", DONE)
    both(lambda c: c.pull(asked, task="text-generation"))
    (changed,) = double.requests("UpdateModel")
    assert (changed.model.name, changed.model.task) == ("models/n", "text-generation")
    assert list(changed.update_mask.paths) == ["task"]
    assert len(double.requests("DownloadModel")) == 1


@pytest.mark.parametrize("name", ["models/n", "slots/n"])
def test_pull_does_not_take_another_models_id(double: Double, both, name) -> None:
    """An id that belongs to another source, another revision or a slot is AlreadyExists with a way out."""
    double.on("CreateModel", taken(name))
    stored = Model(name="models/n", source=models_pb2.Source(uri="hf://o/N", revision="old"))
    double.on("GetModel", stored)
    with pytest.raises(AlreadyExists) as caught:
        both(lambda c: c.pull("hf://o/N@new", "n"))
    assert "--name" in caught.value.hint
    assert double.requests("DownloadModel") == []


@pytest.mark.parametrize(
    "argument",
    ["name", "revision", "more_uris", "allow_patterns", "ignore_patterns"],
)
def test_a_registered_model_has_its_name_and_files(
    double: Double, client: Client, argument
) -> None:
    """What a model is registered with is refused for one that is addressed by id, before any call."""
    with pytest.raises(InvalidArgument) as caught:
        client.pull("a", **{argument: "b" if argument in ("name", "revision") else ["b"]})
    assert caught.value.metadata["field"] == argument
    assert double.calls == []


@pytest.mark.parametrize("other", [{"allow_patterns": ["*.b"]}, {"ignore_patterns": ["x"]}])
def test_pull_does_not_change_which_files_a_model_has(double: Double, both, other) -> None:
    """The patterns of a registered model may be repeated; others are AlreadyExists, with those that it has."""
    double.on("CreateModel", taken("models/n"))
    source = models_pb2.Source(uri="hf://o/N", allow_patterns=["*.a"], ignore_patterns=["y", "z"])
    double.on("GetModel", Model(name="models/n", source=source))
    double.on("DownloadModel", DONE)
    both(lambda c: c.pull("hf://o/N", "n", allow_patterns=["*.a"]))
    both(lambda c: c.pull("hf://o/N", "n", allow_patterns=["*.a"], ignore_patterns=["y", "z"]))
    assert len(double.requests("DownloadModel")) == 2
    with pytest.raises(
        AlreadyExists, match=r"models/n takes \*\.a without y z of hf://o/N"
    ) as caught:
        both(lambda c: c.pull("hf://o/N", "n", **other))
    assert "--name" in caught.value.hint
    assert len(double.requests("DownloadModel")) == 2


def test_a_download_that_is_joined_gets_what_was_asked(double: Double, both) -> None:
    """Priority and limit go to the download that runs already; one that has them, or has ended, is left alone."""
    double.on("DownloadModel", RUNNING)
    double.on("LoadModel", RUNNING)
    double.on("UpdateOperation", DONE)
    done = both(lambda c: c.pull("n", priority=7, rate_limit_bytes_per_second=9))
    (changed,) = double.requests("UpdateOperation")
    assert changed.operation.name == RUNNING.name
    assert (changed.operation.priority, changed.operation.rate_limit_bytes_per_second) == (7, 9)
    assert list(changed.update_mask.paths) == ["priority", "rate_limit_bytes_per_second"]
    assert done.operation == DONE
    double.on("DownloadModel", DONE)
    both(lambda c: c.pull("n", priority=7))
    double.on("DownloadModel", Operation(name=RUNNING.name, priority=7, state=Operation.RUNNING))
    both(lambda c: c.pull("n", priority=7, wait=False))
    assert len(double.requests("UpdateOperation")) == 1
    both(lambda c: c.load("n", priority=7))
    assert len(double.requests("UpdateOperation")) == 2
