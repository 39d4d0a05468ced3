"""What the Open Inference Protocol says of models: metadata, configuration, statistics, the repository's index.

Texts and figures are those that existing clients look for and do sums with; see the contract's comments in
``modelhost/oip/open_inference.proto``.
"""

from collections.abc import Iterator, Sequence

from modelhost.oip import model_config_pb2, open_inference_pb2
from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.resources import Device, DeviceKind, Instance, InstanceState, Model
from modelhostd.host import Host
from modelhostd.host.arrivals import no_version
from modelhostd.host.figures import BatchFigures, Figures
from modelhostd.host.routes import Route
from modelhostd.ports import Loaded, TensorSpec

_oip = open_inference_pb2
_config = model_config_pb2

EXTENSIONS = (
    "classification",
    "model_repository",
    "model_repository(unload_dependents)",
    "schedule_policy",
    "model_configuration",
    "parameters",
    "statistics",
)
"""In Triton's words; clients switch code paths on them, so only what is true stands here."""

_INDEX_STATES = {
    InstanceState.QUEUED: "LOADING",
    InstanceState.LOADING: "LOADING",
    InstanceState.READY: "READY",
    InstanceState.DRAINING: "UNLOADING",
}

_HOST = ("CPU", 0)


# --- one loaded model -----------------------------------------------------------------------------


def metadata(name: str, route: Route, loaded: Loaded) -> _oip.ModelMetadataResponse:
    """Return a model's inputs and outputs; ``name`` is the one that was asked for, for requests to use."""
    return _oip.ModelMetadataResponse(
        name=name,
        versions=[str(route.version)],
        platform=loaded.platform,
        inputs=[_tensor(spec) for spec in loaded.inputs],
        outputs=[_tensor(spec) for spec in loaded.outputs],
    )


def config(name: str, route: Route, loaded: Loaded, device: Device | None) -> _config.ModelConfig:
    """Return a model's configuration; dimensions leave the batch out where ``max_batch_size`` is above 0."""
    batched = loaded.max_batch_size > 0
    policy = _config.ModelVersionPolicy(
        specific=_config.ModelVersionPolicy.Specific(versions=[route.version])
    )
    made = _config.ModelConfig(
        name=name,
        platform=loaded.platform,
        backend=loaded.backend,
        version_policy=policy,
        max_batch_size=loaded.max_batch_size,
        input=[
            _config.ModelInput(name=s.name, data_type=_data_type(s), dims=_dims(s, batched=batched))
            for s in loaded.inputs
        ],
        output=[
            _config.ModelOutput(
                name=s.name, data_type=_data_type(s), dims=_dims(s, batched=batched)
            )
            for s in loaded.outputs
        ],
        instance_group=[_group(route, device)],
    )
    # Clients act on their mere presence.
    if loaded.dynamic_batching and batched:
        made.dynamic_batching.SetInParent()
    if loaded.decoupled:
        made.model_transaction_policy.decoupled = True
    return made


def _tensor(spec: TensorSpec) -> _oip.ModelMetadataResponse.TensorMetadata:
    return _oip.ModelMetadataResponse.TensorMetadata(
        name=spec.name, datatype=spec.datatype, shape=spec.shape
    )


def _data_type(spec: TensorSpec) -> _config.DataType.ValueType:
    name = "TYPE_STRING" if spec.datatype == "BYTES" else f"TYPE_{spec.datatype}"
    return _config.DataType.Value(name)


def _dims(spec: TensorSpec, *, batched: bool) -> Sequence[int]:
    return spec.shape[1:] if batched else spec.shape


def _group(route: Route, device: Device | None) -> _config.ModelInstanceGroup:
    kind, number = _place(device)
    on_gpu = kind == "GPU"
    return _config.ModelInstanceGroup(
        name=route.device,
        count=1,
        gpus=[number] if on_gpu else [],
        kind=_config.ModelInstanceGroup.KIND_GPU if on_gpu else _config.ModelInstanceGroup.KIND_CPU,
    )


def _place(device: Device | None) -> tuple[str, int]:
    """Return a device as memory is told of: ``GPU`` and its number, else ``CPU`` 0."""
    if device is None or device.kind is not DeviceKind.CUDA:
        return _HOST
    number = device.id.rpartition("-")[2]
    return "GPU", int(number) if number.isdecimal() else 0


# --- statistics -----------------------------------------------------------------------------------


