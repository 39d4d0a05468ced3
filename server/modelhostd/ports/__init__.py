"""What the host task uses of the world, as Protocols; adapters implement them, fakes stand in.

Each port has one contract suite under ``tests/contract`` that the real adapter and the fake both pass.
Every method that fails raises :class:`modelhostd.core.errors.ModelhostError` and nothing else.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from modelhostd.core.resources import (
    Event,
    Health,
    Isolation,
    Kind,
    ModelConfig,
    ModelFile,
    Progress,
    Resource,
    Source,
)
from modelhostd.ports.files import Files as Files
from modelhostd.ports.files import Pruned as Pruned
from modelhostd.ports.files import Quarantined as Quarantined
from modelhostd.ports.files import StorageFinding as StorageFinding
from modelhostd.ports.files import StorageUse as StorageUse


class Clock(Protocol):
    """Time, passed in so that tests can jump."""

    def time(self) -> float:
        """Return seconds since the epoch, for what people read."""

    def monotonic(self) -> float:
        """Return seconds that never go back, for deadlines and ages."""

    async def sleep(self, delay_s: float) -> None:
        """Wait ``delay_s`` seconds."""


# --- database -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Change:
    """One row of the registry after a change; ``resource`` None = the row is gone."""

    kind: Kind
    key: str
    resource: Resource | None


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """The answer to a request id: who asked what (hash), and the name of what came of it."""

    request_id: str
    fingerprint: str
    answer: str
    time: float


@dataclass(frozen=True, slots=True)
class Batch:
    """What one transaction commits: rows AND their events, together or not at all."""

    changes: tuple[Change, ...]
    events: tuple[Event, ...]
    requests: tuple[RequestRecord, ...] = ()
    compact_before: int = 0
    """Delete events with a smaller sequence; 0 = none."""


@dataclass(frozen=True, slots=True)
class Stored:
    """Everything the database held when it was opened. Events are read page by page, not here."""

    store_id: str
    resources: Mapping[Kind, Mapping[str, Resource]]
    requests: Sequence[RequestRecord]
    first_sequence: int
    """The oldest event that can still be read; ``last_sequence + 1`` when there is none."""
    last_sequence: int


class Database(Protocol):
    """The registry on disk: SQLite, one connection in one thread, synchronous=FULL."""

    async def open(self) -> Stored:
        """Open or create, migrate, and read everything.

        Raises STORAGE_ERROR for a corrupt database or one of a newer schema, naming the path and
        the next step; the file is left as it was.
        """

    async def commit(self, batch: Batch) -> None:
        """Write one batch durably. Raises INSUFFICIENT_DISK_SPACE or STORAGE_ERROR; then nothing of
        the batch is stored. Commits go before reads that wait.
        """

    async def read_events(self, start_sequence: int, limit: int) -> Sequence[Event]:
        """Return up to ``limit`` (at most 256) events from ``start_sequence`` on, in order."""

    async def close(self) -> None:
        """Checkpoint and close. Waits for the commit in flight."""


# --- downloads ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """One file at a source. ``sha256`` or ``git_sha1`` is empty where the source does not say."""

    path: str
    size_bytes: int
    sha256: str = ""
    git_sha1: str = ""
    checksum: str = ""
    """``sha1:`` or ``md5:`` and hex digits, where the source knows no better one."""
    validator: str = ""
    """What changes with the file where there is no digest: an ETag, a time, an id of the source's."""


@dataclass(frozen=True, slots=True)
class SourceFacts:
    """What a source says of a model without a byte of its weights: the plan of a download."""

    source: Source
    revision: str
    files: Sequence[RemoteFile]
    """The files that would be fetched, after the patterns."""
    skipped: Sequence[tuple[str, str]] = ()
    """(path, why) of the files that would not be."""
    task: str = ""
    """The source's own word (``pipeline_tag``), before it is mapped to a task that a backend serves."""
    licence: str = ""
    tags: Sequence[str] = ()
    gated: bool = False
    private: bool = False
    predicted_bytes: int = 0
    """Device memory for the weights, from the safetensors headers; 0 = cannot be told yet."""


