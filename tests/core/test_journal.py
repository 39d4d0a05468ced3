"""The event ring against a list that forgets nothing, and where a watch may start."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.journal import Ring, check_start
from modelhostd.core.resources import Event, Kind


def event(sequence: int) -> Event:
    return Event(sequence, 0.0, Kind.MODEL, "a", None)


@given(
    st.integers(0, 50),
    st.integers(1, 10),
    st.lists(st.integers(0, 5), max_size=12),
    st.integers(0, 80),
    st.integers(0, 12),
)
def test_the_ring_is_the_end_of_a_list(
    last: int, capacity: int, batches: list[int], start: int, limit: int
) -> None:
    """Reads give what a list of all events would, or None for what is held no longer."""
    ring = Ring(last, capacity)
    kept: list[Event] = []
    for size in batches:
        for _ in range(size):
            kept.append(event(ring.last + 1))
            ring.append(kept[-1])
        held = kept[-capacity:]
        assert ring.first == (held[0].sequence if held else last + 1)
        assert ring.last == last + len(kept)
        found = ring.read(start, limit)
        if start < ring.first:
            assert found is None
        else:
            assert found == [e for e in kept if e.sequence >= start][:limit]


def test_the_ring_has_no_gap() -> None:
    """An event that does not follow the last one is a bug and asserts."""
    ring = Ring(4, 3)
    with pytest.raises(AssertionError):
        ring.append(event(6))
    ring.append(event(5))
    with pytest.raises(AssertionError):
        ring.append(event(5))


@pytest.mark.parametrize(
    ("start", "reason"),
    [
        (0, Reason.SEQUENCE_COMPACTED),
        (9, Reason.SEQUENCE_COMPACTED),
        (10, None),
        (20, None),
        (21, None),
        (22, Reason.SEQUENCE_IN_FUTURE),
        (2**62, Reason.SEQUENCE_IN_FUTURE),
    ],
)
def test_where_a_watch_may_start(start: int, reason: Reason | None) -> None:
    """From the first event that is kept to the one that comes next; else with the numbers to go on."""
    if reason is None:
        check_start(start, 10, 20)
        return
    with pytest.raises(ModelhostError) as caught:
        check_start(start, 10, 20)
    assert caught.value.reason is reason
    assert caught.value.metadata == {
        "startSequence": str(start),
        "firstSequence": "10",
        "currentSequence": "20",
    }
