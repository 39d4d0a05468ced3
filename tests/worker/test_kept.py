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


@pytest.fixture
def left(arena, part):
    """Give the arena of the next worker, and what it finds there: the part, at rest."""
    found = {("a", 1): kept.rest(part, arena, lambda _: None)}
    part._block.protect()
    places = [place for one in found.values() for place in one.ranges]
    later = HostArena("test", descriptor=arena._descriptor, held=places)
    return later, kept.Inheritance(later, found)


def adopt(inheritance, image):
    """Have an image begin with what was left."""
    return inheritance.adopt(("a", 1), image, lambda: False, lambda *_: None)


def test_what_a_failed_adoption_left_a_view_of_is_freed_with_that(left):
    """Dropped meanwhile, it is nobody else's memory as long as something looks at it; then it goes."""
    arena, inheritance = left
    image = Image(None, arena)
    adopt(inheritance, image).weights = None
    view = image._parts[0].tensor[:8]
    assert not image.close()
    inheritance.drop(("a", 1))
    assert view.tolist() == [7] * 8
    other = arena.take(4096)
    assert other.place.start >= 8192
    other.prepare(0, 4096)
    del view
    assert image.close()
    other.tensor.fill_(1)
    assert arena.taken_bytes == 4096


def test_what_a_failed_adoption_left_can_be_adopted_again_or_dropped(left):
    """It stays as it was until it is dropped."""
    arena, inheritance = left
    for _ in range(2):
        image = Image(None, arena)
        adopt(inheritance, image).weights = None
        assert image.close()
        assert arena.taken_bytes == 8192 + 4096
    inheritance.drop(("a", 1))
    assert arena.taken_bytes == 0
