"""Downloads and their artifacts: they move together, and a restart puts each where it belongs."""

from dataclasses import replace

import pytest

from modelhostd.core import artifacts
from modelhostd.core import operations as op_rules
from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.resources import (
    Artifact,
    ArtifactState,
    Kind,
    Model,
    Operation,
    OperationKind,
    OperationState,
    Source,
)
from modelhostd.core.state import Edit, State

SOURCE = Source("hf://org/a")
ARRIVED = artifacts.Arrived("r1", 10, 2, 5, task="sentence-similarity", licence="mit")


def state_with(operation: OperationState, artifact: ArtifactState) -> State:
    """Return a state with one model, one artifact and one download, which belong together."""
    state = State()
    download = Operation("o", OperationKind.DOWNLOAD, operation, 1.0, model="a")
    made = Artifact(1, artifact, operation="o", source=SOURCE)
    model = Model("a", "uid", SOURCE, 1.0, 1.0, artifacts=(made,), last_version=1)
    state.apply(Edit(Kind.OPERATION, "o", download))
    state.apply(Edit(Kind.MODEL, "a", model))
    return state


def apply(state: State, edits: object) -> Model:
    for edit in edits:  # type: ignore[attr-defined]
        state.apply(edit)
    return state.models["a"]


def test_a_download_on_its_way() -> None:
    """The artifact follows its download from the queue to what it brought."""
    state = state_with(OperationState.QUEUED, ArtifactState.QUEUED)
    for to in (ArtifactState.DOWNLOADING, ArtifactState.VERIFYING):
        model = apply(state, artifacts.moved(state, "o", to, to.value))
        assert model.artifacts[0].state is to
    model, have, gone = artifacts.accepted(state, "o", ARRIVED, 9.0)
    assert gone == []
    assert (have.revision, have.size_bytes, have.file_count) == ("r1", 10, 2)
    assert (have.predicted_bytes, have.available_time, have.operation) == (5, 9.0, "")
    assert (model.task, model.licence) == ("feature-extraction", "mit")


def test_what_the_owner_said_is_kept() -> None:
    """Task and licence of the source fill in what the model does not say itself."""
    state = state_with(OperationState.RUNNING, ArtifactState.DOWNLOADING)
    state.apply(Edit(Kind.MODEL, "a", replace(state.models["a"], task="other", licence="own")))
    model, _, _ = artifacts.accepted(state, "o", ARRIVED, 9.0)
    assert (model.task, model.licence) == ("other", "own")


@pytest.mark.parametrize(
    ("reason", "expected"),
    [
        (Reason.NETWORK_ERROR, ArtifactState.FAILED),
        (Reason.CHECKSUM_MISMATCH, ArtifactState.QUARANTINED),
    ],
)
def test_a_download_that_fails(reason: Reason, expected: ArtifactState) -> None:
    """The artifact says what its download said, and belongs to no operation any more."""
    state = state_with(OperationState.RUNNING, ArtifactState.DOWNLOADING)
    error = ModelhostError(reason, "no", {})
    artifact = apply(state, artifacts.failed(state, "o", error)).artifacts[0]
    assert (artifact.state, artifact.operation) == (expected, "")
    assert artifact.error == op_rules.stored(error)


def test_what_belongs_to_no_download_is_left_alone() -> None:
    """An operation that is unknown, or whose model or artifact is gone, changes nothing."""
    state = state_with(OperationState.RUNNING, ArtifactState.DOWNLOADING)
    error = ModelhostError(Reason.OFFLINE, "no")
    for edit in (
        Edit(Kind.MODEL, "a", replace(state.models["a"], artifacts=())),
        Edit(Kind.MODEL, "a", None),
        Edit(Kind.OPERATION, "o", None),
    ):
        state.apply(edit)
        assert artifacts.artifact_of(state, "o") is None
        assert not artifacts.moved(state, "o", ArtifactState.PAUSED, "PAUSED")
        assert not artifacts.dropped(state, "o", "CANCELLED")
        assert not artifacts.failed(state, "o", error)


@pytest.mark.parametrize(
    ("operation", "artifact", "expected"),
    [
        (OperationState.QUEUED, ArtifactState.QUEUED, ArtifactState.QUEUED),
        (OperationState.QUEUED, ArtifactState.DOWNLOADING, ArtifactState.QUEUED),
        (OperationState.QUEUED, ArtifactState.VERIFYING, ArtifactState.QUEUED),
        (OperationState.PAUSED, ArtifactState.PAUSED, ArtifactState.PAUSED),
        (OperationState.FAILED, ArtifactState.DOWNLOADING, ArtifactState.FAILED),
        (OperationState.CANCELLED, ArtifactState.DOWNLOADING, None),
        (None, ArtifactState.PAUSED, ArtifactState.FAILED),
        (None, ArtifactState.AVAILABLE, ArtifactState.AVAILABLE),
    ],
)
def test_after_a_restart(
    operation: OperationState | None, artifact: ArtifactState, expected: ArtifactState | None
) -> None:
    """Each artifact on its way is where its operation is, or FAILED where that is lost; once."""
    state = state_with(operation or OperationState.QUEUED, artifact)
    if operation is None:
        state.apply(Edit(Kind.OPERATION, "o", None))
    model = apply(state, artifacts.recovered(state))
    assert [a.state for a in model.artifacts] == ([expected] if expected is not None else [])
    assert not artifacts.recovered(state)


def test_the_same_revision_is_not_kept_twice() -> None:
    """A download that finds what is there drops its own artifact, unless it was of another source."""
    state = state_with(OperationState.RUNNING, ArtifactState.DOWNLOADING)
    model = state.models["a"]
    have = Artifact(1, ArtifactState.AVAILABLE, revision="r1", source=SOURCE)
    new = replace(model.artifacts[0], version=2)
    state.apply(Edit(Kind.MODEL, "a", replace(model, artifacts=(have, new), last_version=2)))
    kept, artifact, gone = artifacts.accepted(state, "o", ARRIVED, 9.0)
    assert (kept.artifacts, artifact, gone) == ((have,), have, [2])
    other = replace(have, source=Source("hf://org/b"))
    state.apply(Edit(Kind.MODEL, "a", replace(model, artifacts=(other, new), last_version=2)))
    kept, artifact, gone = artifacts.accepted(state, "o", ARRIVED, 9.0)
    assert ([a.version for a in kept.artifacts], artifact.version, gone) == ([1, 2], 2, [])
