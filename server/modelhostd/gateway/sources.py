"""Whom the metrics ask."""

from collections.abc import Callable, Mapping
from dataclasses import field

from modelhostd.core.rpc_stats import RpcStats
from modelhostd.core.tallies import Tallies
from modelhostd.core.values import dataclass
from modelhostd.host import Host


@dataclass(frozen=True, slots=True)
class Sources:
    """The host, and what is not the host's: given by whoever builds the gateway."""

    host: Host
    rpc: RpcStats
    tallies: Tallies
    build: Mapping[str, str] = field(default_factory=dict)
    """Labels of ``build_info``: versions."""
    subscriber_count: Callable[[], int] = lambda: 0
    inference_bytes: Callable[[], int] = lambda: 0
    worker_pids: Callable[[], Mapping[int, str]] = dict
