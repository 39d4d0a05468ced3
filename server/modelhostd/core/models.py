"""Models as they are registered: their sources, configs, and files on disk. Plain immutable values."""

from collections.abc import Mapping
from dataclasses import field
from typing import Any

from modelhostd.core.states import ArtifactState, Isolation
from modelhostd.core.values import dataclass
from modelhostd.core.work import StoredError


@dataclass(frozen=True, slots=True)
class Source:
    """Where a model's files come from; the patterns belong to the model, not to one request.

    ``uri`` is canonical and carries no revision (``hf://org/name``); ``revision`` is what was asked
    for (a branch, tag or commit; empty = the source's default). Empty patterns = the default choice.
    ``more_uris`` are further URLs beside the one of a file, one file each.
    """

    uri: str
    revision: str = ""
    allow_patterns: tuple[str, ...] = ()
    ignore_patterns: tuple[str, ...] = ()
    more_uris: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """How a model is loaded and kept. ``None`` = the host's default. See ModelConfig in the protos.

    A negative ``keep_alive_s`` = never unloaded for being idle, whatever the host's default is;
    ``host_keep_alive_s`` says the same of host memory. Which fields act at once is in
    ``LIVE_CONFIG_FIELDS``; the rest needs a reload.
    """

    backend: str = ""
    device: str = ""
    precision: str = ""
    max_batch_size: int | None = None
    max_sequence_length: int | None = None
    keep_alive_s: float | None = None
    load_timeout_s: float | None = None
    load_on_demand: bool | None = None
    autoload: bool = False
    priority: int = 0
    queue_limit: int | None = None
    isolation: Isolation = Isolation.SHARED
    backend_options: Mapping[str, Any] = field(default_factory=dict)
    host_keep_alive_s: float | None = None
    fallback_model: str = ""
    max_batch_delay_s: float | None = None
    dynamic_batching: bool | None = None


LIVE_CONFIG_FIELDS = frozenset(
    {
        "keep_alive_s",
        "host_keep_alive_s",
        "load_on_demand",
        "autoload",
        "priority",
        "queue_limit",
        "load_timeout_s",
        "fallback_model",
    }
)


@dataclass(frozen=True, slots=True)
class Requirements:
    """What a model says that it needs; zero and empty = nothing said."""

    device_bytes: int = 0
    compute_capability: str = ""
    packages: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ModelFile:
    """One file of an artifact: its path inside the model (``/``-separated), size and digest."""

    path: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Artifact:
    """One revision of a model's files on disk as a whole.

    ``version`` rises by one with each new revision of the model and is OIP's ``model_version``.
    ``revision`` is the source's own (a commit on the Hub); empty until planned.
    ``predicted_bytes`` is what loading takes on a device, from the safetensors headers; 0 = unknown.
    """

    version: int
    state: ArtifactState
    revision: str = ""
    size_bytes: int = 0
    file_count: int = 0
    predicted_bytes: int = 0
    create_time: float = 0.0
    available_time: float = 0.0
    operation: str = ""
    error: StoredError | None = None
    source: Source | None = None
    """What the model's source was when this artifact was asked for; another one needs a download."""
    allow_unsafe: bool = False
    """Whether files that can run code when loaded may be among its files."""
    verify_time: float = 0.0
    """When its files were last hashed again and found right; 0 = never."""


@dataclass(frozen=True, slots=True)
class Model:
    """A registered model. ``edit`` counts changes of client-writable fields; it makes the etag.

    ``artifacts`` stand oldest first; ``last_version`` is the highest version ever given out.
    """

    id: str
    uid: str
    source: Source
    create_time: float
    update_time: float
    display_name: str = ""
    description: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    licence: str = ""
    task: str = ""
    config: ModelConfig = field(default_factory=ModelConfig)
    requirements: Requirements = field(default_factory=Requirements)
    base_model: str = ""
    pinned: bool = False
    artifacts: tuple[Artifact, ...] = ()
    last_version: int = 0
    chosen_version: int = 0
    """The version that ReloadModel rolled back to; 0 = the newest."""
    edit: int = 1

    @property
    def etag(self) -> str:
        """Opaque version of the client-writable fields."""
        return f"{self.uid[:8]}-{self.edit}"

    @property
    def newest(self) -> Artifact | None:
        """The newest artifact whose files are whole and verified."""
        return next(
            (a for a in reversed(self.artifacts) if a.state is ArtifactState.AVAILABLE), None
        )

    @property
    def available(self) -> Artifact | None:
        """What a load takes: the chosen version while its files are there, else the newest."""
        if self.chosen_version:
            for artifact in self.artifacts:
                whole = artifact.state is ArtifactState.AVAILABLE
                if whole and artifact.version == self.chosen_version:
                    return artifact
        return self.newest

    @property
    def state(self) -> ArtifactState:
        """The state of the model's files: AVAILABLE if any artifact is, else the newest one's."""
        if self.available is not None:
            return ArtifactState.AVAILABLE
        return self.artifacts[-1].state if self.artifacts else ArtifactState.ABSENT