def statistics(host: Host, name: str, version: str) -> _oip.ModelStatisticsResponse:
    """Return the statistics of one model (under the name that was asked for), or of all.

    Raises NOT_FOUND for an unknown name or version, in the words that clients look for.
    """
    if not name:
        models = sorted(host.registry.committed.models.values(), key=lambda m: m.id)
        found = [s for m in models for s in _of_model(host, m, m.id, version)]
        return _oip.ModelStatisticsResponse(model_stats=found)
    model = host.inference.model_for(name)
    found = list(_of_model(host, model, name, version))
    if not found:
        if version and model.available is not None:
            raise no_version(name, version, model.available.version)
        raise ModelhostError(
            Reason.MODEL_NOT_FOUND,
            f"Request for unknown model: '{name}' has no available versions; download or load it first",
            {"model": name},
        )
    return _oip.ModelStatisticsResponse(model_stats=found)


def _of_model(host: Host, model: Model, name: str, version: str) -> Iterator[_oip.ModelStatistics]:
    figures = {v: f for (m, v), f in host.inference.figures.items() if m == model.id}
    route = host.routes.get(model.id) or host.occupancy.host.warm.get(model.id)
    versions = set(figures)
    if route is not None:
        versions.add(route.version)
    if model.available is not None:
        versions.add(model.available.version)
    for number in sorted(versions):
        if version in ("", str(number)):
            loaded = route if route is not None and route.version == number else None
            yield _entry(name, number, figures.get(number, Figures()), _memory(host, loaded))


def _entry(
    name: str, version: int, figures: Figures, memory: Sequence[_oip.MemoryUsage]
) -> _oip.ModelStatistics:
    count = figures.success_count

    def times(ns: int) -> _oip.StatisticDuration:
        return _oip.StatisticDuration(count=count, ns=ns)

    return _oip.ModelStatistics(
        name=name,
        version=str(version),
        last_inference=figures.last_inference_ms,
        inference_count=figures.inference_count,
        execution_count=round(figures.execution_count),
        inference_stats=_oip.InferStatistics(
            success=times(figures.success_ns),
            fail=_oip.StatisticDuration(count=figures.fail_count, ns=figures.fail_ns),
            queue=times(figures.queue_ns),
            compute_input=times(figures.input_ns),
            compute_infer=times(figures.infer_ns),
            compute_output=times(figures.output_ns),
            cache_hit=_oip.StatisticDuration(),
            cache_miss=_oip.StatisticDuration(),
        ),
        batch_stats=[_batch(size, batch) for size, batch in sorted(figures.batches.items())],
        memory_usage=memory,
    )


def _batch(size: int, batch: BatchFigures) -> _oip.InferBatchStatistics:
    count = round(batch.execution_count)

    def times(ns: float) -> _oip.StatisticDuration:
        return _oip.StatisticDuration(count=count, ns=round(ns))

    return _oip.InferBatchStatistics(
        batch_size=size,
        compute_input=times(batch.input_ns),
        compute_infer=times(batch.infer_ns),
        compute_output=times(batch.output_ns),
    )


def _memory(host: Host, route: Route | None) -> Sequence[_oip.MemoryUsage]:
    """Return the bytes on the model's device, and those of its copy in host memory."""
    if route is None:
        return ()
    occupancy = host.occupancy
    place = _place(host.registry.committed.devices.get(route.device))
    sizes = {place: occupancy.ledger.held(route.device, route.model)}
    # On a CPU there is no copy: the weights themselves are in host memory.
    sizes[_HOST] = sizes.get(_HOST, 0) + occupancy.host.held_bytes(route.model)
    return [
        _oip.MemoryUsage(type=kind, id=number, byte_size=size)
        for (kind, number), size in sizes.items()
        if size
    ]


# --- the repository -------------------------------------------------------------------------------


def index(host: Host, *, ready_only: bool) -> _oip.RepositoryIndexResponse:
    """Return every registered model with its state, or those that are READY."""
    committed = host.registry.committed
    entries = (
        _indexed(model, committed.instance_of(model.id))
        for model in sorted(committed.models.values(), key=lambda m: m.id)
    )
    found = [entry for entry in entries if entry.state == "READY" or not ready_only]
    return _oip.RepositoryIndexResponse(models=found)


def _indexed(model: Model, instance: Instance | None) -> _oip.RepositoryIndexResponse.ModelIndex:
    state = _INDEX_STATES.get(instance.state, "UNAVAILABLE") if instance else "UNAVAILABLE"
    version = ""
    if instance is not None and instance.artifact_version and state in ("READY", "UNLOADING"):
        version = str(instance.artifact_version)
    return _oip.RepositoryIndexResponse.ModelIndex(
        name=model.id,
        version=version,
        state=state,
        reason=_why(model, instance) if state == "UNAVAILABLE" else "",
    )


def _why(model: Model, instance: Instance | None) -> str:
    if instance is not None:
        return instance.error.message if instance.error is not None else instance.state.value
    if model.available is None:
        return f"not downloaded (its files are {model.state.value})"
    return "unloaded"
