"""What ``/metrics`` shows: every family with its name, its labels and where its numbers come from.

Names follow go-grpc (``grpc_server_*``), Prometheus itself (``process_*``) and our own prefix. Units are
seconds and bytes. The label ``model`` is an id that the registry knows, or ``_unknown``.
"""

import os
import resource
from collections import Counter
from collections.abc import Callable, Iterator

from modelhostd.core.resources import Device
from modelhostd.core.rpc_stats import MethodCounts, RpcStats
from modelhostd.gateway.exposition import Labels, counter, gauge, histogram, one
from modelhostd.gateway.model_metrics import loads_and_files, requests, residency
from modelhostd.gateway.sources import Sources

CODES = (
    *("OK", "Canceled", "Unknown", "InvalidArgument", "DeadlineExceeded", "NotFound"),
    *("AlreadyExists", "PermissionDenied", "ResourceExhausted", "FailedPrecondition", "Aborted"),
    *("OutOfRange", "Unimplemented", "Internal", "Unavailable", "DataLoss", "Unauthenticated"),
)
"""gRPC's codes by number, as go-grpc writes them in ``grpc_code``."""


def families(sources: Sources) -> Iterator[str]:
    """Yield the whole exposition in pieces, each of which is true at the moment it is made."""
    yield from rpc(sources.rpc)
    yield from devices(sources)
    yield from host_tier(sources)
    yield from residency(sources)
    yield from loads_and_files(sources)
    yield from requests(sources)
    yield from workers(sources)
    yield from host(sources)
    yield from process(sources)


def rpc(stats: RpcStats) -> Iterator[str]:
    """Yield the calls of every method. Histograms only of methods that were called."""

    def of(counts: MethodCounts) -> Labels:
        return {
            "grpc_type": counts.kind,
            "grpc_service": counts.service,
            "grpc_method": counts.method,
        }

    methods = list(stats)
    yield from counter(
        "grpc_server_started_total",
        "Calls that came in.",
        ((of(m), m.started) for m in methods),
    )
    yield from counter(
        "grpc_server_handled_total",
        "Calls that ended, by gRPC code.",
        (
            ({**of(m), "grpc_code": CODES[code]}, count)
            for m in methods
            for code, count in sorted(m.handled.items())
        ),
    )
    yield from histogram(
        "grpc_server_handling_seconds",
        "How long calls took until their outcome was known.",
        ((of(m), m.seconds) for m in methods if m.seconds.count),
    )


def devices(sources: Sources) -> Iterator[str]:
    """Yield the bytes of each device."""
    found = list(sources.host.registry.committed.devices.values())
    occupancy = sources.host.occupancy

    def family(name: str, text: str, value: Callable[[Device], int]) -> Iterator[str]:
        samples = (({"device": d.id, "uuid": d.uuid}, value(d)) for d in found)
        return gauge(f"modelhost_device_{name}_bytes", text, samples)

    yield from family("budget", "Bytes that modelhost may use.", lambda d: d.budget_bytes)
    yield from family(
        "used",
        "Bytes that models take, and those that are promised to loads.",
        lambda d: occupancy.ledger.used(d.id),
    )
    yield from family("total", "Bytes that the device has.", lambda d: d.total_bytes)
    yield from family(
        "foreign",
        "Bytes that other processes use.",
        lambda d: occupancy.foreign.get(d.id, 0),
    )


def host_tier(sources: Sources) -> Iterator[str]:
    """Yield the bytes of weights in host memory."""
    tier = sources.host.occupancy.host
    for name, text, value in (
        ("budget", "Bytes of host memory that weights may take.", tier.budget_bytes),
        (
            "used",
            "Bytes of host memory that weights take, beside devices or warm.",
            tier.used_bytes,
        ),
        ("warm", "Of those, the bytes of models that are on no device.", tier.warm_bytes),
    ):
        yield from gauge(f"modelhost_host_tier_{name}_bytes", text, one(value))


def workers(sources: Sources) -> Iterator[str]:
    """Yield worker processes: how many, how often started, how often lost."""
    counts = sources.host.worker_counts
    running = Counter(sources.worker_pids().values())
    for device in sources.host.registry.committed.devices:
        running.setdefault(device, 0)
    yield from gauge(
        "modelhost_workers",
        "Worker processes now.",
        (({"device": device}, count) for device, count in sorted(running.items())),
    )
    yield from counter(
        "modelhost_worker_starts_total",
        "Workers that came to take commands, replacements included.",
        (({"device": device}, count) for device, count in sorted(counts.starts.items())),
    )
    crashes: Counter[tuple[str, str, str]] = Counter()
    for (device, blamed, kind), count in counts.crashes.items():
        crashes[device, sources.tallies.label(blamed) if blamed else "", kind] += count
    yield from counter(
        "modelhost_worker_crashes_total",
        "Workers that ended unasked, by the model that was executing (empty: none) and kind of end.",
        (
            ({"device": device, "model": model, "kind": kind}, count)
            for (device, model, kind), count in sorted(crashes.items())
        ),
    )


def host(sources: Sources) -> Iterator[str]:
    """Yield what there is once."""
    last = sources.host.registry.journal.last_sequence
    yield from gauge("modelhost_events_seq", "Sequence of the newest event.", one(last))
    yield from gauge(
        "modelhost_event_subscribers", "Open WatchEvents.", one(sources.subscriber_count())
    )
    yield from gauge("modelhost_build_info", "Versions.", [(sources.build, 1)])


def process(sources: Sources) -> Iterator[str]:
    """Yield what Prometheus' own clients tell of their process."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    yield from counter(
        "process_cpu_seconds_total",
        "CPU time of the daemon, without its workers.",
        one(usage.ru_utime + usage.ru_stime),
    )
    with open("/proc/self/statm", encoding="ascii") as statm:
        pages = int(statm.read().split()[1])
    yield from gauge(
        "process_resident_memory_bytes",
        "Resident memory of the daemon, without its workers.",
        one(pages * resource.getpagesize()),
    )
    yield from gauge("process_open_fds", "Open descriptors.", one(len(os.listdir("/proc/self/fd"))))
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    yield from gauge("process_max_fds", "Most descriptors that may be open.", one(most))
    yield from gauge(
        "process_start_time_seconds", "When the daemon started.", one(sources.host.start_time)
    )
