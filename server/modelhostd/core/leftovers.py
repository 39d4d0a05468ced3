"""Files on disk of artifacts that are not to be seen: a crash came between the files and their row. Pure."""

from collections.abc import Mapping, Sequence

from modelhostd.core.resources import ArtifactState, Model, OperationKind, OperationState
from modelhostd.core.state import State
from modelhostd.core.values import dataclass


@dataclass(frozen=True, slots=True)
class Leftover:
    """Files of one artifact. ``wanted``: a download was to bring them, and may go on from their bytes."""

    model: str
    version: int
    wanted: bool


def suspects(state: State) -> set[str]:
    """Return the models that may have such files: more artifacts of them were made than are kept.

    A model that is gone is among them while a DELETE of it has not ended well.
    """
    models = {m.id for m in state.models.values() if m.last_version > len(_available(m))}
    return models | _half_deleted(state)


def leftovers(state: State, on_disk: Mapping[str, Sequence[int]]) -> Sequence[Leftover]:
    """Return the artifacts on disk that the registry once knew and does not show.

    What it never knew is not among them: it may have been restored from an older copy.
    """
    gone = _half_deleted(state)
    found: list[Leftover] = []
    for key, versions in on_disk.items():
        model = state.models.get(key)
        if model is None:
            found += [Leftover(key, v, wanted=False) for v in versions if key in gone]
            continue
        shown = _available(model)
        wanted = {a.version for a in model.artifacts} - shown
        found += [
            Leftover(key, v, wanted=v in wanted)
            for v in versions
            if v <= model.last_version and v not in shown
        ]
    return found


def _available(model: Model) -> set[int]:
    return {a.version for a in model.artifacts if a.state is ArtifactState.AVAILABLE}


def _half_deleted(state: State) -> set[str]:
    return {
        o.model
        for o in state.operations.values()
        if o.kind is OperationKind.DELETE
        and o.state is not OperationState.SUCCEEDED
        and o.model not in state.models
    }
