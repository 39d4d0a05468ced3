"""The worker processes as the host sees them: load, demote, promote, unload, infer, check."""

from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import NamedTuple, Protocol

from modelhostd.core.resources import Health, Isolation, ModelConfig, Progress
from modelhostd.core.values import dataclass


@dataclass(frozen=True, slots=True)
class LoadSpec:
    """Everything a worker needs to load one model."""

    model: str
    instance: str
    generation: int
    version: int
    model_dir: Path
    task: str
    config: ModelConfig
    predicted_bytes: int
    keep_image: bool = True
    """Whether host RAM may be held for an image of the weights, so that the instance can be demoted."""
    isolated: bool = False
    """Whether it gets a worker of its own though its config does not say so."""

    @property
    def own_worker(self) -> bool:
        """Whether it has a worker of its own."""
        return self.isolated or self.config.isolation is Isolation.PROCESS

    @property
    def owner(self) -> str:
        """The model whose worker it is in; empty = the shared one."""
        return self.model if self.own_worker else ""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One input or output: OIP name, datatype and shape (-1 = any size)."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    description: str = ""


@dataclass(frozen=True, slots=True)
class Loaded:
    """What a worker says of an instance that is on its device now: loaded and checked, or promoted."""

    backend: str
    platform: str
    measured_bytes: int
    inputs: Sequence[TensorSpec]
    outputs: Sequence[TensorSpec]
    max_batch_size: int
    load_s: float
    dynamic_batching: bool = False
    """Whether requests that wait at the same time are run together."""
    decoupled: bool = False
    """Whether one request may get several responses, or none."""
    host_bytes: int = 0
    """Host RAM that the instance's image holds beside ``measured_bytes``; 0 = there is none, and it cannot be
    demoted: so on ``cpu``, where the parameters are views of the image itself."""
    adopted_bytes: int = 0
    """Bytes of weights that an earlier worker had left in host RAM, and that were not read again."""


@dataclass(frozen=True, slots=True)
class WorkerExit:
    """Why a worker is gone. ``blamed`` is the model that was executing, or empty."""

    device: str
    pid: int
    exit: str
    """``exit code 70``, ``signal SIGKILL``, ``hung: no progress for 30 s`` ..."""
    blamed: str
    stderr_tail: str
    model: str = ""
    """The model whose own worker it was (isolation PROCESS); empty = the shared worker."""
    kept: Mapping[tuple[str, int], int] = field(default_factory=dict)
    """What stays in host RAM though the worker is gone, of instances and generations: bytes of their weights. They are as
    if demoted: ``promote`` brings them back, ``unload`` frees them."""


class InferReply(NamedTuple):
    """A worker's answer: the encoded ModelInferResponse and what ModelStatistics needs."""

    payload: bytes
    item_count: int
    batch_size: int
    queue_ns: int
    input_ns: int
    infer_ns: int
    output_ns: int
    last: bool = False
    """Of a stream: whether this is known to be its last response."""


class WorkerListener(Protocol):
    """What a worker tells without being asked; called in the loop's thread, must not block."""

    def worker_ready(self, device: str, pid: int) -> None:
        """A worker (or its replacement) takes commands; its instances are gone and may be loaded."""

    def worker_exited(self, exit: WorkerExit) -> None:
        """A worker is reaped; what was in flight in it has failed; memory of its device is free."""


class Workers(Protocol):
    """The worker processes, one per device (and one per model with process isolation)."""

    def set_listener(self, listener: WorkerListener) -> None:
        """Set who is told of starts and exits; once, before the first load."""

    async def load(self, device: str, spec: LoadSpec, report: Callable[[Progress], None]) -> Loaded:
        """Load and health-check an instance, starting the device's worker first where needed.

        Raises LOAD_FAILED, UNSUPPORTED_MODEL, BACKEND_NOT_AVAILABLE, OUT_OF_DEVICE_MEMORY,
        WORKER_LOST. After an error nothing is held. Cancelling unloads what was begun.
        """

    async def unload(self, device: str, instance: str, generation: int) -> None:
        """Free an instance, its image included; returns when its memory is free. Idempotent for unknown
        instances. Cancelled, it goes on all the same, and raises when it is free; so do the two below.
        """

    async def demote(self, device: str, instance: str, generation: int) -> int:
        """Take an instance off its device and keep its image in host RAM; return the image's bytes.

        Returns when the device's memory is free. Until it is promoted its requests, those included that wait
        in the worker, are answered MODEL_NOT_LOADED; those that run are finished first. 0 = it could not be kept (it has
        no image, is unknown, or its worker ended meanwhile) and is gone, as after ``unload``. Raises nothing.
        """

    async def drop_copy(self, device: str, instance: str, generation: int) -> int:
        """Give the host RAM back that an instance's image holds beside its device (``Loaded.host_bytes``); return the bytes
        of it that are held still.

        It stays where it is and answers on; from then on ``demote`` frees it whole, and a lost worker leaves nothing of it.
        0 as a rule, also for what is unknown or lost meanwhile; more where something has a view of it, and of one that is
        demoted, to which nothing is done, nor to one on ``cpu``, whose image is no copy. Raises nothing.
        """

    async def promote(
        self, device: str, instance: str, generation: int, report: Callable[[Progress], None]
    ) -> Loaded:
        """Bring a demoted instance back to its device from its image: same instance, same generation.

        One whose worker is gone is loaded and checked, with the weights that stayed, where their checksum holds.
        Returns at once where it is there already. Raises WORKER_LOST and MODEL_NOT_LOADED (no image: load it
        anew), and OUT_OF_DEVICE_MEMORY. After that, and after a cancellation, it is still demoted.
        """

    def infer(
        self,
        device: str,
        instance: str,
        generation: int,
        payload: bytes,
        *,
        timeout_s: float | None,
        priority: int = 0,
        name: str = "",
    ) -> Awaitable[InferReply]:
        """Send one encoded ModelInferRequest, synchronously; the awaitable resolves to the answer.

        ``name`` is the name the request was routed by where it is not the model's id (a slot): the
        worker refuses a payload that it reads as naming another.

        Raises (from the awaitable) the worker's typed error, or WORKER_LOST. Cancelling it sends
        CANCEL and frees the caller at once; the arena slot stays taken until the worker's last frame.
        """

    def abort(self, device: str, instance: str, generation: int) -> None:
        """End every request in flight in an instance with CANCELLED, at once; what the worker is busy with stops
        at its next check.
        """

    def stream_infer(
        self,
        device: str,
        instance: str,
        generation: int,
        payload: bytes,
        *,
        timeout_s: float | None,
        priority: int = 0,
        name: str = "",
    ) -> AsyncGenerator[InferReply, None]:
        """Send one request and yield its responses in order; leaving the iterator cancels it.

        The worker waits where they are not taken: what lies here unread is bounded. Raises as ``infer`` does, from the call or
        from the iterator.
        """

    async def check(self, device: str, instance: str, generation: int) -> tuple[Health, str]:
        """Run the instance's health check (a canary inference): health and one sentence why."""

    def pids(self) -> Mapping[int, str]:
        """Return worker process id -> device."""

    def unowned_bytes(self) -> int:
        """Return the host RAM of what outlived its worker and is in no other one yet: no process's, so far."""

    async def stop(self, timeout_s: float) -> None:
        """End every worker: SIGTERM, then SIGKILL at ``timeout_s``; returns when all are reaped."""
