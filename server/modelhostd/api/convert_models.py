"""Models as messages of ``modelhost.v1``: what is registered, its source, its config and its artifacts."""

from collections.abc import Mapping
from typing import Any

from google.protobuf import struct_pb2

from modelhost.v1 import models_pb2
from modelhostd.api.convert_values import duration, error, named, timestamp
from modelhostd.core.resources import (
    Artifact,
    ArtifactState,
    Isolation,
    Model,
    ModelConfig,
    ModelFile,
    Requirements,
    Source,
)

_pb = models_pb2

ARTIFACT_STATES = {s: _pb.Artifact.State.Value(s.name) for s in ArtifactState}
ISOLATIONS = {i: _pb.ModelConfig.Isolation.Value(i.name) for i in Isolation}


def source(given: Source) -> models_pb2.Source:
    """Return a source."""
    return _pb.Source(
        uri=given.uri,
        revision=given.revision,
        allow_patterns=given.allow_patterns,
        ignore_patterns=given.ignore_patterns,
        more_uris=given.more_uris,
    )


def model(given: Model) -> models_pb2.Model:
    """Return a model with its artifacts."""
    return _pb.Model(
        name=named("models", given.id),
        uid=given.uid,
        display_name=given.display_name,
        description=given.description,
        labels=given.labels,
        licence=given.licence,
        source=source(given.source) if given.source.uri else None,
        task=given.task,
        config=config(given.config),
        requirements=requirements(given.requirements),
        base_model=named("models", given.base_model),
        pinned=given.pinned,
        artifacts=[artifact(a) for a in given.artifacts],
        state=ARTIFACT_STATES[given.state],
        etag=given.etag,
        create_time=timestamp(given.create_time),
        update_time=timestamp(given.update_time),
    )


def config(given: ModelConfig) -> models_pb2.ModelConfig:
    """Return a model's config; what is None stays unset."""
    made = _pb.ModelConfig(
        backend=given.backend,
        device=named("devices", given.device),
        precision=given.precision,
        max_batch_size=given.max_batch_size,
        max_sequence_length=given.max_sequence_length,
        keep_alive=duration(given.keep_alive_s),
        load_timeout=duration(given.load_timeout_s),
        load_on_demand=given.load_on_demand,
        autoload=given.autoload,
        priority=given.priority,
        queue_limit=given.queue_limit,
        isolation=ISOLATIONS[given.isolation],
        host_keep_alive=duration(given.host_keep_alive_s),
        fallback_model=named("models", given.fallback_model),
        max_batch_delay=duration(given.max_batch_delay_s),
        dynamic_batching=given.dynamic_batching,
    )
    if given.backend_options:
        made.backend_options.CopyFrom(_struct(given.backend_options))
    return made


def requirements(given: Requirements) -> models_pb2.Requirements:
    """Return what a model says that it needs."""
    return _pb.Requirements(
        device_bytes=given.device_bytes,
        compute_capability=given.compute_capability,
        packages=given.packages,
    )


def artifact(given: Artifact) -> models_pb2.Artifact:
    """Return one revision of a model's files."""
    return _pb.Artifact(
        version=given.version,
        state=ARTIFACT_STATES[given.state],
        revision=given.revision,
        size_bytes=given.size_bytes,
        file_count=given.file_count,
        predicted_bytes=given.predicted_bytes,
        create_time=timestamp(given.create_time),
        available_time=timestamp(given.available_time),
        operation=named("operations", given.operation),
        error=error(given.error) if given.error is not None else None,
        verify_time=timestamp(given.verify_time),
    )


def model_file(given: ModelFile, local_path: str) -> models_pb2.ModelFile:
    """Return one file with where it is on this machine."""
    return _pb.ModelFile(
        path=given.path, size_bytes=given.size_bytes, sha256=given.sha256, local_path=local_path
    )


def _struct(value: Mapping[str, Any]) -> struct_pb2.Struct:
    made = struct_pb2.Struct()
    made.update(dict(value))
    return made
