"""Which files on disk are of artifacts that the registry has let go of."""

from modelhostd.core.leftovers import leftovers, suspects
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
from modelhostd.core.state import State


def model(key: str, last: int, *states: ArtifactState) -> Model:
    """Return a model whose newest versions have these states, the last one being ``last``."""
    first = last - len(states) + 1
    artifacts = tuple(Artifact(first + i, state) for i, state in enumerate(states))
    return Model(
        key, f"uid-{key}", Source("hf://o/m"), 1, 1, artifacts=artifacts, last_version=last
    )


def deletion(key: str, state: OperationState) -> Operation:
    return Operation(f"delete-{key}", OperationKind.DELETE, state, 1, model=key)


def state_of(*resources: Model | Operation) -> State:
    state = State()
    for resource in resources:
        kind = Kind.MODEL if isinstance(resource, Model) else Kind.OPERATION
        state.put(kind, resource.id, resource)
    return state


def told(state: State, on_disk: dict[str, list[int]]) -> list[tuple[str, int, bool]]:
    return [(left.model, left.version, left.wanted) for left in leftovers(state, on_disk)]


def test_what_is_not_shown_is_left_over() -> None:
    """Superseded and cancelled versions; and, wanted, what a download had published without its row."""
    states = ArtifactState
    state = state_of(
        model("a", 4, states.AVAILABLE, states.AVAILABLE),
        model("b", 2, states.FAILED),
        *(model(s.value.lower(), 1, s) for s in (states.QUEUED, states.PAUSED, states.AVAILABLE)),
    )
    on_disk = {key: [1, 2, 3, 4] for key in "ab"} | {"queued": [1], "paused": [1], "available": [1]}
    assert told(state, on_disk) == [
        ("a", 1, False),
        ("a", 2, False),
        ("b", 1, False),
        ("b", 2, True),
        ("queued", 1, True),
        ("paused", 1, True),
    ]
    assert suspects(state) == {"a", "b", "queued", "paused"}


def test_what_the_registry_never_knew_is_nobodys_to_delete() -> None:
    """Versions above the last one, and models of which no deletion is known, stay."""
    state = state_of(
        model("a", 1, ArtifactState.AVAILABLE), deletion("c", OperationState.SUCCEEDED)
    )
    assert told(state, {"a": [1, 2], "b": [1], "c": [1]}) == []
    assert suspects(state) == set()


def test_a_deletion_that_did_not_end_well_is_finished() -> None:
    """All files of a model that is gone, but nothing of one that was made again under its name."""
    state = state_of(
        deletion("a", OperationState.FAILED),
        deletion("b", OperationState.RUNNING),
        model("b", 1, ArtifactState.AVAILABLE),
    )
    assert told(state, {"a": [1, 7], "b": [1]}) == [("a", 1, False), ("a", 7, False)]
    assert suspects(state) == {"a"}
