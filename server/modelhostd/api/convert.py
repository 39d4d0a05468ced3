"""Resources as messages of ``modelhost.v1``. Nothing is decided here, and nothing is looked up.

Names on the wire are full (``models/minilm``); inside they are ids. A time of 0.0 is an unset Timestamp,
a duration of None an unset Duration. Enums have the same value names on both sides, so they map by name.
"""

from collections.abc import Sequence

from modelhost.v1 import (
    devices_pb2,
    events_pb2,
    instances_pb2,
    operations_pb2,
    settings_pb2,
    slots_pb2,
)
from modelhostd.api import convert_models, convert_results
from modelhostd.api.convert_values import (
    duration,
    error,
    instance_name,
    name_of,
    named,
    timestamp,
)
from modelhostd.core.resources import (
    Device,
    DeviceKind,
    Event,
    Health,
    Instance,
    InstanceState,
    Kind,
    Lease,
    Model,
    Operation,
    OperationKind,
    OperationState,
    Phase,
    Progress,
    Resource,
    Retry,
    Settings,
    Slot,
    Tier,
)
from modelhostd.ports import FileProgress

# By name, once: on the way of every event.
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
        host_bytes=given.host_bytes,
        working_bytes=given.working_bytes,
        backend=given.backend,
        create_time=timestamp(given.create_time),
        ready_time=timestamp(given.ready_time),
        load_duration=duration(given.load_s or None),
        crash_count=given.crash_count,
        config_stale=given.config_stale,
        isolation=convert_models.ISOLATIONS[given.isolation],
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
        host_keep_alive=duration(given.host_keep_alive_s),
        host_budget_bytes=given.host_budget_bytes,
        load_on_demand=given.load_on_demand,
        queue_limit=given.queue_limit,
        eviction_policy=given.eviction_policy,
        min_residency=duration(given.min_residency_s),
        drain_timeout=duration(given.drain_timeout_s),
        log_level=given.log_level,
        etag=str(given.edit),
        disk_budget_bytes=given.disk_budget_bytes,
        storage_policy=given.storage_policy,
        storage_ttl=duration(given.storage_ttl_s),
        verify_interval=duration(given.verify_interval_s),
        verify_rate_bytes_per_second=given.verify_rate_bytes_per_second,
    )


# --- operations ---------------------------------------------------------------------------------


def operation(given: Operation, files: Sequence[FileProgress] = ()) -> operations_pb2.Operation:
    """Return an operation with its progress (that of ``files``, too), and its result or error."""
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
    made.progress.files.extend(
        operations_pb2.OperationProgress.FileProgress(
            path=file.path, done_bytes=file.done_bytes, size_bytes=file.size_bytes
        )
        for file in files
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
        retry=retry(given.retry) if given.retry is not None else None,
        restarted_files=given.restarted_files,
    )


def retry(given: Retry) -> operations_pb2.OperationProgress.Retry:
    """Return what failed last and when it is tried again."""
    return operations_pb2.OperationProgress.Retry(
        attempt=given.attempt,
        reason=given.reason,
        message=given.message,
        next_time=timestamp(given.next_time),
    )


# --- events -------------------------------------------------------------------------------------


def resource(given: Resource) -> events_pb2.Resource:
    """Return a resource in the form that events and snapshots carry it."""
    match given:
        case Model():
            return events_pb2.Resource(model=convert_models.model(given))
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
