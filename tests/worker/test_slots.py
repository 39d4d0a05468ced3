"""The arena's allocator: slots never overlap, and everything given back can be had again."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from modelhostd.worker.wire.slots import GRANULE_BYTES, Slots

SIZE = 64 * GRANULE_BYTES


class SlotsMachine(RuleBasedStateMachine):
    """Random allocations and returns against a map of every page."""

    def __init__(self):
        super().__init__()
        self.slots = Slots(0)
        self.pages = []
        self.mine: list[tuple[int, int]] = []

    @precondition(lambda self: len(self.pages) * GRANULE_BYTES < SIZE)
    @rule(pages=st.integers(0, 16), odd=st.integers(0, GRANULE_BYTES - 1))
    def extend(self, pages, odd):
        self.pages += [0] * pages
        self.slots.extend(len(self.pages) * GRANULE_BYTES + odd)

    @rule(length=st.integers(1, SIZE + GRANULE_BYTES))
    def allocate(self, length):
        offset = self.slots.allocate(length)
        need = -(-length // GRANULE_BYTES)
        if offset is None:
            longest = max(len(run) for run in "".join(map(str, self.pages)).split("1"))
            assert longest < need
            return
        first = offset // GRANULE_BYTES
        assert self.pages[first : first + need] == [0] * need
        self.pages[first : first + need] = [1] * need
        self.mine.append((offset, need))

    @precondition(lambda self: self.mine)
    @rule(data=st.data())
    def free(self, data):
        offset, need = self.mine.pop(data.draw(st.integers(0, len(self.mine) - 1)))
        self.slots.free(offset)
        first = offset // GRANULE_BYTES
        self.pages[first : first + need] = [0] * need

    @rule(offset=st.integers(-1, SIZE))
    def free_of_what_is_not_taken(self, offset):
        if offset not in {taken for taken, _ in self.mine}:
            with pytest.raises(KeyError):
                self.slots.free(offset)

    @invariant()
    def bytes_add_up(self):
        assert self.slots.free_bytes == self.pages.count(0) * GRANULE_BYTES
        assert sum(self.slots.taken.values()) + self.slots.free_bytes == self.slots.size
        assert self.slots.size == len(self.pages) * GRANULE_BYTES


TestSlots = SlotsMachine.TestCase


@given(st.integers(0, 3 * GRANULE_BYTES))
def test_an_odd_size_uses_whole_pages_only(size):
    """An arena that does not end on a page has no slot that passes its end."""
    slots = Slots(size)
    taken = []
    while (offset := slots.allocate(1)) is not None:
        taken.append(offset)
    assert all(offset + GRANULE_BYTES <= size for offset in taken)
    for offset in taken:
        slots.free(offset)
    assert slots.free_bytes == slots.size
