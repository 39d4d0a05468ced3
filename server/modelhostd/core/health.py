"""How an instance does, judged by canaries and by its requests against its own normal. Pure, bounded.

A canary (a small inference by the worker) that fails makes it UNHEALTHY; one that takes several times what its
canaries usually take, twice in a row, makes it DEGRADED. Requests are judged in windows of at least
``WINDOW_MIN``: by the share that the model itself failed (never by what its callers did wrong) and by the
median time that one item took. Without a normal of its own yet nothing that requests say makes it UNHEALTHY.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import reduce

from modelhostd.core.errors import Reason
from modelhostd.core.states import Health
from modelhostd.core.values import dataclass

FAULTS = frozenset({Reason.INFERENCE_FAILED, Reason.INTERNAL})
"""Errors that are the model's doing. A caller's mistake, a deadline, a full queue say nothing about it."""

WINDOW_MIN = 20
KNOWN_WINDOWS = 3
"""Windows after which the normal is known."""
LEARN, LEARN_SICK = 0.1, 0.02
"""What a window weighs in the normal, and one that is out of it: what lasts becomes normal in the end."""

FAULTY_SHARE, FAULTY_TIMES = 0.1, 3.0
FAILING_SHARE, FAILING_NORMAL = 0.9, 0.5
SLOW_OCTAVES = 2
"""The median of a window is slow from this many powers of two above the normal's 95th percentile on."""
SLOW_MIN_NS = 1_000_000
CANARY_SLOW_TIMES, CANARY_SLOW_S = 8.0, 0.5
CANARY_LEARN = 0.2
OCTAVES = 64

RELOADS_MAX = 3
RELOAD_WINDOW_S = 600.0

Verdict = tuple[Health, str]
GOOD: Verdict = (Health.HEALTHY, "")
_ORDER = (Health.UNKNOWN, Health.HEALTHY, Health.DEGRADED, Health.UNHEALTHY)


class Vitals:
    """What requests told since the last look: times by power of two, and faults. Cheap to add to."""

    __slots__ = ("faults", "times")

    def __init__(self) -> None:
        self.times = [0] * OCTAVES
        self.faults = 0

    def answered(self, infer_ns: int, items: int) -> None:
        """Count a request that was answered after ``infer_ns`` of inference."""
        self.times[min((infer_ns // (items or 1)).bit_length(), OCTAVES - 1)] += 1

    def failed(self, reason: Reason) -> None:
        """Count a request that failed, if that was the model's doing."""
        if reason in FAULTS:
            self.faults += 1

    @property
    def count(self) -> int:
        """Requests that say something about the model."""
        return sum(self.times) + self.faults


@dataclass(frozen=True, slots=True)
class Normal:
    """What is usual for an instance: its faults' share, and how its times spread over powers of two."""

    windows: int = 0
    faults: float = 0.0
    times: tuple[float, ...] = (0.0,) * OCTAVES

    @property
    def known(self) -> bool:
        """Whether enough was seen to compare with."""
        return self.windows >= KNOWN_WINDOWS

    def learned(self, share: float, times: Sequence[int], weight: float) -> "Normal":
        """Return the normal after one more window; the first ones weigh evenly."""
        weight = max(weight, 1.0 / (self.windows + 1)) if not self.known else weight
        total = sum(times) or 1
        mixed = tuple(
            old + (new / total - old) * weight for old, new in zip(self.times, times, strict=True)
        )
        return Normal(self.windows + 1, self.faults + (share - self.faults) * weight, mixed)


@dataclass(frozen=True, slots=True)
class Record:
    """All that is kept of one instance."""

    normal: Normal = Normal()
    canary: Verdict = GOOD
    canary_s: float | None = None
    """What its canaries usually take; None = not known yet."""
    slow_canaries: int = 0
    traffic: Verdict = GOOD

    @property
    def verdict(self) -> Verdict:
        """The worse of what canaries and requests say."""
        return reduce(worse, (self.canary, self.traffic))

    def after_canary(
        self, health: Health, why: str, took_s: float | None, *, requests: bool
    ) -> "Record":
        """Return the record after a canary; ``requests`` = some were answered since the last window.

        ``took_s`` None = it stood behind requests, so that its time says nothing.

        What requests once said is over when none came since and the canary passes. UNKNOWN says nothing.
        """
        if health is Health.UNKNOWN:
            return self
        if health is not Health.HEALTHY:
            return replace(self, canary=(health, why), slow_canaries=0)
        traffic = self.traffic if requests else GOOD
        usual = self.canary_s
        if took_s is None:
            return replace(self, canary=(health, why), traffic=traffic)
        if usual is not None and took_s > max(usual * CANARY_SLOW_TIMES, usual + CANARY_SLOW_S):
            slow = self.slow_canaries + 1
            told = f"Its health check takes {took_s:.3g} s, usually {usual:.3g} s."
            return replace(
                self,
                # Learned slowly all the same: a machine that became slower for good is no sickness.
                canary_s=usual + (took_s - usual) * LEARN_SICK,
                canary=(Health.DEGRADED, told) if slow > 1 else GOOD,
                slow_canaries=slow,
                traffic=traffic,
            )
        learned = took_s if usual is None else usual + (took_s - usual) * CANARY_LEARN
        return replace(
            self, canary=(health, why), canary_s=learned, slow_canaries=0, traffic=traffic
        )

    def after_requests(self, vitals: Vitals) -> "Record":
        """Return the record after a window of requests, at least ``WINDOW_MIN`` of them."""
        share = vitals.faults / vitals.count
        verdict = self._judged(share, vitals)
        weight = LEARN if verdict is GOOD else LEARN_SICK
        return replace(
            self, traffic=verdict, normal=self.normal.learned(share, vitals.times, weight)
        )

    def _judged(self, share: float, vitals: Vitals) -> Verdict:
        normal = self.normal
        told = f"{share:.0%} of its last {vitals.count} requests failed"
        if not normal.known:
            failing = share >= FAILING_NORMAL
            return (
                (Health.DEGRADED, f"{told}; what is usual is not known yet.") if failing else GOOD
            )
        usually = f"{told}, usually {normal.faults:.0%}."
        if share >= FAILING_SHARE and normal.faults < FAILING_NORMAL:
            return Health.UNHEALTHY, usually
        if share >= max(FAULTY_SHARE, FAULTY_TIMES * normal.faults):
            return Health.DEGRADED, usually
        median, high = quantile(vitals.times, 0.5), quantile(normal.times, 0.95)
        if median >= high + SLOW_OCTAVES and 1 << median > SLOW_MIN_NS:
            took = f"An item takes up to {(1 << median) / 1e6:.3g} ms"
            return Health.DEGRADED, f"{took}, usually up to {(1 << high) / 1e6:.3g} ms."
        return GOOD


def quantile(times: Sequence[float], share: float) -> int:
    """Return the power of two below which ``share`` of the times lie."""
    wanted, seen = share * sum(times), 0.0
    for octave, count in enumerate(times):
        seen += count
        if count and seen >= wanted:
            return octave
    return 0


def worse(one: Verdict, other: Verdict) -> Verdict:
    """Return the worse of two verdicts, the first where they are as bad."""
    return other if _ORDER.index(other[0]) > _ORDER.index(one[0]) else one


def may_reload(reloads: Sequence[float], now: float) -> bool:
    """Whether one more reload for bad health is allowed, after those at ``reloads``."""
    return sum(now - t <= RELOAD_WINDOW_S for t in reloads) < RELOADS_MAX
