"""Families with a series for each model: where it is, how it got there, what it does."""

from collections.abc import Iterable, Iterator, Mapping

from modelhostd.core.resources import Model, OperationKind, OperationState
from modelhostd.core.tallies import running_downloads
from modelhostd.gateway.exposition import counter, gauge, histogram, one, summary
from modelhostd.gateway.sources import Sources
from modelhostd.host.figures import Figures

NS = 1e-9


def residency(sources: Sources) -> Iterator[str]:
    """Yield where models are and how they got off their devices."""
    state = sources.host.registry.committed
    models, instances = list(state.models.values()), list(state.instances.values())
    ledger, routes = sources.host.occupancy.ledger, sources.host.routes
    yield from gauge(
        "modelhost_model_state",
        "1 for the state that a model's files are in.",
        (({"model": m.id, "task": m.task, "state": m.state.value}, 1) for m in models),
    )
    yield from gauge(
        "modelhost_instance_state",
        "1 for the state that a model's instance is in; no series while it has none.",
        (
            (
                {
                    "model": i.model,
                    "device": i.device,
                    "state": i.state.value,
                    "tier": i.tier.value,
                    "health": i.health.value,
                },
                1,
            )
            for i in instances
        ),
    )
    yield from gauge(
        "modelhost_model_device_bytes",
        "Bytes that a model's instance holds on its device, reserved ones included.",
        (
            ({"model": i.model, "device": i.device}, ledger.held(i.device, i.model))
            for i in instances
            if i.device
        ),
    )
    used = {r.model: r.last_used_time for r in routes if r.last_used_time}
    yield from gauge(
        "modelhost_model_last_used_timestamp_seconds",
        "When a model got its last request; no series before the first.",
        (
            ({"model": m.id}, when)
            for m in models
            if (when := used.get(m.id) or routes.last_used_time.get(m.id))
        ),
    )
    yield from counter(
        "modelhost_model_evictions_total",
        "Instances that left their device without being asked to, by reason.",
        (
            ({"model": model, "reason": reason}, count)
            for (model, reason), count in sorted(sources.tallies.evictions.items())
        ),
    )


def loads_and_files(sources: Sources) -> Iterator[str]:
    """Yield loads and downloads."""
    state, tallies = sources.host.registry.committed, sources.tallies
    yield from counter(
        "modelhost_model_loads_total",
        "Loads that ended, by result: ready, failed or cancelled.",
        (
            ({"model": model, "result": result}, count)
            for (model, result), count in sorted(tallies.loads.items())
        ),
    )
    yield from histogram(
        "modelhost_model_load_seconds",
        "How long loads that ended well took.",
        (({"model": model}, values) for model, values in sorted(tallies.load_seconds.items())),
    )
    running = running_downloads(state.operations.values())
    for operation in running:
        tallies.sample(operation, sources.host.operations.live(operation).progress)
    yield from counter(
        "modelhost_download_bytes_total",
        "Bytes that sources sent.",
        (
            ({"model": model, "source": scheme}, count)
            for (model, scheme), count in sorted(tallies.download_bytes.items())
        ),
    )
    yield from gauge("modelhost_downloads_in_progress", "Downloads under way.", one(len(running)))
    queued = sum(
        o.kind is OperationKind.DOWNLOAD and o.state is OperationState.QUEUED
        for o in state.operations.values()
    )
    yield from gauge("modelhost_downloads_queued", "Downloads that wait.", one(queued))
    yield from counter(
        "modelhost_download_failures_total",
        "Downloads that failed, by the reason of their error.",
        (({"reason": reason}, n) for reason, n in sorted(tallies.download_failures.items())),
    )


def requests(sources: Sources) -> Iterator[str]:
    """Yield inference as clients and as workers see it."""
    inference, routes = sources.host.inference, sources.host.routes
    models = list(sources.host.registry.committed.models.values())
    figures = _by_model(models, inference.figures)
    yield from counter(
        "modelhost_infer_requests_total",
        "Requests that a worker answered, by result: ok or error.",
        (
            ({"model": model, "result": result}, count)
            for model, f in figures.items()
            for result, count in (("ok", f.success_count), ("error", f.fail_count))
        ),
    )
    yield from counter(
        "modelhost_infer_items_total",
        "Items in requests that were answered well (a batch of 8 counts 8).",
        (({"model": model}, f.inference_count) for model, f in figures.items()),
    )
    yield from counter(
        "modelhost_infer_executions_total",
        "Executions of the model; items over executions is the mean batch.",
        (({"model": model}, f.execution_count) for model, f in figures.items()),
    )
    yield from summary(
        "modelhost_infer_seconds",
        "Time of requests that were answered well: waiting for their model to be loaded, in the "
        "worker's queue, decoding input, computing, encoding output, and in total.",
        (
            ({"model": model, "phase": phase}, ns * NS, f.success_count)
            for model, f in figures.items()
            for phase, ns in (
                ("load", f.load_ns),
                ("queue", f.queue_ns),
                ("input", f.input_ns),
                ("compute", f.infer_ns),
                ("output", f.output_ns),
                ("total", f.success_ns),
            )
        ),
    )
    yield from gauge(
        "modelhost_infer_in_flight",
        "Requests in a worker now.",
        (({"model": r.model}, r.in_flight) for r in routes),
    )
    yield from gauge(
        "modelhost_queue_depth",
        "Requests that wait for their model to be loaded; no series at 0 without an instance.",
        (
            ({"model": m.id}, depth)
            for m in models
            if (depth := routes.queued(m.id)) or routes.get(m.id) is not None
        ),
    )
    yield from gauge(
        "modelhost_infer_bytes_in_flight",
        "Bytes of inference requests that the daemon holds.",
        one(sources.inference_bytes()),
    )


def _by_model(
    models: Iterable[Model], figures: Mapping[tuple[str, int], Figures]
) -> Mapping[str, Figures]:
    """Return the figures of all versions together, of models that the registry knows."""
    known = {m.id for m in models}
    totals: dict[str, Figures] = {}
    for (model, _), found in figures.items():
        if model not in known:
            continue
        total = totals.setdefault(model, Figures())
        total.success_count += found.success_count
        total.success_ns += found.success_ns
        total.fail_count += found.fail_count
        total.load_ns += found.load_ns
        total.queue_ns += found.queue_ns
        total.input_ns += found.input_ns
        total.infer_ns += found.infer_ns
        total.output_ns += found.output_ns
        total.inference_count += found.inference_count
        total.execution_count += found.execution_count
    return totals
