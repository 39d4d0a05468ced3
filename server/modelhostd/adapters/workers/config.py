"""How workers are started and watched: one frozen value from the composition root."""

import sys
from collections.abc import Mapping
from dataclasses import field

from modelhostd.core.values import dataclass

MIB = 2**20

PASSED_ON = frozenset(
    {
        "HOME",
        "LANG",
        "LANGUAGE",
        "LD_LIBRARY_PATH",
        "PATH",
        "TMPDIR",
        "TZ",
        "XDG_CACHE_HOME",
        "CUDA_VISIBLE_DEVICES",
        "CUDA_HOME",
        "CUDA_CACHE_PATH",
        "CUDA_MODULE_LOADING",
        "NVIDIA_VISIBLE_DEVICES",
        "NVIDIA_DRIVER_CAPABILITIES",
        "PYTORCH_ALLOC_CONF",
        "PYTORCH_CUDA_ALLOC_CONF",
        "OMP_NUM_THREADS",
        "MKL_NUM_THREADS",
        "OPENBLAS_NUM_THREADS",
        "ONEDNN_PRIMITIVE_CACHE_CAPACITY",
    }
)
"""Variables of the daemon that its workers see. No tokens, no proxies, no endpoints: a worker talks to nobody."""
PASSED_ON_PREFIXES = ("LC_",)

OWN = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_TOKEN_PATH": "/dev/null",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    # Numbers of GPUs as NVML gives them, which is how devices are numbered.
    "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
}
"""What every worker gets: nothing is fetched, nothing is reported."""


@dataclass(frozen=True, slots=True)
class WorkersConfig:
    """Settings of all workers. Times are in seconds, sizes in bytes."""

    backends: tuple[str, ...] = ("transformers", "text-generation", "identity")
    """Backends that may serve, in the order in which one is chosen for a task: the name of an entry
    point, or ``name = package.module:Class``."""
    python: str = sys.executable
    """Interpreter of the workers; it must have the same modelhost installed."""
    import_paths: tuple[str, ...] = ()
    """Further folders that a worker imports from, after the installed packages."""
    arena_bytes: int = 64 * MIB
    """Size of each of a worker's two arenas at most; RAM is taken as it is needed, and kept as long as the worker lives."""
    host_ready_bytes: int = 0
    """Host memory for weights that each worker takes at its start and keeps; more comes and goes with models."""
    max_message_bytes: int = 64 * MIB
    """Largest encoded request or response."""
    inline_bytes: int = 256 * MIB
    """Bytes of large requests that may be in flight in one worker beside its arena, when that is full."""
    queue_limit: int = 1024
    """Requests in flight in one worker; one more is refused with QUEUE_FULL."""
    executor_threads: int = 0
    """Threads that run inference in a worker; 0 = by the number of cores, 2 to 4."""
    compute_threads: int = 0
    """Threads that one computation on the CPU may take; 0 = what the environment or the library says."""
    heartbeat_interval_s: float = 1.0
    hang_timeout_s: float = 60.0
    """Without a heartbeat, or without progress of a request that runs, for this long a worker is hung."""
    escalation_s: float = 0.4
    """Between the steps against a hung worker: stacks to its log, abort, kill. Short: until the last of them
    its instances still count as READY."""
    start_timeout_s: float = 120.0
    """From exec until the worker's libraries are imported and it takes requests."""
    check_timeout_s: float = 30.0
    """A health check without an answer for this long says UNHEALTHY."""
    load_cancel_timeout_s: float = 120.0
    """A cancelled load that does not end for this long costs its worker."""
    patience_s: float = 5.0
    """A load that would wait longer than this for a crashed worker's back-off is refused at once."""
    log_level: str = "info"
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables that the operator sets for workers, over all others."""

    def allowed_backends(self) -> list[tuple[str, str]]:
        """Return ``backends`` as (name, target), the target empty for an entry point."""
        pairs = (entry.partition("=") for entry in self.backends)
        return [(name.strip(), target.strip()) for name, _, target in pairs]


def environment(config: WorkersConfig, own: Mapping[str, str]) -> dict[str, str]:
    """Return a worker's whole environment, given the daemon's ``own``."""
    passed = {
        name: value
        for name, value in own.items()
        if name in PASSED_ON or name.startswith(PASSED_ON_PREFIXES)
    }
    # Read when a library of the worker is imported; torch and the BLAS libraries all follow it.
    threads = {"OMP_NUM_THREADS": str(config.compute_threads)} if config.compute_threads else {}
    return {**passed, **OWN, **threads, **config.environment}
