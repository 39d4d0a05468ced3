"""How long to wait before the next start."""

from hypothesis import given
from hypothesis import strategies as st

from modelhostd.core.backoff import LONGEST_DELAY_S, RESET_AFTER_S, Backoff


def test_the_bounds_double_from_nothing_to_a_minute():
    """The first restart is at once; then the bounds are 0.5, 1, 2, 4 ... up to 60 s, and stay there."""
    backoff = Backoff()
    bounds = []
    for _ in range(12):
        backoff = backoff.failed(alive_s=1)
        bounds.append(backoff.longest_delay_s)
    assert bounds == [0, 0.5, 1, 2, 4, 8, 16, 32, 60, 60, 60, 60]
    assert Backoff(10**6).longest_delay_s == LONGEST_DELAY_S


def test_ten_good_minutes_forget_what_was_before():
    """Something that ran long counts its next failure as the first."""
    assert Backoff(9).failed(RESET_AFTER_S) == Backoff(1)
    assert Backoff(9).failed(RESET_AFTER_S - 1) == Backoff(10)


@given(st.integers(0, 10_000), st.floats(0, 1))
def test_delays_lie_within_their_bound(failures, jitter):
    """Jitter spreads a delay from nothing to its bound, never beyond."""
    backoff = Backoff(failures)
    assert 0 <= backoff.delay_s(jitter) <= backoff.longest_delay_s <= LONGEST_DELAY_S
