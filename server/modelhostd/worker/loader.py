"""Loads instances, each in a thread of its own, so that inference goes on meanwhile."""

import logging
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from google.protobuf import json_format

from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.resources import Phase
from modelhostd.worker import failures
from modelhostd.worker.backend import Backend, Cancelled, LoadContext, Signature
from modelhostd.worker.batching import DEFAULT_ITEMS
from modelhostd.worker.channel import Channel
from modelhostd.worker.executor import Executor
from modelhostd.worker.imaging import Draft, Imaging
from modelhostd.worker.jobs import Activity, Hosted
from modelhostd.worker.keeping import Keeper
from modelhostd.worker.own_threads import start_thread
from modelhostd.worker.process import drop_spare, free_memory
from modelhostd.worker.registry import Registry
from modelhostd.worker.residents import Residents, let_go
from modelhostd.worker.v1 import worker_pb2
from modelhostd.worker.wire import frames
from modelhostd.worker.wire.blackbox import ENTRIES, BlackBox
from modelhostd.worker.wire.frames import Frame, Kind

if TYPE_CHECKING:
    from modelhostd.worker.image.image import Image
    from modelhostd.worker.image.kept import Adoption

log = logging.getLogger("modelhostd.worker")

PROGRESS_INTERVAL_S = 0.1


class Loader:
    """The loads in progress, and the commands that begin and cancel them."""

    def __init__(
        self,
        device: str,
        registry: Registry,
        executor: Executor,
        residents: Residents,
        imaging: Imaging,
        channel: Channel,
        box: BlackBox,
    ) -> None:
        self._device = device
        self._box = box
        self._registry = registry
        self._executor = executor
        self._residents = residents
        self._imaging = imaging
        self._channel = channel
        self._keeper = Keeper(imaging, channel)
        self._loads: dict[int, _Load] = {}

    @property
    def activities(self) -> list[Activity]:
        """What each load in progress does."""
        return [load.activity for load in list(self._loads.values())]

    def load(self, frame: Frame) -> None:
        """Begin a LOAD; it is answered by LOADED or ERROR."""
        first = len(self._executor.activities)
        entry = first + frame.request % max(1, ENTRIES - first)
        activity = Activity(f"load-{frame.request}", self._box, entry, loading=True)
        load = _Load(self._device, self._imaging, self._channel, activity, frame)
        self._loads[frame.request] = load
        start_thread(self._run, load, name=load.activity.name)

    def cancel(self, request: int) -> None:
        """Have a load stop at its next check; it is answered CANCELLED, with nothing held."""
        load = self._loads.get(request)
        if load is not None:
            load.cancelled.set()

    def _run(self, load: "_Load") -> None:
        load.activity.begin(load.header.model)
        failure = self._try(load)
        if failure is not None:
            load.discard()
            if failure.reason is Reason.OUT_OF_DEVICE_MEMORY:
                drop_spare()
            free_memory()
        load.activity.end()
        self._loads.pop(load.request, None)
        if failure is not None:
            self._channel.send_error(load.request, load.generation, failure)

    def _try(self, load: "_Load") -> ModelhostError | None:
        # Returns instead of raising: a traceback would hold the frames that hold the weights.
        header = load.header
        name = header.backend
        try:
            name, kind = self._registry.choose(header.model, name, header.task)
            resident = load.run(name, kind(), self._device, self._executor.compute_threads)
            if load.cancelled.is_set():
                return failures.from_load(Cancelled(), header.model, name, *load.about)
        except BaseException as error:
            return failures.from_load(error, header.model, name, *load.about)
        load.done()
        self._residents.add(*resident)
        hosted, loaded, image = resident
        # Before the answer: who has it may kill the worker, which is then to blame on nobody.
        load.activity.end()
        self._channel.send(
            Kind.LOADED, frames.FINAL, load.request, load.generation, loaded.SerializeToString()
        )
        if image is not None and not loaded.adopted_bytes:
            self._keeper.keep(hosted.key, image)
        return None


