"""What the daemon is told before it starts: defaults < modelhostd.toml < MODELHOST_* < flags.

Every key is a field below: its default, its meaning, its bounds, and whether a reload (SIGHUP) changes
it. In a file the fields of a section stand in a table (``[limits]``); as a variable a key is upper-case
with ``_`` for the dot (``MODELHOST_LIMITS_MAX_CONNECTIONS``); as a flag ``--set limits.max_connections=9``.
"""

import dataclasses
import os
from collections.abc import Callable, Mapping
from dataclasses import field
from pathlib import Path
from typing import Any

from modelhostd import config_values as values
from modelhostd.config_values import Address, ConfigError, Secret
from modelhostd.core import resources
from modelhostd.core.eviction import POLICIES
from modelhostd.core.storage import POLICIES as STORAGE_POLICIES
from modelhostd.core.values import dataclass

MIB = 2**20
GIB = 2**30
DAY_S = 86_400.0

LOG_LEVELS = ("debug", "info", "warning", "error")
SOURCES = ("hf", "https", "github", "ollama", "file", "s3", "gs")
LOG_FORMATS = ("auto", "json", "console")


@dataclass(frozen=True, slots=True)
class Rule:
    """How a key is read: its parser, its bounds and whether it acts without a restart."""

    parse: Callable[[Any], Any]
    live: bool = False
    least: float | None = None
    most: float | None = None
    choices: tuple[str, ...] = ()
    variables: tuple[str, ...] = ()
    """Variables of other programs that are honoured, before the key's own."""
    only_variable: bool = False
    """Never read from a file or a flag, where others could see it."""


def key(default: Any, parse: Callable[[Any], Any], **rule: Any) -> Any:
    """Return a dataclass field with its rule."""
    metadata = {"rule": Rule(parse, **rule)}
    if isinstance(default, dict):
        return field(default_factory=dict, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, slots=True)
class Limits:
    """What one client may cost the others."""

    inference_message_bytes: int = key(64 * MIB, values.size, least=MIB, most=2 * GIB - 1)
    """The largest inference request or response; one of Embed, Classify or Generate has 4 MiB at most."""
    control_message_bytes: int = key(256 * 1024, values.size, least=4096, most=64 * MIB)
    """The largest request of every other method."""
    inference_bytes_in_flight: int = key(GIB, values.size, live=True, least=MIB)
    """Inference requests held at one time, all clients together; more is RESOURCE_EXHAUSTED. So many bytes
    of answers beyond 64 KiB may wait for their clients to read, too."""
    max_connections: int = key(256, values.whole, least=1, most=65536)
    """Connections of each listener."""
    max_concurrent_streams: int = key(128, values.whole, least=1, most=65536)
    """Calls at one time on one connection."""
    max_unary_calls: int = key(512, values.whole, live=True, least=1, most=65536)
    """Control calls at one time."""
    max_inference_calls: int = key(1024, values.whole, live=True, least=1, most=65536)
    """Inference calls at one time."""
    max_streams: int = key(512, values.whole, live=True, least=1, most=65536)
    """Watches and other streams at one time."""


