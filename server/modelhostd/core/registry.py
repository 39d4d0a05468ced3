"""Models: how they are registered, changed, given artifacts and removed.

Functions take the model as it is and return the model as it will be; nothing here stores anything.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import field, fields, replace
from typing import Any

from modelhostd.core.errors import ModelhostError, Reason, invalid
from modelhostd.core.lifecycle import ARTIFACT, step
from modelhostd.core.names import check_id
from modelhostd.core.resources import (
    LIVE_CONFIG_FIELDS,
    Artifact,
    ArtifactState,
    Kind,
    Model,
    ModelConfig,
    Requirements,
    Source,
    StoredError,
)
from modelhostd.core.state import Edit, State
from modelhostd.core.values import dataclass

KEPT_ARTIFACTS = 2
MODELS_MAX = 10_000
LABELS_MAX = 64
TEXT_MAX = 4096
LABEL_MAX = 256
PATTERNS_MAX = 64
OPTIONS_MAX = 64
PRECISIONS = frozenset({"", "fp32", "fp16", "bf16"})
QUEUE_LIMIT_MAX = 65_536
SECONDS_MAX = 10 * 365 * 86_400.0
BATCH_DELAY_S_MAX = 10


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """The client-writable fields of a model."""

    source: Source
    display_name: str = ""
    description: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    licence: str = ""
    task: str = ""
    config: ModelConfig = field(default_factory=ModelConfig)
    requirements: Requirements = field(default_factory=Requirements)
    base_model: str = ""


SPEC_FIELDS = tuple(f.name for f in fields(ModelSpec))
CONFIG_FIELDS = tuple(f.name for f in fields(ModelConfig))


def check_spec(spec: ModelSpec) -> None:
    """Raise INVALID_ARGUMENT for a field out of its bounds; the source is checked where it is parsed."""
    for name in ("display_name", "description", "licence", "task"):
        _text(f"model.{name}", getattr(spec, name), TEXT_MAX)
    if len(spec.labels) > LABELS_MAX:
        raise invalid("model.labels", f"at most {LABELS_MAX} labels", len(spec.labels))
    for key, value in spec.labels.items():
        if not key:
            raise invalid("model.labels", "keys of 1 character or more", key)
        _text("model.labels", key, LABEL_MAX)
        _text("model.labels", value, LABEL_MAX)
    for name in ("allow_patterns", "ignore_patterns"):
        patterns: Sequence[str] = getattr(spec.source, name)
        if len(patterns) > PATTERNS_MAX:
            raise invalid(f"model.source.{name}", f"at most {PATTERNS_MAX} patterns", len(patterns))
        for pattern in patterns:
            _text(f"model.source.{name}", pattern, LABEL_MAX)
    _text("model.source.revision", spec.source.revision, LABEL_MAX)
    if spec.base_model:
        check_id("model.base_model", spec.base_model)
    check_config(spec.config)


def check_config(config: ModelConfig) -> None:
    """Raise INVALID_ARGUMENT for a config field out of its range."""
    if config.precision not in PRECISIONS:
        raise invalid("model.config.precision", "fp32, fp16, bf16 or empty", config.precision)
    for name, low, high in (
        ("max_batch_size", 1, 65_536),
        ("max_sequence_length", 1, 16_777_216),
        ("queue_limit", 1, QUEUE_LIMIT_MAX),
        ("keep_alive_s", -SECONDS_MAX, SECONDS_MAX),
        ("host_keep_alive_s", -SECONDS_MAX, SECONDS_MAX),
        ("load_timeout_s", 0.001, SECONDS_MAX),
        ("max_batch_delay_s", 0, BATCH_DELAY_S_MAX),
    ):
        value = getattr(config, name)
        # NaN compares false with everything: the range must be asked for, not its opposite.
        if value is not None and not (low <= value <= high):
            # Named as in the contract, where the type says the unit.
            expected = f"{low} to {high}"
            raise invalid(f"model.config.{name.removesuffix('_s')}", expected, value)
    if not -100 <= config.priority <= 100:
        raise invalid("model.config.priority", "-100 to 100", config.priority)
    _text("model.config.backend", config.backend, 64)
    if config.device:
        check_id("model.config.device", config.device)
    if config.fallback_model:
        check_id("model.config.fallback_model", config.fallback_model)
    _options("model.config.backend_options", config.backend_options, depth=4)


def create(
    state: State, key: str, uid: str, spec: ModelSpec, now: float, devices: Collection[str]
) -> Model:
    """Return a new model, or raise ALREADY_EXISTS, INVALID_ARGUMENT or DEVICE_NOT_FOUND."""
    check_id("model_id", key)
    check_spec(spec)
    check_fallback(key, spec.config)
    check_device(spec.config, devices)
    if key in state.models or key in state.slots:
        raise ModelhostError(
            Reason.ALREADY_EXISTS,
            f"model or slot '{key}' exists already; choose another id (model_id, `--name`) "
            f"or use the one that is there",
            {"name": f"models/{key}"},
        )
    if len(state.models) >= MODELS_MAX:
        raise invalid("model_id", f"at most {MODELS_MAX} models", len(state.models) + 1)
    return Model(
        id=key,
        uid=uid,
        create_time=now,
        update_time=now,
        **{name: getattr(spec, name) for name in SPEC_FIELDS},
    )


def check_fallback(key: str, config: ModelConfig) -> None:
    """Raise INVALID_ARGUMENT for a model that is to stand in for itself."""
    if config.fallback_model == key:
        raise invalid("model.config.fallback_model", "another model than this one", key)


def check_device(config: ModelConfig, devices: Collection[str]) -> None:
    """Raise INVALID_ARGUMENT when a config names a device that this machine lacks."""
    if config.device and config.device not in devices:
        raise invalid("model.config.device", "one of " + ", ".join(sorted(devices)), config.device)


def update(model: Model, spec: ModelSpec, etag: str, now: float, devices: Collection[str]) -> Model:
    """Return the model with all client-writable fields of ``spec``.

    An ``etag`` that is not empty must be the model's own, else ETAG_MISMATCH.
    """
    check_etag(f"models/{model.id}", etag, model.etag)
    check_spec(spec)
    check_fallback(model.id, spec.config)
    check_device(spec.config, devices)
    changed = replace(model, **{name: getattr(spec, name) for name in SPEC_FIELDS})
    if changed == model:
        return model
    return replace(changed, update_time=now, edit=model.edit + 1)


def check_etag(name: str, given: str, current: str) -> None:
    """Raise ETAG_MISMATCH when an etag is given and stale."""
    if given and given != current:
        raise ModelhostError(
            Reason.ETAG_MISMATCH,
            f"{name} was changed since it was read (etag {given!r}, now {current!r}); "
            f"read it again and repeat the change",
            {"name": name, "expected": given[:100], "actual": current},
        )


def spec_of(model: Model) -> ModelSpec:
    """Return the client-writable fields of a model."""
    return ModelSpec(**{name: getattr(model, name) for name in SPEC_FIELDS})


def needs_reload(old: ModelConfig, new: ModelConfig) -> bool:
    """Whether an instance loaded with ``old`` is stale under ``new``."""
    return any(
        getattr(old, name) != getattr(new, name)
        for name in CONFIG_FIELDS
        if name not in LIVE_CONFIG_FIELDS
    )


# --- artifacts ----------------------------------------------------------------------------------


def wanted_artifact(
    model: Model, operation: str, now: float, *, allow_unsafe: bool = False
) -> tuple[Model, Artifact]:
    """Return the model with the artifact that a download will fill, QUEUED.

    A failed, paused or absent newest one is tried again under its version; else a new version rises.
    """
    last = model.artifacts[-1] if model.artifacts else None
    retry = last is not None and last.state is not ArtifactState.AVAILABLE
    version = last.version if last is not None and retry else model.last_version + 1
    artifact = Artifact(
        version=version,
        state=ArtifactState.QUEUED,
        create_time=now,
        operation=operation,
        source=model.source,
        allow_unsafe=allow_unsafe,
    )
    kept = model.artifacts[:-1] if retry else model.artifacts
    return (
        replace(model, artifacts=(*kept, artifact), last_version=max(version, model.last_version)),
        artifact,
    )


def with_artifact(model: Model, version: int, state: ArtifactState, **changes: Any) -> Model:
    """Return the model with one artifact in another state and with other changes to it."""

    def changed(artifact: Artifact) -> Artifact:
        if artifact.version != version:
            return artifact
        return replace(artifact, state=step(ARTIFACT, artifact.state, state), **changes)

    return replace(model, artifacts=tuple(changed(a) for a in model.artifacts))


def failed_artifact(model: Model, version: int, error: StoredError, quarantined: bool) -> Model:
    """Return the model with one artifact ended by an error; a retry keeps what is there."""
    state = ArtifactState.QUARANTINED if quarantined else ArtifactState.FAILED
    return with_artifact(model, version, state, error=error, operation="")


def superseded(model: Model, in_use: Collection[int]) -> tuple[Model, Sequence[int]]:
    """Return the model with only the newest artifacts, and the versions whose files may go.

    The newest ``KEPT_ARTIFACTS`` available ones stay for rollback, and any that an instance uses; a
    damaged one goes when there is a newer one that is whole.
    """
    available = [a.version for a in model.artifacts if a.state is ArtifactState.AVAILABLE]
    newest = max(available, default=0)
    damaged = [
        a.version
        for a in model.artifacts
        if a.state is ArtifactState.QUARANTINED and a.version < newest
    ]
    drop = [v for v in sorted([*available[:-KEPT_ARTIFACTS], *damaged]) if v not in in_use]
    kept = tuple(a for a in model.artifacts if a.version not in drop)
    return replace(model, artifacts=kept), drop


def choose_version(model: Model, version: int) -> Model:
    """Return the model with the version that loads take: 0 or the newest = always the newest one.

    Raises MODEL_NOT_DOWNLOADED for one that is not on disk.
    """
    artifact = artifact_at(model, version)
    newest = version == 0 or artifact is model.newest
    return replace(model, chosen_version=0 if newest else version)


def artifact_at(model: Model, version: int) -> Artifact:
    """Return an AVAILABLE artifact (0 = the one that loads take), or raise MODEL_NOT_DOWNLOADED."""
    have = {a.version: a for a in model.artifacts if a.state is ArtifactState.AVAILABLE}
    found = have.get(version) if version else model.available
    if found is not None:
        return found
    if not have:
        raise not_downloaded(model)
    raise ModelhostError(
        Reason.MODEL_NOT_DOWNLOADED,
        f"model '{model.id}' has no version {version} on disk; it has "
        f"{', '.join(map(str, have))} (0 takes the newest)",
        {"model": model.id, "state": model.state.value},
    )


def model_edit(model: Model, reason: str, **details: str) -> Edit:
    """Return the edit that stores a model."""
    return Edit(Kind.MODEL, model.id, model, reason, details)


def not_downloaded(model: Model) -> ModelhostError:
    """Return MODEL_NOT_DOWNLOADED with the state the files are in."""
    return ModelhostError(
        Reason.MODEL_NOT_DOWNLOADED,
        f"model '{model.id}' has no files on disk yet (state {model.state.value}); "
        f"download it first (DownloadModel, `modelhost pull`)",
        {"model": model.id, "state": model.state.value},
    )


def _text(field_path: str, value: str, limit: int) -> None:
    if len(value) > limit:
        raise invalid(field_path, f"at most {limit} characters", f"{len(value)} characters")
    if "\x00" in value:
        raise invalid(field_path, "text without NUL", value)


def _options(field_path: str, value: Any, depth: int) -> None:
    """Check a JSON-like value: bounded in depth, entries and text."""
    if depth < 0:
        raise invalid(field_path, "at most 4 levels", "more levels")
    if isinstance(value, str):
        _text(field_path, value, TEXT_MAX)
    elif isinstance(value, float) and not math.isfinite(value):
        raise invalid(field_path, "finite numbers", value)
    elif isinstance(value, Mapping):
        if len(value) > OPTIONS_MAX:
            raise invalid(field_path, f"at most {OPTIONS_MAX} entries", len(value))
        for key, item in value.items():
            _text(field_path, str(key), LABEL_MAX)
            _options(f"{field_path}.{str(key)[:64]}", item, depth - 1)
    elif isinstance(value, Sequence):
        if len(value) > OPTIONS_MAX:
            raise invalid(field_path, f"at most {OPTIONS_MAX} entries", len(value))
        for item in value:
            _options(field_path, item, depth - 1)