class _Load:
    """One load: what was asked, how far it is, and what it holds."""

    def __init__(
        self,
        device: str,
        imaging: Imaging,
        channel: Channel,
        activity: Activity,
        frame: Frame,
    ) -> None:
        self.request = frame.request
        self.generation = frame.generation
        self.header = worker_pb2.LoadHeader.FromString(frame.header)
        self.cancelled = threading.Event()
        self.activity = activity
        self.about = (self.header.task, device, Path(self.header.model_dir))
        self._channel = channel
        self._imaging = imaging
        self._draft = Draft(imaging)
        self._image: Image | None = None
        self._backend: Backend | None = None
        self._adoption: Adoption | None = None
        self._reported_at = 0.0

    def run(
        self, name: str, backend: Backend, device: str, threads: int
    ) -> "tuple[Hosted, worker_pb2.LoadedHeader, Image | None]":
        """Load, ask for the signature, and check that the model answers."""
        header = self.header
        begin = time.monotonic()
        self._backend = backend
        if header.adopt:
            self._adoption = self._draft.adopt(
                (header.instance, self.generation), self.cancelled.is_set, self._report
            )
        backend.load(
            LoadContext(
                model=header.model,
                model_dir=Path(header.model_dir),
                task=header.task,
                device=device,
                precision=header.precision,
                max_batch_size=header.max_batch_size,
                max_sequence_length=header.max_sequence_length,
                compute_threads=threads,
                options=json_format.MessageToDict(header.backend_options),
                report=self._report,
                cancelled=self.cancelled.is_set,
                memory=self._draft.memory,
                kept=self._adoption and self._adoption.weights,
            )
        )
        image = self._draft.finish(backend, keep=header.keep_image)
        self._image = image
        measured_bytes = max(backend.measured_bytes, 0 if image is None else image.device_bytes)
        self._send_progress(Phase.CHECKING, measured_bytes, measured_bytes)
        signature = backend.signature()
        self._check(name, backend)
        hosted = Hosted(
            header.instance,
            self.generation,
            header.model,
            header.version,
            device,
            name,
            backend,
            signature,
            batch_limit(header, signature),
            header.max_batch_delay_us * 1000,
        )
        loaded = worker_pb2.LoadedHeader(
            backend=name,
            platform=backend.platform,
            measured_bytes=measured_bytes,
            host_bytes=0 if image is None else image.host_bytes,
            inputs=_specs(signature, "inputs"),
            outputs=_specs(signature, "outputs"),
            max_batch_size=signature.max_batch_size,
            load_s=time.monotonic() - begin,
            dynamic_batching=hosted.batch_limit > 1,
            decoupled=signature.decoupled,
            adopted_bytes=self._adopted_bytes(image),
        )
        return hosted, loaded, image

    def done(self) -> None:
        """Have what was adopted be this load's own."""
        if self._adoption is not None:
            self._adoption.done()

    def _adopted_bytes(self, image: "Image | None") -> int:
        adoption = self._adoption
        used = adoption is not None and image is not None and image.uses(adoption.part)
        return adoption.part.size if adoption is not None and used else 0

    def discard(self) -> None:
        """Let go of what a load that failed had taken."""
        if self._backend is not None:
            let_go(self._backend)
            self._backend = None
        if self._adoption is not None:
            self._adoption.weights = None
        self._draft.discard()
        image, self._image = self._image, None
        self._imaging.close(image)

    def _check(self, name: str, backend: Backend) -> None:
        report = backend.health_check()
        if not report.ok:
            model = self.header.model
            raise ModelhostError(
                Reason.LOAD_FAILED,
                f"Model '{model}' was loaded and failed its first health check: {report.message}",
                {"model": model, "backend": name, "cause": report.message},
            )

    def _report(self, done_bytes: int, total_bytes: int) -> None:
        self.activity.advance()
        now = time.monotonic()
        if now - self._reported_at >= PROGRESS_INTERVAL_S or done_bytes == total_bytes:
            self._reported_at = now
            self._send_progress(Phase.LOADING, done_bytes, total_bytes)

    def _send_progress(self, phase: Phase, done_bytes: int, total_bytes: int) -> None:
        header = worker_pb2.LoadProgressHeader(
            phase=phase, done_bytes=done_bytes, total_bytes=total_bytes
        )
        self._channel.send(
            Kind.LOAD_PROGRESS, 0, self.request, self.generation, header.SerializeToString()
        )


def batch_limit(header: worker_pb2.LoadHeader, signature: Signature) -> int:
    """Return how many items may run together; 1 = each request runs by itself."""
    if not signature.joinable or header.no_dynamic_batching:
        return 1
    return signature.max_batch_size or DEFAULT_ITEMS


def _specs(signature: Signature, side: str) -> list[worker_pb2.TensorSpec]:
    return [
        worker_pb2.TensorSpec(
            name=spec.name,
            datatype=spec.datatype,
            shape=spec.shape,
            description=spec.description,
        )
        for spec in getattr(signature, side)
    ]
