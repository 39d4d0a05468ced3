"""Resources as messages of ``modelhost.v1``. Nothing is decided here, and nothing is looked up.

Names on the wire are full (``models/minilm``); inside they are ids. A time of 0.0 is an unset Timestamp,
a duration of None an unset Duration. Enums have the same value names on both sides, so they map by name.
"""

from collections.abc import Mapping
from typing import Any

from google.protobuf import struct_pb2
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from modelhost.v1 import (
    devices_pb2,
    errors_pb2,
    events_pb2,
    instances_pb2,
    models_pb2,
    operations_pb2,
    settings_pb2,
    slots_pb2,
)
from modelhostd.api import convert_results
from modelhostd.core.errors import REASONS, Reason
from modelhostd.core.resources import (
    Artifact,
    ArtifactState,
    Device,
    DeviceKind,
    Event,
    Health,
    Instance,
    InstanceState,
    Isolation,
    Kind,
    Lease,
    Model,
    ModelConfig,
    ModelFile,
    Operation,
    OperationKind,
    OperationState,
    Phase,
    Progress,
    Requirements,
    Resource,
    Settings,
    Slot,
    Source,
    StoredError,
    Tier,
)

_pb = models_pb2

# By name, once: on the way of every event.
ARTIFACT_STATES = {s: _pb.Artifact.State.Value(s.name) for s in ArtifactState}
ISOLATIONS = {i: _pb.ModelConfig.Isolation.Value(i.name) for i in Isolation}
INSTANCE_STATES = {s: instances_pb2.Instance.State.Value(s.name) for s in InstanceState}
TIERS = {t: instances_pb2.Instance.Tier.Value(t.name) for t in Tier}
HEALTHS = {h: instances_pb2.Health.Status.Value(h.name) for h in Health}
OPERATION_KINDS = {k: operations_pb2.Operation.Kind.Value(k.name) for k in OperationKind}
OPERATION_STATES = {s: operations_pb2.Operation.State.Value(s.name) for s in OperationState}
PHASES = {
    p: operations_pb2.OperationProgress.Phase.Value(
        "PHASE_UNSPECIFIED" if p is Phase.NONE else p.name
    )
    for p in Phase
}
DEVICE_KINDS = {k: devices_pb2.Device.Kind.Value(k.name) for k in DeviceKind}
RESOURCE_KINDS = {k: events_pb2.Resource.Kind.Value(k.name) for k in Kind}


# --- names and times ----------------------------------------------------------------------------


def name_of(kind: Kind, key: str) -> str:
    """Return the resource name of a key: (INSTANCE, ``minilm/3``) -> ``models/minilm/instances/3``."""
    if kind is Kind.INSTANCE:
        model, _, instance = key.partition("/")
        return instance_name(model, instance)
    return "settings" if kind is Kind.SETTINGS else f"{kind.value}/{key}"


def instance_name(model: str, instance: str) -> str:
    """Return the resource name of an instance."""
    return f"models/{model}/instances/{instance}"


def named(collection: str, key: str) -> str:
    """Return the resource name of an id; an empty id stays empty."""
    return f"{collection}/{key}" if key else ""


