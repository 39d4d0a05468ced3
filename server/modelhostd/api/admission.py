"""Admission: how many calls may be under way, unary calls and streams counted apart.

grpc's own limit counts idle streams beside calls, so that ten subscribers starve everybody. Here each
group of methods has a limit of its own, and one method never takes more than three quarters of it.
"""

import enum
from collections.abc import Mapping

from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.values import dataclass

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


class _Count:
    """Calls under way, of a group or of a method."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0


class Gate:
    """The way in for one method's calls, with its counters at hand: each call passes it twice."""

    __slots__ = ("_admission", "_count", "_group_count", "_method", "_name", "_shared")

    def __init__(self, admission: "Admission", group: Group, method: str) -> None:
        self._admission = admission
        # Not the group: an enum's value is a call in Python.
        self._name = group.value
        self._method = method
        self._group_count = admission.counts[group]
        self._count = _Count()
        self._shared = group in (Group.CONTROL, Group.STREAM)

    def enter(self) -> None:
        """Count a call in, or raise QUEUE_FULL with a RetryInfo."""
        limit = self._admission.limit_of[self._name]
        under_way = self._group_count.value
        if under_way >= limit:
            raise _full(self._name, under_way, limit)
        if self._shared:
            share = max(1, int(limit * METHOD_SHARE))
            if self._count.value >= share:
                what = f"calls of {self._method.rpartition('/')[2]}"
                raise _full(what, self._count.value, share)
        self._group_count.value = under_way + 1
        self._count.value += 1

    def leave(self) -> None:
        """Count a call out."""
        self._group_count.value -= 1
        self._count.value -= 1


class Admission:
    """Counts the calls under way by group and by method. ``limits`` may be replaced at any time."""

    def __init__(self, limits: AdmissionLimits) -> None:
        self.counts: Mapping[Group, _Count] = {group: _Count() for group in Group}
        self._gates: dict[tuple[Group, str], Gate] = {}
        self.limits = limits

    @property
    def limits(self) -> AdmissionLimits:
        """How many calls of each group may be under way."""
        return self._limits

    @limits.setter
    def limits(self, limits: AdmissionLimits) -> None:
        self._limits = limits
        # By the groups' texts: hashing a member of an enum is a call in Python.
        self.limit_of: Mapping[str, int] = {group.value: limits.of(group) for group in Group}

    def gate(self, group: Group, method: str) -> Gate:
        """Return the way in for a method's calls, the same for all listeners."""
        key = group, method
        if key not in self._gates:
            self._gates[key] = Gate(self, group, method)
        return self._gates[key]

    def enter(self, group: Group, method: str) -> None:
        """Count a call in, or raise QUEUE_FULL with a RetryInfo."""
        self.gate(group, method).enter()

    def leave(self, group: Group, method: str) -> None:
        """Count a call out."""
        self.gate(group, method).leave()

    def count(self, group: Group) -> int:
        """Return how many calls of a group are under way."""
        return self.counts[group].value


def _full(what: str, count: int, limit: int) -> ModelhostError:
    return ModelhostError(
        Reason.QUEUE_FULL,
        f"{count} {what} are under way already (limit {limit}); try again in a second, or end one",
        {"queue": str(count), "limit": str(limit)},
        retry_delay_s=RETRY_DELAY_S,
    )
