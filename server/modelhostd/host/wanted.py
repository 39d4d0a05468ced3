"""One load that waits for memory or runs, and what it says when it does not come to its end."""

import asyncio
import math
from dataclasses import field

from modelhostd.core import residency as rules
from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.names import model_not_found
from modelhostd.core.registry import not_downloaded
from modelhostd.core.resources import Model
from modelhostd.core.values import dataclass
from modelhostd.host.routes import Route
from modelhostd.ports import LoadSpec

WORKER_LOST_RETRIES = 1
MEMORY_RETRIES = 1
ABANDONED_S = 10.0
"""How long a load keeps its place while none of the requests that want it waits: clients that give up try again."""


@dataclass(slots=True, eq=False)
class Wanted:
    """A load that waits for memory or runs. Times are monotonic seconds.

    ``number`` tells it from every other load; ``operations`` are those that end with it; ``generation``
    is that of the instance that was made for it, 0 until there is one.
    """

    number: int
    model: str
    bytes: int
    """Of its device, ``working_bytes`` included."""
    device: str
    priority: int
    since: float
    deadline: float
    operations: list[str] = field(default_factory=list)
    generation: int = 0
    task: asyncio.Task[None] | None = None
    retries: int = WORKER_LOST_RETRIES
    memory_retries: int = MEMORY_RETRIES
    working_bytes: int = 0
    """What is kept for its requests beside the weights."""
    host_bytes: int = 0
    """What a copy beside the device takes of host memory, where there is room for it."""
    keeps_copy: bool = False
    """Whether there is."""
    swapping: bool = False
    """Whether it comes from host memory: it needs no place among the loads from disk."""
    on_demand: bool = False
    """Whether only requests want it: while none of them waits it makes nobody leave, and then it ends."""
    alone_since: float = math.inf
    """Since when none of them does."""
    stopped_by: ModelhostError | None = None
    stays: bool = False
    """Whether the requests that wait for the model go on waiting when this load is stopped."""
    evicted: list[str] = field(default_factory=list)
    before: LoadSpec | None = None
    """Of a reload: how what served until then was loaded, and is loaded again where this fails."""
    instead: Model | None = None
    """The model as it was then, to be loaded in place of the model as it is; until that is changed once more."""
    lost: Route | None = None
    """The way to the instance that went with its worker, where this load brings it back."""

    @property
    def ask(self) -> rules.Want:
        """What the planner needs to know."""
        return rules.Want(
            self.model, self.bytes, self.device, self.priority, self.since, self.working_bytes
        )


def cancelled(wanted: Wanted) -> ModelhostError:
    """Return the error of a load that was stopped on request."""
    return ModelhostError(
        Reason.CANCELLED,
        f"loading model '{wanted.model}' was cancelled",
        {"operation": wanted.operations[0]} if wanted.operations else {},
    )


def abandoned(wanted: Wanted) -> ModelhostError:
    """Return the error of a load that requests wanted, all of which gave up while it waited for memory."""
    return ModelhostError(
        Reason.CANCELLED,
        f"loading model '{wanted.model}' was cancelled: it waited for memory, and the requests that "
        "wanted it gave up",
        {"operation": wanted.operations[0]} if wanted.operations else {},
    )


def unexpected(wanted: Wanted) -> ModelhostError:
    """Return the error of a load that failed as none should."""
    return ModelhostError(
        Reason.LOAD_FAILED,
        f"loading model '{wanted.model}' failed; the daemon's log has the cause",
        {"model": wanted.model},
    )


def too_late(wanted: Wanted) -> ModelhostError:
    """Return the error of a load whose deadline has passed."""
    seconds = wanted.deadline - wanted.since
    return ModelhostError(
        Reason.LOAD_TIMEOUT,
        f"model '{wanted.model}' was not loaded within {seconds:g} s (config.load_timeout)",
        {"model": wanted.model, "timeoutSeconds": f"{seconds:g}"},
    )


def no_files(wanted: Wanted, model: Model | None) -> ModelhostError:
    """Return the error of a load whose model, or its files, went while it waited."""
    return model_not_found(wanted.model) if model is None else not_downloaded(model)


def shutting_down(model_id: str) -> ModelhostError:
    """Return the error of a load that the daemon's end took with it."""
    return ModelhostError(
        Reason.SHUTTING_DOWN,
        f"the daemon stops while model '{model_id}' is not loaded; load it again",
        retry_delay_s=2.0,
    )