@dataclass(frozen=True, slots=True)
class DownloadConfig:
    """How sources are spoken to. Concurrency and rate are settings (below)."""

    sources: tuple[str, ...] = key(SOURCES, values.texts, choices=SOURCES)
    """The kinds of sources that may be used, by scheme; ``https`` stands for ``http`` too."""
    hosts: tuple[str, ...] = key(("*",), values.hosts)
    """Hosts that may be asked, redirects included: names or patterns (``*.example.com``). The next two
    keys and endpoints of one's own need no entry; the public ones do, with their CDNs."""
    private_hosts: tuple[str, ...] = key((), values.host_names)
    """Hosts that may be at addresses that are not public: of this machine, of the local network."""
    http_hosts: tuple[str, ...] = key((), values.host_names)
    """Hosts that may be asked without TLS."""
    endpoint: str = key("https://huggingface.co", values.endpoint, variables=("HF_ENDPOINT",))
    """The Hub. One of the operator's own may have any port and any address."""
    mirrors: tuple[str, ...] = key((), values.endpoints)
    """Endpoints that are asked for the Hub's repositories, in turn, where the one above is not reached."""
    github_endpoint: str = key("https://api.github.com", values.endpoint)
    """The API of the GitHub whose releases ``github://`` names."""
    ollama_endpoint: str = key("https://registry.ollama.ai", values.endpoint)
    """The registry of ``ollama://``."""
    s3_endpoint: str = key(
        "https://s3.amazonaws.com", values.endpoint, variables=("AWS_ENDPOINT_URL_S3",)
    )
    """The store of ``s3://``; any that speaks S3's protocol."""
    s3_region: str = key("us-east-1", values.text, variables=("AWS_REGION", "AWS_DEFAULT_REGION"))
    """The region of that store. Where a bucket of Amazon's is, is found out."""
    gs_endpoint: str = key("https://storage.googleapis.com", values.endpoint)
    """The store of ``gs://``."""
    cache: Path | None = key(None, values.absolute, variables=("HF_HUB_CACHE",))
    """Hugging Face's cache; a file that is in it is taken from there. Default: where it usually is."""
    cache_publish: bool = key(False, values.boolean)
    """Whether what comes from the Hub is copied into that cache, too, where other tools find it."""
    file_roots: tuple[Path, ...] = key((), values.absolutes)
    """Folders beneath which ``file:///...`` sources may be; none = no such sources."""
    token: Secret | None = key(
        None,
        lambda value: Secret(values.text(value).strip()),
        variables=("HF_TOKEN",),
        only_variable=True,
    )
    """The Hub's token; sent to the endpoint's own origin only."""
    github_token: Secret | None = key(
        None,
        lambda value: Secret(values.text(value).strip()),
        variables=("GITHUB_TOKEN",),
        only_variable=True,
    )
    """GitHub's token; sent to the API's own origin only."""
    s3_key: str = key("", values.text, variables=("AWS_ACCESS_KEY_ID",), only_variable=True)
    """The access key of ``s3_endpoint``."""
    s3_secret: Secret | None = key(
        None,
        lambda value: Secret(values.text(value).strip()),
        variables=("AWS_SECRET_ACCESS_KEY",),
        only_variable=True,
    )
    """Its secret; requests are signed with it, and it is never sent."""
    s3_session: Secret | None = key(
        None,
        lambda value: Secret(values.text(value).strip()),
        variables=("AWS_SESSION_TOKEN",),
        only_variable=True,
    )
    """What goes with a key that was lent for a time; sent with each request that is signed with that key."""
    gs_token: Secret | None = key(
        None,
        lambda value: Secret(values.text(value).strip()),
        variables=("GOOGLE_OAUTH_ACCESS_TOKEN",),
        only_variable=True,
    )
    """The access token of ``gs_endpoint``; sent to its own origin only."""
    gs_credentials: Path | None = key(
        None, values.absolute, variables=("GOOGLE_APPLICATION_CREDENTIALS",)
    )
    """A credential file of Google's, of mode 0600, that access tokens of ``gs_endpoint`` are made of: a
    service account's key, or a user's login."""
    credentials: Path | None = key(None, values.absolute)
    """A file of mode 0600 with tokens by origin; see ``core.credential_file``. Default: the credential
    ``modelhost`` of the service manager, where there is one."""
    connect_timeout_s: float = key(10.0, values.seconds, least=0.1, most=600)
    """How long a connection may take."""
    read_timeout_s: float = key(60.0, values.seconds, least=0.1, most=3600)
    """How long a source may send nothing."""
    attempts: int = key(5, values.whole, least=1, most=100)
    """How often one file is tried before the download fails."""
    deadline_s: float = key(0.0, values.seconds, most=30 * 86400)
    """How long one download may take in all, waiting for a network included; 0 = as long as it takes."""
    connections: int = key(8, values.whole, least=1, most=32)
    """Connections to one file at a time, at most; more than one only while that makes it faster."""
    per_host: int = key(0, values.whole, least=0, most=64)
    """Downloads from one host at a time; 0 = as many as run at all."""


@dataclass(frozen=True, slots=True)
class EventConfig:
    """How much of the event log is kept."""

    count: int = key(100_000, values.whole, live=True, least=100, most=10_000_000)
    """Events that can be read again."""
    age_s: float = key(30 * 86400.0, values.seconds, live=True, least=60)
    """The age at which an event goes."""


@dataclass(frozen=True, slots=True)
class OperationConfig:
    """How long finished operations are kept."""

    count: int = key(1000, values.whole, live=True, least=1, most=100_000)
    """Finished operations that can be read."""
    age_s: float = key(86400.0, values.seconds, live=True, least=60)
    """The age at which a finished operation goes."""


@dataclass(frozen=True, slots=True)
class WorkerConfig:
    """The processes that host models."""

    backends: tuple[str, ...] = key(("transformers", "text-generation", "identity"), values.texts)
    """Backends that may be used, by the name of their entry point."""
    arena_bytes: int = key(256 * MIB, values.size, least=MIB, most=64 * GIB)
    """Memory for tensors under way between the daemon and one worker, at most, each way. It is taken as it is needed,
    32 MiB at a time, and kept as long as the worker lives."""
    host_ready_bytes: int = key(0, values.size, most=1024 * GIB)
    """Host memory that each worker takes for weights at its start and keeps: a load into it is several times as
    fast. More than that is taken and given back as models come and go."""
    start_timeout_s: float = key(120.0, values.seconds, live=True, least=1, most=3600)
    """How long a worker may take to import its libraries."""
    hang_timeout_s: float = key(60.0, values.seconds, live=True, least=1, most=86400)
    """A worker that works on something and makes no progress for so long is replaced."""
    health_interval_s: float = key(60.0, values.seconds, most=86400)
    """How often each loaded model gets a small inference to see how it does; 0 = never by itself."""
    threads: int = key(0, values.whole, least=0, most=1024)
    """Threads for computing on the CPU; 0 = the library's choice."""


