"""The limits of bytes a second, in virtual time: the mean holds, everybody gets a share, changes act."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelhostd.core.throttle import BURST_S, QUANTUM_MAX, QUANTUM_MIN, Bucket, Line, Shares

STEP_S = 0.001


class Race:
    """Lines that want as much as they can get, or so many bytes a second."""

    def __init__(self, rate: int, own: Sequence[int]) -> None:
        self.shares = Shares()
        self.shares.bucket.set_rate(rate, 0.0)
        self.lines = [Line() for _ in own]
        self.got = [0] * len(own)
        self.now = 0.0
        self._again = [0.0] * len(own)
        for line, rate_of_one in zip(self.lines, own, strict=True):
            line.bucket.set_rate(rate_of_one, 0.0)

    def run(self, seconds: float, wanted: int = 256 << 10) -> list[float]:
        """Return the bytes a second that each line got."""
        before, end = list(self.got), self.now + seconds
        while self.now < end:
            for number, line in enumerate(self.lines):
                if self.now >= self._again[number]:
                    granted, delay = self.shares.ask(line, wanted, self.now)
                    assert 0 <= granted <= wanted
                    assert (granted == 0) == (delay > 0)
                    self.got[number] += granted
                    self._again[number] = self.now + min(delay, 0.05)
            self.now += STEP_S
        return [(now - then) / seconds for now, then in zip(self.got, before, strict=True)]


@pytest.mark.parametrize("rate", [10_000, 1_000_000, 64 << 20])
@pytest.mark.parametrize("count", [1, 3, 8])
def test_the_common_limit_holds_and_is_shared_evenly(rate: int, count: int) -> None:
    """Within three percent over ten seconds, and no line has more than the others."""
    race = Race(rate, [0] * count)
    race.run(1.0)
    rates = race.run(10.0)
    assert sum(rates) == pytest.approx(rate, rel=0.03)
    assert max(rates) - min(rates) <= max(0.03 * rate, QUANTUM_MIN)


def test_a_line_with_a_limit_leaves_the_rest_to_the_others() -> None:
    """What one may not have, the others share."""
    race = Race(1_000_000, [100_000, 0, 0])
    race.run(1.0)
    slow, one, other = race.run(10.0)
    assert slow == pytest.approx(100_000, rel=0.03)
    assert one == pytest.approx(450_000, rel=0.05)
    assert other == pytest.approx(450_000, rel=0.05)


def test_limits_of_lines_hold_without_a_common_one() -> None:
    """Each for itself."""
    race = Race(0, [50_000, 2_000_000])
    race.run(1.0)
    assert race.run(10.0) == pytest.approx([50_000, 2_000_000], rel=0.03)


@pytest.mark.parametrize(("before", "after"), [(1000, 10_000_000), (10_000_000, 5000), (5000, 0)])
def test_a_change_acts_at_once(before: int, after: int) -> None:
    """Up, down and off: the next second is at the new rate, whatever was borrowed at the old one."""
    race = Race(before, [0])
    race.run(3.0)
    race.shares.bucket.set_rate(after, race.now)
    race.run(max(1.0, 2 * QUANTUM_MIN / after) if after and after < before else 0.2)
    (rate,) = race.run(5.0)
    if after:
        assert rate == pytest.approx(after, rel=0.05)
    else:
        assert rate > 10_000_000


@given(
    rate=st.integers(1, 1 << 30),
    steps=st.lists(st.tuples(st.floats(0, 3), st.integers(1, 1 << 20)), max_size=80),
)
def test_no_more_flows_than_the_rate_and_a_burst(rate: int, steps: list[tuple[float, int]]) -> None:
    """Whenever it is asked and for however much: at most rate x time, one burst and one turn."""
    bucket = Bucket()
    bucket.set_rate(rate, 0.0)
    now, taken, largest = 0.0, 0, 0
    for pause, wanted in steps:
        now += pause
        if bucket.delay(now) == 0.0:
            bucket.take(wanted, now)
            taken, largest = taken + wanted, max(largest, wanted)
        assert taken <= rate * (now + BURST_S) + largest + 1


@given(rate=st.integers(1, 1 << 40), taken=st.integers(1, 1 << 40))
def test_a_wait_that_was_told_is_long_enough(rate: int, taken: int) -> None:
    """After the delay something may be taken, and not much before."""
    bucket = Bucket()
    bucket.set_rate(rate, 0.0)
    bucket.take(taken, 0.0)
    delay = bucket.delay(0.0)
    if delay:
        assert bucket.delay(delay * 0.5) > 0 or delay < 1e-5
        assert bucket.delay(delay * 1.001 + 1e-4) == 0.0


def test_what_is_given_back_can_be_taken() -> None:
    """A read that brought less than it asked for costs what it brought."""
    race = Race(1_000_000, [0])
    total = 0
    while race.now < 10.0:
        granted, _ = race.shares.ask(race.lines[0], QUANTUM_MAX, race.now)
        race.shares.give_back(race.lines[0], granted // 2, race.now)
        total += granted - granted // 2
        race.now += STEP_S
    assert total == pytest.approx(10_000_000, rel=0.03)


def test_a_line_that_leaves_holds_nobody_up() -> None:
    """Its turn passes to the next."""
    shares = Shares()
    shares.bucket.set_rate(1000, 0.0)
    gone, other = Line(), Line()
    shares.bucket.take(2000, 0.0)
    assert shares.ask(gone, 100, 0.0)[0] == 0
    assert shares.ask(other, 100, 0.0)[0] == 0
    assert shares.ask(other, 100, 60.0)[0] == 0
    shares.leave(gone)
    assert shares.ask(other, 100, 60.0)[0] == 100
