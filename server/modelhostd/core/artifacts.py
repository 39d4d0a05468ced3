"""What the way of a download means for the artifact that it fills.

Pure: each function takes the state as it is and returns edits. A download and its artifact change together,
in one commit; the artifact names its operation while that works on it.
"""

from collections.abc import Collection, Sequence
from dataclasses import replace

from modelhostd.core import operations as op_rules
from modelhostd.core import registry as rules
from modelhostd.core import tasks
from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.resources import (
    FINAL_STATES,
    Artifact,
    ArtifactState,
    Model,
    Operation,
    OperationKind,
    OperationState,
)
from modelhostd.core.state import Edit, State
from modelhostd.core.uploads import UPLOAD
from modelhostd.core.values import dataclass

BRINGING = frozenset({OperationKind.DOWNLOAD, OperationKind.UPLOAD})
"""Operations that bring files."""
_ACTIVE = frozenset(
    {ArtifactState.QUEUED, ArtifactState.DOWNLOADING, ArtifactState.VERIFYING, ArtifactState.PAUSED}
)


@dataclass(frozen=True, slots=True)
class Arrived:
    """What a download brought: enough to describe the artifact."""

    revision: str
    size_bytes: int
    file_count: int
    predicted_bytes: int
    task: str = ""
    config_task: str = ""
    """The task that its ``config.json`` tells."""
    tags: Sequence[str] = ()
    licence: str = ""


def artifact_of(state: State, operation: str) -> tuple[Model, Artifact] | None:
    """Return the artifact that an operation works on, and its model."""
    known = state.operations.get(operation)
    model = state.models.get(known.model) if known is not None else None
    if model is None:
        return None
    found = next((a for a in model.artifacts if a.operation == operation), None)
    return (model, found) if found is not None else None


def fetched_already(model: Model, *, allow_unsafe: bool = False) -> Artifact | None:
    """Return the newest artifact if it came whole from the model's source; None = there is a reason to
    fetch, also where a newer one was found damaged, or the newest one came without what ``allow_unsafe`` brings.
    """
    have, last = model.newest, model.artifacts[-1] if model.artifacts else None
    damaged = last is not None and last.state is ArtifactState.QUARANTINED
    if have is None or have.source != model.source or damaged:
        return None
    return have if have.allow_unsafe or not allow_unsafe else None


def wanted(model: Model, operation: Operation, *, allow_unsafe: bool = False) -> Sequence[Edit]:
    """Return the edits that give the model the artifact a new download will fill.

    Raises WRONG_STATE for a model without a source, CONFLICTING_OPERATION during an upload.
    """
    if not model.source.uri:
        raise ModelhostError(
            Reason.WRONG_STATE,
            f"model '{model.id}' has no source to download from: its files are uploaded "
            "(UploadModelFiles, `modelhost upload`)",
            {"name": f"models/{model.id}", "state": model.state.value},
        )
    refuse_other_work(model)
    changed, artifact = rules.wanted_artifact(
        model, operation.id, operation.create_time, allow_unsafe=allow_unsafe
    )
    return [rules.model_edit(changed, "DOWNLOAD_QUEUED", version=str(artifact.version))]


def wanted_upload(model: Model, operation: Operation) -> Sequence[Edit]:
    """Return the edits that give the model the artifact an upload will fill.

    Raises CONFLICTING_OPERATION while another upload or a download is under way.
    """
    refuse_other_work(model)
    changed, artifact = rules.wanted_artifact(model, operation.id, operation.create_time)
    artifact = replace(artifact, source=UPLOAD)
    changed = replace(changed, artifacts=(*changed.artifacts[:-1], artifact))
    return [rules.model_edit(changed, "UPLOAD_STARTED", version=str(artifact.version))]


def refuse_other_work(model: Model) -> None:
    """Raise CONFLICTING_OPERATION while files of the model are on their way."""
    last = model.artifacts[-1] if model.artifacts else None
    if last is not None and last.state in _ACTIVE:
        raise ModelhostError(
            Reason.CONFLICTING_OPERATION,
            f"files of model '{model.id}' are on their way already (operation '{last.operation}'); "
            "wait for its end, or cancel it, then try again",
            {"model": model.id, "operation": last.operation},
        )


def moved(state: State, operation: str, to: ArtifactState, reason: str) -> Sequence[Edit]:
    """Return the edits that set the operation's artifact to another state of its way."""
    found = artifact_of(state, operation)
    if found is None:
        return ()
    model, artifact = found
    changed = rules.with_artifact(model, artifact.version, to, error=None)
    return [rules.model_edit(changed, reason)]


def short_of_room(state: State, operation: str, error: ModelhostError) -> Sequence[Edit]:
    """Return the edits that pause the operation's artifact until there is room on disk."""
    found = artifact_of(state, operation)
    if found is None:
        return ()
    model, artifact = found
    paused = rules.with_artifact(
        model, artifact.version, ArtifactState.PAUSED, error=op_rules.stored(error)
    )
    return [rules.model_edit(paused, error.reason.value, **error.metadata)]


def waiting_for_room(state: State) -> Sequence[tuple[Operation, int]]:
    """Return the paused downloads that go on when there is room, in the order of the queue, and the
    bytes that each needs. Those that somebody paused are not among them.
    """
    found = []
    for operation in state.operations.values():
        paused = operation.state is OperationState.PAUSED
        held = artifact_of(state, operation.id) if paused else None
        if held is not None and (error := held[1].error) is not None:
            found.append((operation, int(error.metadata.get("neededBytes", "0"))))
    return sorted(found, key=lambda item: (-item[0].priority, item[0].create_time))