@dataclass(frozen=True, slots=True)
class DeviceConfig:
    """Devices that no hardware stands for."""

    sim_bytes: int = key(0, values.size, most=1024 * GIB)
    """Memory of ``devices/sim-0``, for tests and benches; 0 = there is none."""


@dataclass(frozen=True, slots=True)
class ShutdownConfig:
    """Deadlines of SIGTERM's way to the exit; each begins when the one before it ended."""

    drain_timeout_s: float = key(20.0, values.seconds, live=True, most=3600)
    """How long calls under way may go on."""
    worker_timeout_s: float = key(5.0, values.seconds, live=True, most=600)
    """How long workers may take to end before SIGKILL."""
    exit_timeout_s: float = key(15.0, values.seconds, live=True, least=1, most=600)
    """How long the rest may take before the process ends itself."""


@dataclass(frozen=True, slots=True)
class SettingsConfig:
    """Settings that UpdateSettings can change; what stands here holds again at every start.

    Meanings: ``core.resources.Settings``; ``log_level`` is a key of its own. ``keep_alive_s`` and
    ``host_keep_alive_s`` may be ``"never"``, ``host_budget_bytes`` ``"auto"``.
    """

    max_concurrent_downloads: int = key(3, values.whole, live=True, least=1, most=64)
    download_rate_limit_bytes_per_second: int = key(0, values.size, live=True)
    max_concurrent_loads: int = key(2, values.whole, live=True, least=1, most=64)
    keep_alive_s: float | None = key(None, values.seconds_or_never, live=True)
    host_budget_bytes: int | None = key(None, values.size_or_auto, live=True, most=2**50)
    host_keep_alive_s: float | None = key(None, values.seconds_or_never, live=True)
    load_on_demand: bool = key(True, values.boolean, live=True)
    queue_limit: int = key(256, values.whole, live=True, least=1, most=100_000)
    eviction_policy: str = key("lru", values.word, live=True, choices=POLICIES)
    min_residency_s: float = key(0.0, values.seconds, live=True, most=86400)
    drain_timeout_s: float = key(30.0, values.seconds, live=True, most=3600)
    disk_budget_bytes: int = key(0, values.size, live=True, most=2**60)
    storage_policy: str = key("off", values.word, live=True, choices=STORAGE_POLICIES)
    storage_ttl_s: float = key(30 * DAY_S, values.seconds, live=True, least=3600, most=3650 * DAY_S)
    verify_interval_s: float = key(0.0, values.seconds, live=True, most=3650 * DAY_S)
    verify_rate_bytes_per_second: int = key(64 * MIB, values.size, live=True, least=MIB)


@dataclass(frozen=True, slots=True)
class Config:
    """The configuration of one daemon. ``config_load.load`` makes it."""

    home: Path = key(Path(), values.absolute)
    """Where all state is. A service: $STATE_DIRECTORY; else $XDG_DATA_HOME/modelhost."""
    runtime_dir: Path = key(Path(), values.absolute)
    """Where the default sockets are: $RUNTIME_DIRECTORY, else ``run`` in the home."""
    grpc: tuple[str, ...] = key((), values.texts)
    """Where users are served: HOST:PORT or unix:/PATH. Default: 127.0.0.1:7411, modelhost.sock."""
    http: str = key("127.0.0.1:7412", values.http_address)
    """Where /metrics and /healthz are, HOST:PORT; empty or ``off`` = nowhere."""
    admin_socket: Path | None = key(None, values.socket_path)
    """Where operators are served. Default: admin.sock."""
    server_name: str = key("modelhost", values.text)
    """The name that ServerMetadata of the Open Inference Protocol says; some clients want ``triton``."""
    socket_mode: str = key("0660", values.text)
    """Mode of the users' sockets, octal."""
    loopback_is_operator: bool = key(True, values.boolean)
    """Whether a client on 127.0.0.1 may do what endangers others."""
    log_level: str = key("info", values.word, live=True, choices=LOG_LEVELS)
    log_format: str = key("auto", values.word, choices=LOG_FORMATS)
    """``auto``: JSON under journald, else readable."""
    uvloop: bool = key(True, values.boolean)
    """Whether the faster loop is used where it is installed."""
    budgets: Mapping[str, int] = key({}, values.sizes_by_name, live=True)
    """Bytes that modelhost may use, by device (cpu, cuda-0) or GPU UUID; the rest have defaults."""
    limits: Limits = field(default_factory=Limits)
    downloads: DownloadConfig = field(default_factory=DownloadConfig)
    events: EventConfig = field(default_factory=EventConfig)
    operations: OperationConfig = field(default_factory=OperationConfig)
    worker: WorkerConfig = field(default_factory=WorkerConfig)
    devices: DeviceConfig = field(default_factory=DeviceConfig)
    shutdown: ShutdownConfig = field(default_factory=ShutdownConfig)
    settings: SettingsConfig = field(default_factory=SettingsConfig)
    explicit: frozenset[str] = frozenset()
    """The keys that somebody set, dotted."""
    path: Path | None = None
    """The file that was read."""

    @property
    def addresses(self) -> tuple[Address, ...]:
        """Where users are served."""
        return tuple(values.address(text) for text in self.grpc)

    @property
    def http_address(self) -> Address | None:
        """Where HTTP is served, if it is."""
        return values.address(self.http) if self.http else None

    def settings_over(self, stored: resources.Settings) -> resources.Settings:
        """Return ``stored`` with the settings that were set here on purpose."""
        explicit = {
            name.removeprefix("settings."): value
            for name, value in flat(self).items()
            if name in self.explicit and (name.startswith("settings.") or name == "log_level")
        }
        return dataclasses.replace(stored, **explicit)


