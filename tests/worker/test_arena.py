"""Arenas: shared, sealed against truncation, read-only where they are only read."""

import mmap
import os

import pytest

from modelhostd.worker.wire import arena
from modelhostd.worker.wire.arena import Arena

SIZE = 16 * mmap.PAGESIZE


@pytest.fixture
def descriptor():
    """Give the descriptor of a new arena."""
    made = arena.create("test", SIZE)
    yield made
    os.close(made)


def test_both_ends_see_the_same_memory(descriptor):
    """What one end writes the other reads, by copy and by view."""
    with_writing, with_reading = (Arena(descriptor, SIZE, writable=way) for way in (True, False))
    with_writing.write(4096, b"some bytes")
    assert with_reading.read(4096, 10) == b"some bytes"
    view = with_reading.view(4096, 4)
    assert bytes(view) == b"some"
    view.release()
    with_writing.close()
    with_reading.close()


def test_its_memory_comes_when_it_is_allocated(descriptor):
    """A new arena holds no memory; allocated and mapped it holds all of it, as zeros."""
    assert os.fstat(descriptor).st_blocks == 0
    arena.allocate(descriptor, 0, SIZE)
    assert os.fstat(descriptor).st_blocks * 512 == SIZE
    for writable in (True, False):
        end = Arena(descriptor, SIZE, writable=writable)
        end.populate(0, SIZE)
        assert end.read(0, SIZE) == bytes(SIZE)
        end.close()


def test_memory_that_comes_later_leaves_the_rest_as_it_is(descriptor):
    """A part is allocated and mapped while another one is in use, and what is mapped nowhere yet works as well."""
    arena.allocate(descriptor, 0, SIZE // 2)
    ends = [Arena(descriptor, SIZE, writable=writable) for writable in (True, False)]
    for end in ends:
        end.populate(0, 4096)
    ends[0].write(SIZE // 2 - 10, b"what is in")
    arena.allocate(descriptor, SIZE // 2, SIZE // 2)
    assert os.fstat(descriptor).st_blocks * 512 == SIZE
    assert ends[1].read(SIZE // 2 - 10, 20) == b"what is in" + bytes(10)
    ends[0].write(SIZE - 10, b"some bytes")
    assert ends[1].read(SIZE - 10, 10) == b"some bytes"
    for end in ends:
        end.close()


def test_nobody_can_truncate_or_grow_it(descriptor):
    """The seals hold: a peer cannot take the memory away under the other's feet."""
    for size in (0, SIZE - 1, SIZE * 2):
        with pytest.raises(PermissionError):
            os.ftruncate(descriptor, size)


def test_the_end_that_reads_cannot_write(descriptor):
    """A wild write through the reading end fails instead of reaching another request."""
    reading = Arena(descriptor, SIZE, writable=False)
    with pytest.raises(TypeError):
        reading.write(0, b"x")
    assert reading.view(0, 4).readonly
    reading.close()


@pytest.mark.parametrize(
    ("offset", "length", "inside"),
    [(0, SIZE, True), (SIZE - 1, 1, True), (0, SIZE + 1, False), (SIZE, 1, False), (-1, 1, False),
     (0, 0, False), (2**63, 2**63, False)],
)  # fmt: skip
def test_slots_of_the_other_end_are_checked(descriptor, offset, length, inside):
    """Numbers that come over a socket are inside the arena, or are refused."""
    end = Arena(descriptor, SIZE, writable=True)
    assert end.holds(offset, length) is inside
    end.close()


def test_an_arena_that_cannot_be_had_leaves_nothing():
    """Where there is no memory the error is the system's, and the descriptor is closed."""
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError):
        arena.create("test", -1)
    # What an earlier test left may go meanwhile.
    assert set(os.listdir("/proc/self/fd")) <= before
