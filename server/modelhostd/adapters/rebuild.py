"""A lost registry, made again from the manifests that lie beside the models' files.

What comes back: every model with its source, names, labels, configuration and artifacts. What does not:
slots, pins, settings, operations and the log of events; the new database has a new ``store_id``, so that
subscribers notice.
"""

import contextlib
import os
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from modelhostd.adapters.database_file import DatabaseFile, log_path
from modelhostd.core import registry, tasks
from modelhostd.core.errors import ModelhostError
from modelhostd.core.manifest import Manifest
from modelhostd.core.registry import ModelSpec
from modelhostd.core.resources import (
    Artifact,
    ArtifactState,
    Event,
    Kind,
    Model,
    Source,
    StoredError,
)
from modelhostd.core.uploads import UPLOAD
from modelhostd.ports import Batch, Change

REASON = "REBUILT"
_SUFFIX = ".rebuilt"


def models_of(
    manifests: Sequence[Manifest],
    broken: Mapping[tuple[str, int], StoredError],
    config_tasks: Mapping[tuple[str, int], str],
    now: float,
) -> Sequence[Model]:
    """Return one model for each id in ``manifests``, its artifacts oldest first.

    The newest manifest says what the model is, and where its source did not tell the task, that artifact's
    ``config_tasks``. ``broken`` has the artifacts whose files are not what their manifest says: these are FAILED, and a
    download repairs them.
    """
    by_model: dict[str, list[Manifest]] = {}
    for manifest in sorted(manifests, key=lambda m: (m.model, m.version)):
        by_model.setdefault(manifest.model, []).append(manifest)
    return [_model(found, broken, config_tasks, now) for found in by_model.values()]


def _model(
    manifests: Sequence[Manifest],
    broken: Mapping[tuple[str, int], StoredError],
    config_tasks: Mapping[tuple[str, int], str],
    now: float,
) -> Model:
    newest = manifests[-1]
    config_task = config_tasks.get((newest.model, newest.version), "")
    spec = _spec(newest)
    model = Model(
        id=newest.model,
        uid=str(newest.entry.get("uid") or uuid.uuid4()),
        create_time=_time(newest.entry.get("create_time"), manifests[0].create_time),
        update_time=now,
        artifacts=tuple(_artifact(m, broken.get((m.model, m.version))) for m in manifests),
        last_version=newest.version,
        **{name: getattr(spec, name) for name in registry.SPEC_FIELDS},
    )
    return replace(
        model,
        task=model.task or tasks.task_told(newest.source_task, newest.tags, config_task),
        licence=model.licence or newest.licence,
    )


def _spec(manifest: Manifest) -> ModelSpec:
    try:
        spec = msgspec.convert(manifest.entry, ModelSpec)
        registry.check_spec(spec)
    except (msgspec.ValidationError, ModelhostError):
        # Written by another version or by hand: the source alone makes it usable.
        uploaded = manifest.source == UPLOAD
        return ModelSpec(source=Source("") if uploaded else manifest.source)
    return spec


def _time(value: object, otherwise: float) -> float:
    return float(value) if type(value) in {int, float} else otherwise  # type: ignore[arg-type]


def _artifact(manifest: Manifest, error: StoredError | None) -> Artifact:
    return Artifact(
        version=manifest.version,
        state=ArtifactState.AVAILABLE if error is None else ArtifactState.FAILED,
        revision=manifest.revision,
        size_bytes=manifest.size_bytes,
        file_count=len(manifest.files),
        predicted_bytes=manifest.predicted_bytes,
        create_time=manifest.create_time,
        available_time=manifest.create_time,
        error=error,
        source=manifest.source,
    )


def write(path: Path, models: Sequence[Model], now: float) -> Path | None:
    """Make a database with these models at ``path``; what was there is moved aside, never deleted.

    Returns where it was moved, None if nothing was there. A crash on the way leaves the old database,
    or none (which the daemon refuses until this ran again), never a half-made one.
    """
    made = path.with_name(path.name + _SUFFIX)
    for leftover in (made, log_path(made)):
        leftover.unlink(missing_ok=True)
    file = DatabaseFile(made, fresh=True)
    file.open()
    try:
        for sequence, model in enumerate(models, start=1):
            event = Event(sequence, now, Kind.MODEL, model.id, model, REASON, created=True)
            file.commit(Batch((Change(Kind.MODEL, model.id, model),), (event,)))
    finally:
        file.close()
    aside = _move_aside(path, now)
    made.rename(path)
    _sync(path.parent)
    return aside


def _move_aside(path: Path, now: float) -> Path | None:
    stamp = datetime.fromtimestamp(now, UTC).strftime("%Y%m%dT%H%M%SZ")
    aside = path.with_name(f"{path.name}.broken-{stamp}")
    number = 1
    while aside.exists() or log_path(aside).exists():
        number += 1
        aside = path.with_name(f"{path.name}.broken-{stamp}-{number}")
    moved = False
    # The database goes first: its log alone is refused, the database without its log would be an
    # older state that looks sound.
    for old, new in ((path, aside), (log_path(path), log_path(aside))):
        with contextlib.suppress(FileNotFoundError):
            old.rename(new)
            moved = True
    _sync(path.parent)
    return aside if moved else None


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
