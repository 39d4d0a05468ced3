"""What the daemon asks of a worker on its control socket, with types."""

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping

from google.protobuf import json_format

from modelhostd.adapters.workers.commands import BYTES_MAX, Commands
from modelhostd.adapters.workers.config import WorkersConfig
from modelhostd.core.errors import ModelhostError
from modelhostd.core.resources import Health, Progress
from modelhostd.ports import Loaded, LoadSpec, TensorSpec
from modelhostd.worker.v1 import worker_pb2
from modelhostd.worker.wire import frames
from modelhostd.worker.wire.frames import Kind, ProtocolError
from modelhostd.worker.wire.images import Kept, Range

SECONDS_MAX = 366 * 86_400.0

log = logging.getLogger("modelhostd.workers")


class Control(Commands):
    """The commands that a worker knows."""

    async def hello(
        self, config: WorkersConfig, device: str, kept: Mapping[frames.Key, Kept]
    ) -> worker_pb2.HelloResponse:
        """Greet the worker and wait, without a limit of its own, until it takes requests."""
        hello = worker_pb2.HelloRequest(
            protocol_version=frames.PROTOCOL_VERSION,
            device=device,
            request_arena_bytes=config.arena_bytes,
            response_arena_bytes=config.arena_bytes,
            max_message_bytes=config.max_message_bytes,
            queue_limit=config.queue_limit,
            executor_threads=config.executor_threads,
            host_ready_bytes=config.host_ready_bytes,
            heartbeat_interval_ms=max(1, round(config.heartbeat_interval_s * 1000)),
            log_level=config.log_level,
        )
        for name, target in config.allowed_backends():
            hello.backends.add(name=name, target=target)
        for (instance, generation), image in kept.items():
            hello.kept.add(instance=instance, generation=generation, image=_from_kept(image))
        _, answer = self.send(Kind.HELLO, 0, hello, worker_pb2.HelloResponse.FromString)
        return await answer

    def load(
        self, spec: LoadSpec, report: Callable[[Progress], None], *, adopt: bool = False
    ) -> tuple[int, "asyncio.Future[Loaded]"]:
        """Send LOAD; return its number and the future of its answer. ``adopt``: from what HELLO told of."""
        config = spec.config
        header = worker_pb2.LoadHeader(
            instance=spec.instance,
            model=spec.model,
            version=spec.version,
            model_dir=str(spec.model_dir),
            task=spec.task,
            backend=config.backend,
            precision=config.precision,
            max_batch_size=config.max_batch_size or 0,
            max_sequence_length=config.max_sequence_length or 0,
            predicted_bytes=spec.predicted_bytes,
            no_dynamic_batching=config.dynamic_batching is False,
            max_batch_delay_us=round((config.max_batch_delay_s or 0) * 1e6),
            keep_image=spec.keep_image,
            adopt=adopt,
        )
        json_format.ParseDict(dict(config.backend_options), header.backend_options)
        return self.send(
            Kind.LOAD, spec.generation, header, to_loaded, model=spec.model, report=report
        )

    def promote(
        self, spec: LoadSpec, report: Callable[[Progress], None]
    ) -> tuple[int, "asyncio.Future[Loaded]"]:
        """Send PROMOTE; return its number and the future of its answer."""
        header = worker_pb2.PromoteHeader(instance=spec.instance)
        return self.send(
            Kind.PROMOTE, spec.generation, header, to_loaded, model=spec.model, report=report
        )

    async def demote(self, instance: str, generation: int) -> int:
        """Take an instance off the device; return the bytes of its image, 0 where it is gone whole."""
        header = worker_pb2.DemoteHeader(instance=instance)
        _, answer = self.send(Kind.DEMOTE, generation, header, to_host_bytes)
        await asyncio.wait((answer,))
        if (error := answer.exception()) is not None:
            log.info("a demotion ended with its worker: %s", error)
            return 0
        return answer.result()

    async def drop_copy(self, instance: str, generation: int) -> int:
        """Give an instance's copy in host RAM back; return the bytes of it that are held still, 0 from a worker that ends."""
        header = worker_pb2.DropCopyHeader(instance=instance)
        _, answer = self.send(Kind.DROP_COPY, generation, header, to_bytes_left)
        await asyncio.wait((answer,))
        if (error := answer.exception()) is not None:
            log.info("a copy went with its worker: %s", error)
            return 0
        return answer.result()

    async def unload(self, instance: str, generation: int) -> None:
        """Free an instance; returns when the worker did, or is gone itself."""
        header = worker_pb2.UnloadHeader(instance=instance)
        _, answer = self.send(Kind.UNLOAD, generation, header, bytes)
        await asyncio.wait((answer,))
        if (error := answer.exception()) is not None:
            log.info("an unload ended with its worker: %s", error)

    async def check(self, instance: str, generation: int, timeout_s: float) -> tuple[Health, str]:
        """Run a health check; one that is not answered in time says UNHEALTHY."""
        header = worker_pb2.CheckHeader(instance=instance)
        _, answer = self.send(Kind.CHECK, generation, header, worker_pb2.CheckedHeader.FromString)
        try:
            async with asyncio.timeout(timeout_s):
                checked = await answer
        except TimeoutError:
            return Health.UNHEALTHY, f"The health check was not answered within {timeout_s:g} s."
        except ModelhostError as error:
            return Health.UNHEALTHY, error.message
        known = checked.health in Health.__members__
        return Health(checked.health) if known else Health.UNKNOWN, checked.message


