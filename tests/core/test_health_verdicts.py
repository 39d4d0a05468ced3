"""Health: canaries and requests against an instance's own normal."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelhostd.core.errors import Reason
from modelhostd.core.health import (
    KNOWN_WINDOWS,
    LEARN_SICK,
    OCTAVES,
    RELOAD_WINDOW_S,
    RELOADS_MAX,
    WINDOW_MIN,
    Record,
    Vitals,
    may_reload,
    quantile,
    worse,
)
from modelhostd.core.states import Health

MS = 1_000_000


def window(answered: int = WINDOW_MIN, faults: int = 0, took_ns: int = 5 * MS) -> Vitals:
    vitals = Vitals()
    for _ in range(answered):
        vitals.answered(took_ns, 1)
    for _ in range(faults):
        vitals.failed(Reason.INFERENCE_FAILED)
    return vitals


def usual(windows: int = KNOWN_WINDOWS, **kwargs: int) -> Record:
    record = Record()
    for _ in range(windows):
        record = record.after_requests(window(**kwargs))
    return record


@pytest.mark.parametrize(
    ("answered", "faults", "took_ns", "health"),
    [
        (20, 0, 5 * MS, Health.HEALTHY),
        (20, 0, 9 * MS, Health.HEALTHY),
        (20, 0, 40 * MS, Health.DEGRADED),
        (20, 1, 5 * MS, Health.HEALTHY),
        (18, 4, 5 * MS, Health.DEGRADED),
        (2, 18, 5 * MS, Health.UNHEALTHY),
        (0, 20, 5 * MS, Health.UNHEALTHY),
    ],
)
def test_a_window_is_held_against_the_normal(
    answered: int, faults: int, took_ns: int, health: Health
) -> None:
    """With requests of 5 ms and no faults as its normal: what is slower, fails some or fails all."""
    found, why = usual().after_requests(window(answered, faults, took_ns)).verdict
    assert found is health
    assert bool(why) == (health is not Health.HEALTHY)


def test_what_always_failed_is_its_normal() -> None:
    """A model that fails half of its requests from the first on is not reloaded for it, but it is told."""
    record = usual(windows=1, answered=10, faults=10)
    assert record.verdict[0] is Health.DEGRADED
    record = usual(answered=1, faults=19)
    assert record.after_requests(window(1, 19)).verdict[0] is not Health.UNHEALTHY


def test_the_callers_mistakes_are_not_the_models() -> None:
    """Only what the model itself failed counts."""
    vitals = Vitals()
    for reason in Reason:
        vitals.failed(reason)
    assert vitals.count == 2


def test_slow_for_good_becomes_normal() -> None:
    """A model that gets longer inputs is DEGRADED for a while only."""
    record = usual()
    verdicts = []
    for _ in range(int(10 / LEARN_SICK)):
        record = record.after_requests(window(took_ns=80 * MS))
        verdicts.append(record.verdict[0])
    assert verdicts[0] is Health.DEGRADED
    assert verdicts[-1] is Health.HEALTHY


def test_a_canary_that_fails_and_one_that_passes_decide_at_once() -> None:
    """UNHEALTHY with its own words, and HEALTHY again; UNKNOWN says nothing."""
    sick = Record().after_canary(Health.UNHEALTHY, "wrong numbers", 0.1, requests=False)
    assert sick.verdict == (Health.UNHEALTHY, "wrong numbers")
    assert sick.after_canary(Health.UNKNOWN, "?", 0.1, requests=False) == sick
    well = sick.after_canary(Health.HEALTHY, "", 0.1, requests=False)
    assert well.verdict[0] is Health.HEALTHY


def test_a_slow_canary_counts_the_second_time() -> None:
    """Once may be the machine; twice in a row is DEGRADED; a usual one ends it."""
    record = Record().after_canary(Health.HEALTHY, "", 0.02, requests=False)
    record = record.after_canary(Health.HEALTHY, "", 2.0, requests=False)
    assert record.verdict[0] is Health.HEALTHY
    assert record.after_canary(Health.HEALTHY, "", None, requests=True).verdict[0] is Health.HEALTHY
    record = record.after_canary(Health.HEALTHY, "", 2.0, requests=False)
    assert record.verdict[0] is Health.DEGRADED
    assert (
        record.after_canary(Health.HEALTHY, "", 0.02, requests=False).verdict[0] is Health.HEALTHY
    )


def test_what_requests_said_is_over_when_none_come_and_the_canary_passes() -> None:
    """A verdict of long ago does not stay for ever; one with fresh requests does until their window."""
    sick = usual().after_requests(window(0, 20))
    assert sick.after_canary(Health.HEALTHY, "", 0.1, requests=True).verdict[0] is Health.UNHEALTHY
    assert sick.after_canary(Health.HEALTHY, "", 0.1, requests=False).verdict[0] is Health.HEALTHY


@given(st.data(), st.integers(0, 2**32))
def test_whatever_comes_the_record_is_bounded_and_its_verdict_has_a_reason(
    data: st.DataObject, seed: int
) -> None:
    """Any mix of windows and canaries: shares stay shares, a bad verdict says why, memory does not grow."""
    rng = random.Random(seed)
    record = Record()
    for _ in range(data.draw(st.integers(0, 30))):
        if rng.random() < 0.3:
            health = rng.choice(list(Health))
            record = record.after_canary(health, "why", rng.expovariate(1.0), requests=False)
            continue
        vitals = Vitals()
        for _ in range(rng.randrange(WINDOW_MIN, 60)):
            if rng.random() < 0.3:
                vitals.failed(Reason.INTERNAL)
            else:
                vitals.answered(rng.randrange(1 << rng.randrange(1, 70)), rng.randrange(4))
        record = record.after_requests(vitals)
        assert 0.0 <= record.normal.faults <= 1.0
        assert sum(record.normal.times) <= 1.0 + 1e-9
        assert len(record.normal.times) == OCTAVES
        health, why = record.verdict
        assert why or health in (Health.HEALTHY, Health.UNKNOWN)


@given(st.lists(st.integers(0, 100), min_size=OCTAVES, max_size=OCTAVES), st.floats(0.01, 1.0))
def test_a_quantile_has_its_share_below_it(times: list[int], share: float) -> None:
    """At least the share lies at or below the octave, and less than it below."""
    octave = quantile(times, share)
    if sum(times):
        assert sum(times[: octave + 1]) >= share * sum(times)
        assert sum(times[:octave]) < share * sum(times)


def test_the_worse_verdict_wins() -> None:
    """UNHEALTHY over DEGRADED over HEALTHY; of two alike the first."""
    assert worse((Health.DEGRADED, "a"), (Health.UNHEALTHY, "b")) == (Health.UNHEALTHY, "b")
    assert worse((Health.HEALTHY, "a"), (Health.HEALTHY, "b")) == (Health.HEALTHY, "a")


@given(st.lists(st.floats(0, 5000), max_size=30))
def test_reloads_are_bounded(times: list[float]) -> None:
    """Whenever somebody asks, at most so many were allowed within the window before."""
    allowed: list[float] = []
    for now in sorted(times):
        if may_reload(allowed, now):
            allowed.append(now)
    for last in allowed:
        assert sum(last - RELOAD_WINDOW_S <= t <= last for t in allowed) <= RELOADS_MAX
