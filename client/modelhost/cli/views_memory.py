"""How what is in memory looks: instances, devices, host memory, and what a load would change of them."""

from collections.abc import Iterator

from modelhost._enums import name_of
from modelhost._names import short
from modelhost._text import show_bytes
from modelhost.cli.output import Column
from modelhost.cli.views import Pairs, ago, size, when, word
from modelhost.v1 import devices_pb2, instances_pb2, operations_pb2, residency_service_pb2

Instance = instances_pb2.Instance
Health = instances_pb2.Health
Plan = residency_service_pb2.PlanLoadResponse

HOST = "host"
"""What the command line calls host memory where it names devices."""


def why_kept(instance: Instance) -> str:
    """Return why an instance is not evicted now, in words; empty = it can be."""
    blockers = instances_pb2.InstanceActivity.EvictBlocker
    return ",".join(name_of(blockers, b).lower() for b in instance.activity.evict_blockers)


INSTANCE_COLUMNS: list[Column[Instance]] = [
    Column("MODEL", lambda i: short(i.model)),
    Column("DEVICE", lambda i: short(i.device), word, extra=1),
    Column("STATE", lambda i: name_of(Instance.State, i.state), str.lower),
    Column("TIER", lambda i: name_of(Instance.Tier, i.tier), str.lower, extra=4),
    Column("PREDICTED", lambda i: i.predicted_bytes, size, right=True, extra=10),
    Column("MEMORY", lambda i: i.measured_bytes, size, right=True),
    Column("HOST", lambda i: i.host_bytes, size, right=True, extra=6),
    Column("HEALTH", lambda i: name_of(Health.Status, i.health.status), str.lower, extra=7),
    Column("IN FLIGHT", lambda i: i.activity.in_flight, right=True, extra=2),
    Column("QUEUED", lambda i: i.activity.queued, right=True, extra=8),
    Column("LAST USED", lambda i: when(i.activity.last_used_time), ago, extra=3),
    Column(
        "UNTIL",
        lambda i: when(i.activity.expire_time),
        lambda v: ago(v) if v else "for ever",
        extra=11,
    ),
    Column("RANK", lambda i: i.activity.eviction_rank or "", word, right=True, extra=9),
    Column("KEPT BY", why_kept, word, prose=True, extra=5),
]


def instance_pairs(instance: Instance) -> Pairs:
    """Return what ``show`` tells of a model's instance."""
    yield "instance", instance.name
    yield "device", instance.device
    yield "state", name_of(Instance.State, instance.state).lower()
    yield "tier", name_of(Instance.Tier, instance.tier).lower()
    yield "memory", size(instance.measured_bytes or instance.predicted_bytes)
    yield "predicted", _prediction(instance)
    yield "kept for requests", size(instance.working_bytes)
    yield "host memory", size(instance.host_bytes)
    yield "health", name_of(Health.Status, instance.health.status).lower()
    yield "health message", instance.health.message
    yield "backend", instance.backend
    yield "version", instance.artifact_version
    yield "config is stale", "yes, until it is reloaded" if instance.config_stale else ""
    yield "crashes", instance.crash_count or ""
    yield "error", instance.error.message
    yield "not evicted", why_kept(instance).replace(",", ", ")


def _prediction(instance: Instance) -> str:
    """Return what was predicted, and how far the truth is from it."""
    if not instance.predicted_bytes or not instance.measured_bytes:
        return size(instance.predicted_bytes)
    error = instance.measured_bytes / instance.predicted_bytes - 1
    return f"{size(instance.predicted_bytes)} ({error:+.1%} measured)"


DEVICE_COLUMNS: list[Column[devices_pb2.Device]] = [
    Column("DEVICE", lambda d: short(d.name)),
    Column("HARDWARE", lambda d: d.display_name, word, prose=True, extra=2),
    Column("TOTAL", lambda d: d.total_bytes, size, right=True, extra=3),
    Column("BUDGET", lambda d: d.budget_bytes, size, right=True),
    Column("RESIDENT", lambda d: d.resident_bytes, size, right=True),
    Column("RESERVED", lambda d: d.reserved_bytes, size, right=True, extra=4),
    Column("FOREIGN", lambda d: d.foreign_bytes, size, right=True, extra=5),
    Column("FREE", lambda d: d.free_bytes, size, right=True),
    Column("HEALTH", lambda d: name_of(Health.Status, d.health.status), str.lower, extra=1),
]


def tier_row(tier: devices_pb2.HostTier) -> devices_pb2.Device:
    """Return host memory as a row among devices: its resident bytes are those of all copies."""
    return devices_pb2.Device(
        name=HOST,
        display_name="host memory: copies of weights",
        budget_bytes=tier.budget_bytes,
        resident_bytes=tier.used_bytes,
        foreign_bytes=tier.budget_bytes - tier.capacity_bytes,
        free_bytes=tier.free_bytes,
        health=Health(status=Health.HEALTHY),
    )


def plan_pairs(planned: Plan) -> Iterator[tuple[str, object]]:
    """Return what ``plan`` tells: where a model would go, who would leave for it and where to, with the numbers."""
    placement = planned.placement
    if planned.HasField("refusal"):
        yield "load", f"would be refused: {planned.refusal.message} [{planned.refusal.reason}]"
    elif placement.loaded:
        yield "load", f"is loaded on {short(placement.device)}"
    else:
        tier = name_of(Instance.Tier, placement.source_tier).lower()
        yield "load", f"would be loaded on {short(placement.device)} from {tier}"
    yield "needed", show_bytes(planned.needed_bytes) if planned.needed_bytes else "not known yet"
    yield "free", show_bytes(planned.free_bytes)
    yield "evictable", show_bytes(planned.evictable_bytes)
    yield "budget", show_bytes(planned.budget_bytes)
    for victim in placement.victims:
        after = ", stays warm" if victim.tier_after == Instance.HOST else ""
        busy = ", busy now" if victim.busy else ""
        freed = show_bytes(victim.freed_bytes)
        yield "would evict", f"{short(victim.model)} ({freed}{busy}{after})"
    if placement.host_bytes:
        yield "host memory", f"{show_bytes(placement.host_bytes)} for a copy"
    for victim in placement.dropped:
        after = ", stays on its device" if victim.tier_after == Instance.DEVICE else ""
        freed = show_bytes(victim.freed_bytes)
        yield "would drop", f"{short(victim.model)} ({freed} of host memory{after})"


def unloaded(result: operations_pb2.UnloadResult) -> str:
    """Return what an unload freed, in one sentence."""
    freed = f"{show_bytes(result.freed_bytes)} of device memory"
    if result.freed_host_bytes:
        freed += f" and {show_bytes(result.freed_host_bytes)} of host memory"
    return f"{freed} are free again" + ("; it stays warm in host memory" if result.warm else "")
