"""The host arena: blocks that do not overlap, holes where nothing is, read-only once filled."""

import os
import subprocess
import sys

from hypothesis import given, settings
from hypothesis import strategies as st

from modelhostd.worker.image.arena import HUGE_BYTES, PAGE_BYTES, HostArena
from tests.support import wait_until

PAGES = 64


def memory_of(arena: HostArena) -> int:
    """Return the bytes of RAM that the arena takes."""
    return os.fstat(arena._descriptor).st_blocks * 512


@settings(max_examples=60, deadline=None)
@given(
    ready=st.integers(0, 2 * PAGES),
    steps=st.lists(st.tuples(st.booleans(), st.integers(1, PAGES)), max_size=40),
)
def test_blocks_are_apart_and_memory_is_what_is_held(ready, steps):
    """Any order of taking and freeing: contents stay, and RAM is what is taken plus at most what shall be ready."""
    arena = HostArena("test", max(0, ready * PAGE_BYTES - 1))
    held = {}
    for number, (take, pages) in enumerate(steps):
        if take or not held:
            block = arena.take(pages * PAGE_BYTES - 1)
            block.prepare(0, block.size)
            block.tensor.fill_(number)
            held[number] = block
        else:
            assert held.pop(min(held, key=lambda n: (n * pages) % 7)).free()
        taken = arena.taken_bytes
        assert taken == sum(-(-block.size // PAGE_BYTES) * PAGE_BYTES for block in held.values())
        assert taken + arena.ready_bytes <= max(taken, ready * PAGE_BYTES)
        assert memory_of(arena) == taken + arena.ready_bytes
        for mark, block in held.items():
            assert (block.tensor == mark).all()


@settings(max_examples=5, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 7 * HUGE_BYTES), min_size=1, max_size=3), seed=st.integers(0, 9)
)
def test_what_was_faulted_ahead_is_given_back_to_the_page(sizes, seed):
    """Of huge pages or not: blocks that begin and end within one keep their contents, and RAM is what is held."""
    arena = HostArena("test", 4 * HUGE_BYTES)
    arena.fault_ahead()
    wait_until(lambda: arena.ready_bytes == 4 * HUGE_BYTES)
    blocks = [arena.take(size) for size in sizes]
    for number, block in enumerate(blocks):
        block.prepare(0, block.size)
        block.tensor.fill_(number + 1)
        block.protect()
    blocks = blocks[seed % len(blocks) :] + blocks[: seed % len(blocks)]
    marks = [int(block.tensor[0]) for block in blocks]
    while blocks:
        assert memory_of(arena) == arena.taken_bytes + arena.ready_bytes
        for mark, block in zip(marks, blocks, strict=True):
            assert (block.tensor == mark).all()
        marks.pop()
        assert blocks.pop().free()
        del block
    assert memory_of(arena) == arena.ready_bytes <= 4 * HUGE_BYTES


def test_what_is_ready_is_taken_first():
    """A block of what was freed needs no new memory; a larger one begins there."""
    arena = HostArena("test", 16 * PAGE_BYTES)
    block = arena.take(16 * PAGE_BYTES)
    block.prepare(0, block.size)
    address = block.tensor.data_ptr()
    assert block.free()
    for size in (4, 16, 40):
        block = arena.take(size * PAGE_BYTES)
        assert block.tensor.data_ptr() == address
        block.prepare(0, block.size)
        assert block.free()
        assert arena.ready_bytes <= 16 * PAGE_BYTES


def test_a_view_keeps_its_block():
    """A block is not freed while somebody has a view of it."""
    arena = HostArena("test")
    block = arena.take(PAGE_BYTES)
    block.prepare(0, PAGE_BYTES)
    view = block.tensor[3:5]
    assert not block.free()
    del view
    assert block.free()
    assert (arena.taken_bytes, memory_of(arena)) == (0, 0)


def test_memory_is_faulted_ahead():
    """What shall be ready is there after a while, without anybody having asked for a block."""
    arena = HostArena("test", 3 * 2**20 - 1)
    arena.fault_ahead()
    wait_until(lambda: arena.ready_bytes == 3 * 2**20)
    assert memory_of(arena) == 3 * 2**20


def test_a_write_to_a_filled_image_is_a_crash():
    """Once protected, memory can be read; a write ends the process with SIGSEGV."""
    program = (
        "from modelhostd.worker.image.arena import HostArena\n"
        "block = HostArena('test').take(8192)\n"
        "block.prepare(0, 8192); block.tensor.fill_(3); block.protect()\n"
        "print(int(block.tensor.sum()), flush=True)\n"
        "block.tensor[0] = 1\n"
        "print('written')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=200
    )
    assert (done.stdout, done.returncode) == ("24576\n", -11)
