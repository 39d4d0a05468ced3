"""Addresses of an arena, page by page: nothing is taken twice, and what has memory is taken, ready, or told to lose it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelhostd.worker.image.space import Space, Span

SIZE = 64


@given(
    limit=st.integers(0, 40),
    steps=st.lists(
        st.tuples(st.sampled_from(["take", "fresh", "keep", "drop"]), st.integers(1, 20)),
        max_size=40,
    ),
)
def test_every_address_is_in_one_place(limit: int, steps: list[tuple[str, int]]) -> None:
    """Whatever is taken and given back: takings are apart, and memory is where it is said to be, to the address."""
    space = Space(SIZE, limit, [Span(60, 4)])
    held, memory = [Span(60, 4)], set(range(60, 64))
    for what, number in steps:
        if what in ("take", "fresh"):
            try:
                taken, ready, holes = space.take(number, fresh=what == "fresh")
            except MemoryError:
                continue
            addresses = set(range(taken.start, taken.end))
            assert taken.length == number
            assert taken.end <= SIZE
            assert not addresses & {a for h in held for a in range(h.start, h.end)}
            assert set(range(taken.start, taken.start + ready)) <= memory
            assert not memory & set(range(taken.start + ready, taken.end)), "it is faulted twice"
            held.append(taken)
            memory |= addresses
        elif held:
            holes = space.give_back(held.pop(number % len(held)), keep=what == "keep")
        else:
            continue
        memory -= {a for hole in holes for a in range(hole.start, hole.end)}
        in_use = sum(h.length for h in held)
        assert space.taken_bytes == in_use
        assert space.ready_bytes == len(memory) - in_use
        assert len(memory) <= max(limit, in_use)
        assert space.missing_bytes == limit - len(memory)


def test_without_addresses_nothing_is_taken() -> None:
    """What fits nowhere is refused, and all is as it was."""
    space = Space(8, 0, [Span(2, 2)])
    with pytest.raises(MemoryError):
        space.take(5)
    assert space.take(4)[0] == Span(4, 4)
    assert space.take(2)[0] == Span(0, 2)
