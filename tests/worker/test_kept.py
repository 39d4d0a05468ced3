"""Images at rest: hashed, described beside their weights, or left as they were."""

import pytest

from modelhostd.worker.image import kept
from modelhostd.worker.image.arena import HostArena
from modelhostd.worker.image.image import Image


@pytest.fixture
def arena():
    """Give an arena."""
    return HostArena("test")


@pytest.fixture
def part(arena):
    """Give a part of an image that was filled and described."""
    part = Image(None, arena).memory(8192)
    part.prepare(0, 8192)
    part.tensor.fill_(7)
    part.describe(b"what lies where")
    return part


def test_without_memory_for_its_description_an_image_leaves_nothing(arena, part, monkeypatch):
    """Where that cannot be written nothing of it stays in the arena; later it is written, and goes with the image."""

    def none_left(*_):
        raise MemoryError

    with monkeypatch.context() as full:
        full.setattr(arena, "populate", none_left)
        with pytest.raises(MemoryError):
            kept.rest(part, arena, lambda _: None)
    assert arena.taken_bytes == 8192
    assert kept.rest(part, arena, lambda _: None) is not None
    assert arena.taken_bytes == 8192 + 4096
    assert part.close()
    assert arena.taken_bytes == 0


def test_an_image_that_went_while_it_was_hashed_leaves_nothing(arena, part, monkeypatch):
    """Freed between two steps, with all that tells of it, it is not kept."""
    monkeypatch.setattr(kept, "STEP_BYTES", 4096)
    assert kept.rest(part, arena, lambda _: part.close()) is None
    assert arena.taken_bytes == 0