SECTIONS: Mapping[str, Any] = {
    found.name: found.type
    for found in dataclasses.fields(Config)
    if dataclasses.is_dataclass(found.type)
}
"""The tables of a file, and the class of each."""


def rules() -> Mapping[str, Rule]:
    """Return every key, dotted, with its rule."""
    found: dict[str, Rule] = {}
    sections: Mapping[str, Any] = {"": Config, **SECTIONS}
    for name, section in sections.items():
        for part in dataclasses.fields(section):
            if "rule" in part.metadata:
                found[f"{name}.{part.name}" if name else part.name] = part.metadata["rule"]
    return found


def flat(config: Config) -> Mapping[str, Any]:
    """Return every key, dotted, with its value."""
    found = {}
    for name in rules():
        section, _, last = name.rpartition(".")
        found[name] = getattr(getattr(config, section) if section else config, last)
    return found


def build(given: Mapping[str, Any], environment: Mapping[str, str]) -> Config:
    """Return the configuration with ``given`` (dotted key -> parsed value) over the defaults."""
    parts: dict[str, dict[str, Any]] = {"": {}, **{section: {} for section in SECTIONS}}
    for name, value in given.items():
        section, _, last = name.rpartition(".")
        parts[section][last] = value
    top = parts.pop("")
    home = top.setdefault("home", default_home(environment))
    runtime = top.setdefault("runtime_dir", default_runtime(home, environment))
    users = runtime / "modelhost.sock"
    top.setdefault("grpc", ("127.0.0.1:7411", f"unix:{users}"))
    top.setdefault("admin_socket", runtime / "admin.sock")
    for name, path in (("grpc", users), ("admin_socket", runtime / "admin.sock")):
        if name not in given:
            try:
                values.socket_path(path)
            except values.Expected as error:
                raise ConfigError("runtime_dir", f"runtime_dir: expected {error}") from None
    parts["downloads"].setdefault("cache", default_cache(environment))
    made = {section: SECTIONS[section](**kept) for section, kept in parts.items()}
    return Config(**top, **made, explicit=frozenset(given))


def default_home(environment: Mapping[str, str]) -> Path:
    """Return the service's state directory, or the user's own."""
    if state := environment.get("STATE_DIRECTORY"):
        return Path(state.partition(":")[0])
    data = environment.get("XDG_DATA_HOME") or ""
    base = Path(data) if os.path.isabs(data) else user_home(environment) / ".local" / "share"
    return base / "modelhost"


def default_runtime(home: Path, environment: Mapping[str, str]) -> Path:
    """Return the service's runtime directory, or ``run`` below the home."""
    runtime = environment.get("RUNTIME_DIRECTORY", "").partition(":")[0]
    return Path(runtime) if runtime else home / "run"


def default_cache(environment: Mapping[str, str]) -> Path:
    """Return where huggingface_hub keeps its cache (its own rules, as of 1.0)."""
    if hub := environment.get("HF_HOME"):
        return Path(hub).expanduser() / "hub"
    cache = environment.get("XDG_CACHE_HOME") or str(user_home(environment) / ".cache")
    return Path(cache).expanduser() / "huggingface" / "hub"


def user_home(environment: Mapping[str, str]) -> Path:
    """Return the user's home directory."""
    return Path(environment.get("HOME") or os.path.expanduser("~"))
