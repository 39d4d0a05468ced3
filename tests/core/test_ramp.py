"""How many connections a file gets, on lines of every kind, in virtual time."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelhostd.core.ramp import AGAIN_S, Ramp


def run(ramp: Ramp, rate: Callable[[int], float], seconds: float, start: float = 0.0) -> list[int]:
    """Sample every 50 ms on a line that gives ``rate(connections)`` bytes a second."""
    counts, done, now = [], 0.0, start
    while now < start + seconds:
        counts.append(ramp.sample(now, int(done)))
        done += rate(ramp.wanted) * 0.05
        now += 0.05
    return counts


def test_connections_that_help_are_added_to_the_limit() -> None:
    """Where each connection has a limit of its own, all of them are used within two seconds."""
    assert run(Ramp(8), lambda n: n * 50e6, 2.0)[-1] == 8


@pytest.mark.parametrize("silent_s", [0.4, 1.5])
def test_connections_that_begin_late_are_measured_from_then_on(silent_s: float) -> None:
    """A server far away, whose connections bring nothing for some round trips: all of them are used."""
    ramp, done, now = Ramp(8), 0.0, 0.0
    begun = [0.0]
    while now < 12.0:
        bring = sum(at + silent_s <= now for at in begun)
        wanted = ramp.sample(now, int(done), all_bring=bring == len(begun))
        begun = begun[:wanted] + [now] * (wanted - len(begun))
        done += bring * 20e6 * 0.05
        now += 0.05
    assert ramp.wanted == 8


def test_one_that_never_begins_is_not_waited_for() -> None:
    """A connection that brings nothing did not help."""
    ramp, done, now = Ramp(8), 0.0, 0.0
    counts = []
    while now < 10.0:
        counts.append(ramp.sample(now, int(done), all_bring=ramp.wanted == 1))
        done += 20e6 * 0.05
        now += 0.05
    assert (max(counts), counts[-1]) == (2, 1)


def test_connections_that_do_not_help_are_taken_back() -> None:
    """Where one fills the line there is one again, but for a try now and then."""
    counts = run(Ramp(8), lambda _: 100e6, 60.0)
    assert counts[-1] in {1, 2}
    assert counts.count(1) > 0.9 * len(counts)
    assert max(counts) == 2


def test_one_that_is_fast_stays_alone() -> None:
    """No others are tried where one brings more than any server gives to each."""
    assert set(run(Ramp(8), lambda n: n * 400e6, 40.0)) == {1}


def test_the_knee_of_the_line_is_found() -> None:
    """Four connections fill the line: four stay."""
    counts = run(Ramp(16), lambda n: min(n, 4) * 50e6, 10.0)
    assert counts[-1] == 4


def test_a_line_that_gets_better_is_noticed() -> None:
    """After a while more are tried again."""
    ramp = Ramp(8)
    run(ramp, lambda _: 50e6, 2.0)
    assert run(ramp, lambda n: n * 50e6, AGAIN_S + 3, start=2.0)[-1] == 8


def test_a_first_try_that_misleads_is_made_good_soon() -> None:
    """What held up the first try, and no more than that, costs some seconds."""
    ramp = Ramp(8)
    run(ramp, lambda _: 50e6, 1.0)
    assert run(ramp, lambda n: n * 50e6, 4.0, start=1.0)[-1] == 8


def test_a_failed_connection_makes_one_less() -> None:
    """And no more are tried for a while."""
    ramp = Ramp(8)
    run(ramp, lambda n: n * 50e6, 3.0)
    ramp.failed(3.0)
    assert set(run(ramp, lambda n: n * 50e6, AGAIN_S - 1, start=3.0)) == {7}


@given(st.lists(st.tuples(st.floats(0, 5), st.integers(0, 10**9), st.booleans()), max_size=60))
def test_the_number_stays_in_its_bounds(steps: list[tuple[float, int, bool]]) -> None:
    """Whatever is measured and whatever fails."""
    ramp, now, done = Ramp(6), 0.0, 0
    for pause, gained, failed in steps:
        now, done = now + pause, done + gained
        if failed:
            ramp.failed(now)
        assert 1 <= ramp.sample(now, done) <= 6


@pytest.mark.parametrize("limit", [1])
def test_one_is_one(limit: int) -> None:
    """A limit of one is kept."""
    assert set(run(Ramp(limit), lambda n: n * 1e6, 5.0)) == {1}