def to_loaded(data: bytes) -> Loaded:
    """Return what a LOADED frame says. Raises :class:`ProtocolError` for numbers that none can be."""
    header = worker_pb2.LoadedHeader.FromString(data)
    most = max(header.measured_bytes, header.host_bytes, header.adopted_bytes)
    if most > BYTES_MAX or not 0 <= header.load_s <= SECONDS_MAX:
        raise ProtocolError(f"{most} bytes loaded in {header.load_s} s")
    return Loaded(
        backend=header.backend,
        platform=header.platform,
        measured_bytes=header.measured_bytes,
        inputs=_specs(header.inputs),
        outputs=_specs(header.outputs),
        max_batch_size=header.max_batch_size,
        load_s=header.load_s,
        dynamic_batching=header.dynamic_batching,
        decoupled=header.decoupled,
        host_bytes=header.host_bytes,
        adopted_bytes=header.adopted_bytes,
    )


def to_host_bytes(data: bytes) -> int:
    """Return what a DEMOTED frame says is kept. Raises :class:`ProtocolError` for what cannot be."""
    return _plausible(worker_pb2.DemotedHeader.FromString(data))


def to_bytes_left(data: bytes) -> int:
    """Return what a COPY_DROPPED frame says is held still. Raises as above."""
    return _plausible(worker_pb2.CopyDroppedHeader.FromString(data))


def _plausible(header: worker_pb2.DemotedHeader | worker_pb2.CopyDroppedHeader) -> int:
    if header.host_bytes > (BYTES_MAX if header.found else 0):
        raise ProtocolError(f"{header.host_bytes} bytes in host RAM, found: {header.found}")
    return header.host_bytes


def to_kept(data: bytes) -> tuple[str, Kept]:
    """Return what a KEPT frame says: an instance and its image."""
    header = worker_pb2.KeptHeader.FromString(data)
    return header.instance, Kept(
        Range(header.weights_offset, header.weights_length),
        Range(header.description_offset, header.description_length),
        header.checksum,
    )


def _from_kept(image: Kept) -> worker_pb2.KeptHeader:
    return worker_pb2.KeptHeader(
        weights_offset=image.weights.start,
        weights_length=image.weights.length,
        description_offset=image.description.start,
        description_length=image.description.length,
        checksum=image.checksum,
    )


def _specs(specs: Iterable[worker_pb2.TensorSpec]) -> tuple[TensorSpec, ...]:
    return tuple(
        TensorSpec(spec.name, spec.datatype, tuple(spec.shape), spec.description) for spec in specs
    )
