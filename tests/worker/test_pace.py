"""The pace that unasked frames are held to."""

from modelhostd.adapters.workers.pace import Pace


def test_a_burst_passes_and_no_more():
    """As many as the burst pass at once; the next one does not."""
    pace = Pace(rate=10, burst=5, now=0.0)
    assert [pace.passes(0.0) for _ in range(6)] == [True] * 5 + [False]


def test_what_keeps_the_rate_always_passes():
    """What comes at the rate passes for ever, also after the burst was used up."""
    pace = Pace(rate=10, burst=5, now=0.0)
    assert all(pace.passes(0.0) for _ in range(5))
    assert all(pace.passes(number / 8) for number in range(1, 1000))


def test_silence_saves_up_no_more_than_a_burst():
    """After a day of silence no more than the burst passes at once."""
    pace = Pace(rate=10, burst=5, now=0.0)
    assert [pace.passes(86_400.0) for _ in range(6)] == [True] * 5 + [False]