def dropped(state: State, operation: str, reason: str) -> Sequence[Edit]:
    """Return the edits that take the operation's artifact away: nothing of it is visible any more."""
    found = artifact_of(state, operation)
    if found is None:
        return ()
    model, artifact = found
    kept = tuple(a for a in model.artifacts if a.version != artifact.version)
    return [rules.model_edit(replace(model, artifacts=kept), reason)]


def failed(
    state: State, operation: str, error: ModelhostError, reason: str = "DOWNLOAD_FAILED"
) -> Sequence[Edit]:
    """Return the edits that end the operation's artifact FAILED, or QUARANTINED for wrong bytes."""
    found = artifact_of(state, operation)
    if found is None:
        return ()
    model, artifact = found
    changed = rules.failed_artifact(
        model,
        artifact.version,
        op_rules.stored(error),
        quarantined=error.reason is Reason.CHECKSUM_MISMATCH,
    )
    return [rules.model_edit(changed, reason, cause=error.reason.value)]


def accepted(
    state: State, operation: str, arrived: Arrived, now: float
) -> tuple[Model, Artifact, Sequence[int]]:
    """Return the model with its new artifact, that artifact, and the versions whose files may go.

    The revision that is there already is not kept twice, unless files came that may only now. The operation must have
    an artifact.
    """
    found = artifact_of(state, operation)
    assert found is not None
    model, artifact = found
    if artifact.state is ArtifactState.DOWNLOADING:
        model = rules.with_artifact(model, artifact.version, ArtifactState.VERIFYING)
    before = model.newest
    if before is not None and _same(before, artifact, arrived):
        # From now on it is known that there are no others.
        before = replace(before, allow_unsafe=before.allow_unsafe or artifact.allow_unsafe)
        others = (a for a in model.artifacts if a.version != artifact.version)
        kept = tuple(before if a.version == before.version else a for a in others)
        return replace(model, artifacts=kept), before, [artifact.version]
    model = rules.with_artifact(
        model,
        artifact.version,
        ArtifactState.AVAILABLE,
        revision=arrived.revision,
        size_bytes=arrived.size_bytes,
        file_count=arrived.file_count,
        predicted_bytes=arrived.predicted_bytes,
        available_time=now,
        operation="",
        error=None,
    )
    model = replace(
        model,
        task=model.task or tasks.task_told(arrived.task, arrived.tags, arrived.config_task),
        licence=model.licence or arrived.licence,
    )
    in_use = {i.artifact_version for i in state.instances_of(model.id)} | {model.chosen_version}
    model, gone = rules.superseded(model, in_use)
    newest = model.newest
    assert newest is not None
    return model, newest, gone


def _same(before: Artifact, artifact: Artifact, arrived: Arrived) -> bool:
    """Whether what arrived is there already."""
    if (before.revision, before.source) != (arrived.revision, artifact.source):
        return False
    if before.allow_unsafe or not artifact.allow_unsafe:
        return True
    return (before.file_count, before.size_bytes) == (arrived.file_count, arrived.size_bytes)


def superfluous(state: State) -> tuple[Sequence[tuple[str, int]], Sequence[Edit]]:
    """Return the artifacts (model, version) that are neither current nor kept for rollback nor in use,
    and the edits that take them out of the registry.
    """
    removed: list[tuple[str, int]] = []
    edits: list[Edit] = []
    for model in state.models.values():
        in_use = {i.artifact_version for i in state.instances_of(model.id)} | {model.chosen_version}
        kept, gone = rules.superseded(model, in_use)
        if gone:
            removed += [(model.id, version) for version in gone]
            edits.append(rules.model_edit(kept, "PRUNED"))
    return removed, edits


def downloading(state: State) -> Collection[str]:
    """Return the models that an unfinished download or upload works on or will go on with."""
    return {
        operation.model
        for operation in state.operations.values()
        if operation.kind in BRINGING and operation.state not in FINAL_STATES
    }


def recovered(state: State) -> Sequence[Edit]:
    """Return the edits that put the artifacts of the last run's downloads back where these are.

    ``state`` has the operations as they are after the restart: queued again, paused, or ended.
    """
    edits: list[Edit] = []
    for model in state.models.values():
        artifacts = tuple(
            _recovered(state, model, a) for a in model.artifacts if not _cancelled(state, a)
        )
        if artifacts != model.artifacts:
            changed = replace(model, artifacts=artifacts)
            edits.append(rules.model_edit(changed, "DAEMON_RESTARTED"))
    return edits


def _cancelled(state: State, artifact: Artifact) -> bool:
    operation = state.operations.get(artifact.operation)
    return operation is not None and operation.state is OperationState.CANCELLED


def _recovered(state: State, model: Model, artifact: Artifact) -> Artifact:
    if artifact.state not in _ACTIVE:
        return artifact
    operation = state.operations.get(artifact.operation)
    if operation is None or operation.state in FINAL_STATES:
        # Its operation is lost: no way of the table leads here.
        error = op_rules.stored(_lost(model, artifact))
        return replace(artifact, state=ArtifactState.FAILED, error=error, operation="")
    if artifact.state is ArtifactState.PAUSED:
        return artifact
    return replace(artifact, state=ArtifactState.QUEUED)


def _lost(model: Model, artifact: Artifact) -> ModelhostError:
    return ModelhostError(
        Reason.DAEMON_RESTARTED,
        f"the daemon restarted while version {artifact.version} of model '{model.id}' was on its "
        f"way; download it again, what is there is kept",
        {"operation": artifact.operation},
    )