@dataclass(frozen=True, slots=True)
class DownloadJob:
    """One artifact to fetch. ``manifest`` is stored beside the files: enough to rebuild the row."""

    operation: str
    model: str
    version: int
    source: Source
    manifest: Mapping[str, Any]
    allow_unsafe: bool = False
    rate_limit: int = 0
    """Bytes a second; 0 = none of its own."""


@dataclass(frozen=True, slots=True)
class FileProgress:
    """How far one file of a running download is."""

    path: str
    done_bytes: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Fetched:
    """An artifact that is whole, verified and durable on disk; only its row is missing."""

    facts: SourceFacts
    files: Sequence[ModelFile]
    reused_bytes: int
    predicted_bytes: int


class Downloads(Protocol):
    """Sources and the way of their bytes into the blob store."""

    async def inspect(self, source: Source) -> SourceFacts:
        """Ask the source. Raises the reasons of DESIGN section 9 (GATED, SOURCE_NOT_FOUND, ...)."""

    async def fetch(self, job: DownloadJob, report: Callable[[Progress], None]) -> Fetched:
        """Plan, fetch, verify and publish one artifact; joinable work is the caller's business.

        Cancelling the task stops the bytes at once, keeps what can be resumed in staging, and leaves
        nothing visible. ``report`` is called in the loop's thread, at most 10 times a second.
        """

    def limit(self, rate: int) -> None:
        """Let all downloads together fetch ``rate`` bytes a second from now on; 0 = no limit."""

    def limit_one(self, operation: str, rate: int) -> None:
        """The same for one download that is being fetched; its limit before was its job's."""

    def file_progress(self, operation: str) -> Sequence[FileProgress]:
        """Return how far each file of a running fetch is, in the order of the paths; none before
        its plan is there, and for one that is not running.
        """


# --- devices and workers ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """A device as it was found; budgets are the host's business."""

    id: str
    kind: str
    display_name: str
    uuid: str
    total_bytes: int
    compute_capability: str = ""
    driver_version: str = ""


class Devices(Protocol):
    """Discovery and foreign use of devices, without CUDA in this process (NVML, /proc, cgroup)."""

    async def discover(self) -> Sequence[DeviceFacts]:
        """Return the devices of this machine; always at least ``cpu``."""

    async def foreign_bytes(self, device: str, own_pids: Sequence[int]) -> int:
        """Return bytes used on the device by processes that are not ours; 0 where unknown."""


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
    isolated: bool = False
    """Whether it gets a worker of its own though its config does not say so."""

    @property
    def own_worker(self) -> bool:
        """Whether it has a worker of its own."""
        return self.isolated or self.config.isolation is Isolation.PROCESS


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One input or output: OIP name, datatype and shape (-1 = any size)."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    description: str = ""


@dataclass(frozen=True, slots=True)
class Loaded:
    """What a worker says of an instance that it has loaded and whose first health check passed."""

    backend: str
    platform: str
    measured_bytes: int
    inputs: Sequence[TensorSpec]
    outputs: Sequence[TensorSpec]
    max_batch_size: int
    load_s: float


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


@dataclass(frozen=True, slots=True)
class InferReply:
    """A worker's answer: the encoded ModelInferResponse and what ModelStatistics needs."""

    payload: bytes
    item_count: int
    batch_size: int
    queue_ns: int
    input_ns: int
    infer_ns: int
    output_ns: int


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
        """Free an instance; returns when its memory is free. Idempotent for unknown instances."""

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

    async def check(self, device: str, instance: str, generation: int) -> tuple[Health, str]:
        """Run the instance's health check (a canary inference): health and one sentence why."""

    def pids(self) -> Mapping[int, str]:
        """Return worker process id -> device."""

    async def stop(self, timeout_s: float) -> None:
        """End every worker: SIGTERM, then SIGKILL at ``timeout_s``; returns when all are reaped."""
