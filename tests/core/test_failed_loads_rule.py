"""When a failed load is tried again: never, after a bounded delay, or as soon as the model is another one."""

from hypothesis import example, given
from hypothesis import strategies as st

from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.failed_loads import LASTING, LONGEST_DELAY_S, REMEMBERED, FailedLoad


def failure(reason: Reason) -> ModelhostError:
    return ModelhostError(reason, "no", {"model": "a"})


@given(
    st.sampled_from(sorted(REMEMBERED)),
    st.lists(st.floats(0, 100), min_size=1, max_size=2000),
    st.floats(0, 200),
)
@example(
    Reason.LOAD_FAILED,
    [
        1.5698109038993948, 62.955991961122116, 1.7818213341169695, 23.95, 99.54653952121355,
        7.014778744496895,
    ],
    0.0,
)  # fmt: skip
def test_a_refusal_has_an_end_or_lasts(reason: Reason, gaps: list[float], later: float) -> None:
    """However many failures there were: lasting ones are refused for ever, others for 60 s at most."""
    now, known = 0.0, FailedLoad(1, 1, failure(reason), 0.0)
    for gap in gaps:
        now += gap
        known = known.again(1, 1, failure(reason), now)
    refusal = known.refusal(1, 1, now + later)
    if reason in LASTING:
        assert refusal is not None
        assert refusal.retry_delay_s is None
    elif later >= LONGEST_DELAY_S:
        assert refusal is None
    elif refusal is not None:
        assert refusal.retry_delay_s is not None
        assert 0 < refusal.retry_delay_s <= LONGEST_DELAY_S
        assert known.refusal(1, 1, now + later + refusal.retry_delay_s + 1e-6) is None


@given(st.sampled_from(sorted(REMEMBERED)), st.integers(1, 9), st.integers(1, 9))
def test_another_model_is_another_try(reason: Reason, version: int, edit: int) -> None:
    """Other files or another config are refused nothing, and their failures count anew."""
    known = FailedLoad(5, 5, failure(reason), 0.0, count=7)
    assert (known.refusal(version, edit, 0.0) is None) == ((version, edit) != (5, 5))
    again = known.again(version, edit, failure(reason), 1.0)
    assert again.count == (8 if (version, edit) == (5, 5) else 1)
