"""Admission: how many calls may be under way, unary calls and streams counted apart.

grpc's own limit counts idle streams beside calls, so that ten subscribers starve everybody. Here each
group of methods has a limit of its own, and one method never takes more than three quarters of it.
"""

import enum
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from modelhostd.core.errors import ModelhostError, Reason

METHOD_SHARE = 0.75
RETRY_DELAY_S = 1.0


class Group(enum.Enum):
    """What methods share a limit."""

    CONTROL = "calls"
    INFERENCE = "inference calls"
    STREAM = "streams"
    """Watches and waits: calls that are meant to last."""
    HEALTH = "health checks"
    """Apart, so that no load makes the host look dead."""


@dataclass(frozen=True, slots=True)
class AdmissionLimits:
    """How many calls of each group may be under way at one time."""

    control: int = 512
    inference: int = 1024
    stream: int = 512
    health: int = 256

    def of(self, group: Group) -> int:
        """Return the limit of one group."""
        limits: Mapping[Group, int] = {
            Group.CONTROL: self.control,
            Group.INFERENCE: self.inference,
            Group.STREAM: self.stream,
            Group.HEALTH: self.health,
        }
        return limits[group]


class Admission:
    """Counts the calls under way by group and by method. ``limits`` may be replaced at any time."""

    def __init__(self, limits: AdmissionLimits) -> None:
        self.limits = limits
        self._groups: Counter[Group] = Counter()
        self._methods: Counter[str] = Counter()

    def enter(self, group: Group, method: str) -> None:
        """Count a call in, or raise QUEUE_FULL with a RetryInfo."""
        limit = self.limits.of(group)
        count = self._groups[group]
        if count >= limit:
            raise _full(group.value, count, limit)
        if group in (Group.CONTROL, Group.STREAM):
            share = max(1, int(limit * METHOD_SHARE))
            if self._methods[method] >= share:
                raise _full(f"calls of {method.rpartition('/')[2]}", self._methods[method], share)
        self._groups[group] += 1
        self._methods[method] += 1

    def leave(self, group: Group, method: str) -> None:
        """Count a call out."""
        self._groups[group] -= 1
        self._methods[method] -= 1

    def count(self, group: Group) -> int:
        """Return how many calls of a group are under way."""
        return self._groups[group]


def _full(what: str, count: int, limit: int) -> ModelhostError:
    return ModelhostError(
        Reason.QUEUE_FULL,
        f"{count} {what} are under way already (limit {limit}); try again in a second, or end one",
        {"queue": str(count), "limit": str(limit)},
        retry_delay_s=RETRY_DELAY_S,
    )
