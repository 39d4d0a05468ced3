"""Operations as they are kept: how far each is, and how it ended. Plain immutable values."""

from collections.abc import Mapping
from dataclasses import field
from typing import Any

from modelhostd.core.states import OperationKind, OperationState, Phase
from modelhostd.core.values import dataclass


@dataclass(frozen=True, slots=True)
class StoredError:
    """An error as an operation or instance remembers it: what the same failed call would carry."""

    reason: str
    message: str
    metadata: Mapping[str, str] = field(default_factory=dict)
    retry_delay_s: float | None = None


@dataclass(frozen=True, slots=True)
class Retry:
    """What failed last, and when it is tried again.

    ``attempt``: failed tries in a row without a gain. ``next_time``: seconds since the epoch.
    """

    attempt: int
    reason: str
    message: str
    next_time: float


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a running operation is. ``total_bytes`` is 0 until the plan is known."""

    phase: Phase = Phase.NONE
    done_bytes: int = 0
    total_bytes: int = 0
    done_files: int = 0
    total_files: int = 0
    bytes_per_second: float = 0.0
    eta_s: float | None = None
    reused_bytes: int = 0
    file: str = ""
    attempt: int = 0
    retry: Retry | None = None
    restarted_files: int = 0


@dataclass(frozen=True, slots=True)
class Operation:
    """One piece of long work. ``join_key`` tells equal work; ``result`` is JSON-like, by kind."""

    id: str
    kind: OperationKind
    state: OperationState
    create_time: float
    model: str = ""
    join_key: str = ""
    start_time: float = 0.0
    end_time: float = 0.0
    queue_position: int = 0
    priority: int = 0
    rate_limit_bytes_per_second: int = 0
    progress: Progress = field(default_factory=Progress)
    result: Mapping[str, Any] = field(default_factory=dict)
    error: StoredError | None = None
    principal: str = ""
    cancel_requested: bool = False
