"""Files of artifacts that the registry has let go of, and that a crash kept from being deleted. Pure."""

from collections.abc import Collection, Mapping, Sequence

from modelhostd.core.resources import Artifact, ArtifactState, OperationKind, OperationState
from modelhostd.core.state import State

_KEPT = frozenset(
    {
        ArtifactState.AVAILABLE,
        ArtifactState.QUEUED,
        ArtifactState.DOWNLOADING,
        ArtifactState.VERIFYING,
        ArtifactState.PAUSED,
    }
)
"""What is served, or what a download is about to replace."""


def suspects(state: State) -> Collection[str]:
    """Return the models that may have such files: more artifacts of them were made than are kept.

    A model that is gone is among them while a DELETE of it has not ended well.
    """
    models = {m.id for m in state.models.values() if m.last_version > sum(map(_kept, m.artifacts))}
    return models | _half_deleted(state)


def leftovers(state: State, on_disk: Mapping[str, Sequence[int]]) -> Sequence[tuple[str, int]]:
    """Return the artifacts (model, version) on disk that the registry once knew and let go of.

    What it never knew is not among them: it may have been restored from an older copy.
    """
    gone = _half_deleted(state)
    found: list[tuple[str, int]] = []
    for key, versions in on_disk.items():
        model = state.models.get(key)
        if model is None:
            found += [(key, version) for version in versions if key in gone]
            continue
        kept = {artifact.version for artifact in model.artifacts if _kept(artifact)}
        found += [(key, v) for v in versions if v <= model.last_version and v not in kept]
    return found


def _kept(artifact: Artifact) -> bool:
    return artifact.state in _KEPT


def _half_deleted(state: State) -> Collection[str]:
    return {
        o.model
        for o in state.operations.values()
        if o.kind is OperationKind.DELETE
        and o.state is not OperationState.SUCCEEDED
        and o.model not in state.models
    }
