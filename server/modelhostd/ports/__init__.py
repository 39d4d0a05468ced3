"""What the host task uses of the world, as Protocols; adapters implement them, fakes stand in.

Each port has one contract suite under ``tests/contract`` that the real adapter and the fake both pass.
Every method that fails raises :class:`modelhostd.core.errors.ModelhostError` and nothing else.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from modelhostd.core.resources import (
    Event,
    Kind,
    ModelFile,
    Progress,
    Resource,
    Source,
)
from modelhostd.core.values import dataclass
from modelhostd.ports.files import Files as Files
from modelhostd.ports.files import Holdings as Holdings
from modelhostd.ports.files import Pace as Pace
from modelhostd.ports.files import Pruned as Pruned
from modelhostd.ports.files import Quarantined as Quarantined
from modelhostd.ports.files import Room as Room
from modelhostd.ports.files import StorageFinding as StorageFinding
from modelhostd.ports.files import StorageUse as StorageUse
from modelhostd.ports.workers import InferReply as InferReply
from modelhostd.ports.workers import Loaded as Loaded
from modelhostd.ports.workers import LoadSpec as LoadSpec
from modelhostd.ports.workers import TensorSpec as TensorSpec
from modelhostd.ports.workers import WorkerExit as WorkerExit
from modelhostd.ports.workers import WorkerListener as WorkerListener
from modelhostd.ports.workers import Workers as Workers


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
    """``sha1:``, ``md5:`` or ``crc32c:`` and hex digits, where the source knows no better one."""
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

    async def inspect(self, source: Source, *, allow_unsafe: bool = False) -> SourceFacts:
        """Ask the source what a download would fetch. Raises GATED, SOURCE_NOT_FOUND, UNSAFE_FILE, ..."""

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


# --- devices ------------------------------------------------------------------------------------


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