def timestamp(time: float) -> Timestamp | None:
    """Return seconds since the epoch as a Timestamp; 0.0 is no time."""
    if not time:
        return None
    nanos = round(time * 1e9)
    return Timestamp(seconds=nanos // 1_000_000_000, nanos=nanos % 1_000_000_000)


def duration(seconds: float | None) -> Duration | None:
    """Return seconds as a Duration; None is no duration."""
    if seconds is None:
        return None
    made = Duration()
    made.FromNanoseconds(round(seconds * 1e9))
    return made


def error(stored: StoredError) -> errors_pb2.Error:
    """Return an error as a resource remembers it."""
    code = REASONS[Reason(stored.reason)].code if stored.reason in Reason.__members__ else 0
    return errors_pb2.Error(
        reason=stored.reason,
        code=errors_pb2.Error.Code.ValueType(int(code)),
        message=stored.message,
        metadata=stored.metadata,
        retry_delay=duration(stored.retry_delay_s),
    )


# --- models -------------------------------------------------------------------------------------


def source(given: Source) -> models_pb2.Source:
    """Return a source."""
    return _pb.Source(
        uri=given.uri,
        revision=given.revision,
        allow_patterns=given.allow_patterns,
        ignore_patterns=given.ignore_patterns,
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
        source=source(given.source),
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
    )


def model_file(given: ModelFile, local_path: str) -> models_pb2.ModelFile:
    """Return one file with where it is on this machine."""
    return _pb.ModelFile(
        path=given.path, size_bytes=given.size_bytes, sha256=given.sha256, local_path=local_path
    )


# --- instances, devices, slots, leases, settings ------------------------------------------------


def instance(
    given: Instance, activity: instances_pb2.InstanceActivity | None = None
) -> instances_pb2.Instance:
    """Return an instance; ``activity`` only in answers to Get, List and Check."""
    return instances_pb2.Instance(
        name=instance_name(given.model, given.id),
        model=named("models", given.model),
        generation=given.generation,
        device=named("devices", given.device),
        state=INSTANCE_STATES[given.state],
        tier=TIERS[given.tier],
        health=health(given.health, given.health_message, given.health_time),
        artifact_version=given.artifact_version,
        predicted_bytes=given.predicted_bytes,
        measured_bytes=given.measured_bytes,
        backend=given.backend,
        create_time=timestamp(given.create_time),
        ready_time=timestamp(given.ready_time),
        load_duration=duration(given.load_s or None),
        crash_count=given.crash_count,
        config_stale=given.config_stale,
        operation=named("operations", given.operation),
        error=error(given.error) if given.error is not None else None,
        activity=activity,
    )


def health(verdict: Health, message: str = "", check_time: float = 0.0) -> instances_pb2.Health:
    """Return what real checks said."""
    return instances_pb2.Health(
        status=HEALTHS[verdict], message=message, check_time=timestamp(check_time)
    )


def device(given: Device, free_bytes: int = 0) -> devices_pb2.Device:
    """Return a device; its figures are those of ``given`` (see ``Host.live_device``)."""
    return devices_pb2.Device(
        name=named("devices", given.id),
        kind=DEVICE_KINDS[given.kind],
        display_name=given.display_name,
        uuid=given.uuid,
        compute_capability=given.compute_capability,
        driver_version=given.driver_version,
        total_bytes=given.total_bytes,
        budget_bytes=given.budget_bytes,
        headroom_bytes=given.headroom_bytes,
        foreign_bytes=given.foreign_bytes,
        reserved_bytes=given.reserved_bytes,
        resident_bytes=given.resident_bytes,
        free_bytes=max(0, free_bytes),
        health=health(given.health),
    )


def slot(given: Slot) -> slots_pb2.Slot:
    """Return a slot."""
    return slots_pb2.Slot(
        name=named("slots", given.id),
        model=named("models", given.model),
        update_time=timestamp(given.update_time),
        etag=str(given.edit),
    )


def lease(given: Lease) -> slots_pb2.Lease:
    """Return a lease."""
    return slots_pb2.Lease(
        name=named("leases", given.id),
        model=named("models", given.model),
        principal=given.principal,
        create_time=timestamp(given.create_time),
        expire_time=timestamp(given.expire_time),
    )


def settings(given: Settings) -> settings_pb2.Settings:
    """Return the host's settings."""
    return settings_pb2.Settings(
        name="settings",
        max_concurrent_downloads=given.max_concurrent_downloads,
        download_rate_limit_bytes_per_second=given.download_rate_limit_bytes_per_second,
        max_concurrent_loads=given.max_concurrent_loads,
        keep_alive=duration(given.keep_alive_s),
        load_on_demand=given.load_on_demand,
        queue_limit=given.queue_limit,
        eviction_policy=given.eviction_policy,
        min_residency=duration(given.min_residency_s),
        drain_timeout=duration(given.drain_timeout_s),
        log_level=given.log_level,
        etag=str(given.edit),
    )


# --- operations ---------------------------------------------------------------------------------


def operation(given: Operation) -> operations_pb2.Operation:
    """Return an operation with its progress, and its result or error."""
    made = operations_pb2.Operation(
        name=named("operations", given.id),
        kind=OPERATION_KINDS[given.kind],
        model=named("models", given.model),
        state=OPERATION_STATES[given.state],
        queue_position=given.queue_position,
        priority=given.priority,
        rate_limit_bytes_per_second=given.rate_limit_bytes_per_second,
        progress=progress(given.progress),
        create_time=timestamp(given.create_time),
        start_time=timestamp(given.start_time),
        end_time=timestamp(given.end_time),
        principal=given.principal,
        cancel_requested=given.cancel_requested,
        error=error(given.error) if given.error is not None else None,
    )
    if given.state is OperationState.SUCCEEDED:
        convert_results.put(made, given.kind, given.result)
    return made


def progress(given: Progress) -> operations_pb2.OperationProgress:
    """Return how far an operation is."""
    return operations_pb2.OperationProgress(
        phase=PHASES[given.phase],
        done_bytes=given.done_bytes,
        total_bytes=given.total_bytes,
        done_files=given.done_files,
        total_files=given.total_files,
        bytes_per_second=given.bytes_per_second,
        eta=duration(given.eta_s),
        reused_bytes=given.reused_bytes,
        file=given.file,
        attempt=given.attempt,
    )


# --- events -------------------------------------------------------------------------------------


def resource(given: Resource) -> events_pb2.Resource:
    """Return a resource in the form that events and snapshots carry it."""
    match given:
        case Model():
            return events_pb2.Resource(model=model(given))
        case Instance():
            return events_pb2.Resource(instance=instance(given))
        case Operation():
            return events_pb2.Resource(operation=operation(given))
        case Device():
            return events_pb2.Resource(device=device(given))
        case Slot():
            return events_pb2.Resource(slot=slot(given))
        case Lease():
            return events_pb2.Resource(lease=lease(given))
        case Settings():
            return events_pb2.Resource(settings=settings(given))


def event(given: Event) -> events_pb2.Event:
    """Return one event."""
    change = events_pb2.Event.UPDATED
    if given.resource is None:
        change = events_pb2.Event.DELETED
    elif given.created:
        change = events_pb2.Event.CREATED
    return events_pb2.Event(
        sequence=given.sequence,
        time=timestamp(given.time),
        name=name_of(given.kind, given.key),
        kind=RESOURCE_KINDS[given.kind],
        change=change,
        resource=resource(given.resource) if given.resource is not None else None,
        reason=given.reason,
        details=given.details,
        principal=given.principal,
    )


def _struct(value: Mapping[str, Any]) -> struct_pb2.Struct:
    made = struct_pb2.Struct()
    made.update(dict(value))
    return made
