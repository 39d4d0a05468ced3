"""Images of real modules: bytes before and after any number of swaps, and what they hold."""

import gc

import pytest
import torch

from modelhostd.worker.backend import Cancelled
from modelhostd.worker.image.images import Images
from modelhostd.worker.image.layout import ALIGNMENT, NotImageableError, find_layout
from tests.worker.torch_backend import Awkward

ROWS = torch.arange(32).reshape(8, 4) % 11


def make(width: int = 7) -> Awkward:
    """Return a module of awkward memory, the same for the same width."""
    torch.manual_seed(width)
    return Awkward(width).eval().requires_grad_(False)


def answer(module: torch.nn.Module) -> bytes:
    """Return what the module makes of fixed rows, to the bit."""
    with torch.inference_mode():
        return module(ROWS).numpy().tobytes()


def held(images: Images) -> tuple[int, int]:
    """Return bytes taken of the host arena and of the device's."""
    device = images._device
    return images._arena.taken_bytes, 0 if device is None else device.arena.taken_bytes


@pytest.fixture(params=["sim-0", "cpu"])
def images(request):
    """Give the images of a device; in the end nothing of them may be held."""
    made = Images(request.param)
    yield made
    gc.collect()
    assert held(made) == (0, 0)


def image_of(images, module):
    """Return the image of a module."""
    image = images.new()
    image.adopt(module)
    return image


def test_nothing_changes_in_a_hundred_swaps():
    """Outputs are equal to the bit, tied weights stay tied, and the device holds a slab or nothing."""
    images, module = Images("sim-0"), make()
    before = answer(module)
    image = image_of(images, module)
    assert answer(module) == before
    for _ in range(100):
        assert image.evict()
        assert held(images)[1] == 0
        image.swap_in(lambda: False)
        assert answer(module) == before
    assert module.head.weight is module.embedding.weight
    assert module.head.weight.data_ptr() == module.embedding.weight.data_ptr()
    del module
    images.close(image)
    assert held(images) == (0, 0)


def test_on_cpu_there_is_one_copy(images):
    """Parameters are views of the image on cpu, and of a slab elsewhere; there are no others."""
    module = make()
    before = answer(module)
    image = image_of(images, module)
    size = image.device_bytes
    storages = {
        t.untyped_storage().data_ptr()
        for t in (*module.parameters(), *module.buffers())
        if t.numel()
    }
    assert len(storages) == 1
    assert answer(module) == before
    assert image.host_bytes == (size if images._device else 0)
    assert size % ALIGNMENT == 0
    del module
    images.close(image)


def test_tied_and_overlapping_memory_is_there_once():
    """The image is as large as the distinct bytes, each piece at its alignment."""
    module = torch.nn.Module()
    whole = torch.rand(300)
    module.register_buffer("whole", whole)
    module.register_buffer("part", whole[10:20])
    module.register_buffer("same", whole)
    module.odd = torch.nn.Parameter(torch.rand(3, dtype=torch.float16))
    layout = find_layout(module, ())
    assert layout.new_bytes == 1536 + 512
    assert all(place.offset % ALIGNMENT == 0 for place in layout.places if place.shape != (10,))
    images = Images("sim-0")
    part = module.part.clone()
    image = image_of(images, module)
    assert image.evict()
    image.swap_in(lambda: False)
    assert torch.equal(module.part, part)
    module.whole[10] = 7
    assert module.part[0] == 7
    del module
    images.close(image)


def test_a_view_that_somebody_keeps_is_found(images):
    """An eviction says that memory is still in use; it is given back when the view has gone."""
    module = make()
    image = image_of(images, module)
    view = module.head.bias[:3]
    if images._device is not None:
        assert not image.evict()
        assert held(images)[1] > 0
    expected = view.clone()
    del module
    images.close(image)
    assert torch.equal(view, expected)
    del view
    other = image_of(images, make(3))
    images.close(other)


def test_an_evicted_module_can_be_touched_when_its_tensors_are_elsewhere():
    """The device's memory is free at once; the module's tensors follow, and come back as they were."""
    images, module = Images("sim-0"), make()
    before = answer(module)
    image = image_of(images, module)
    assert image.evict()
    assert held(images)[1] == 0
    image.unpoint()
    assert all(not t.numel() for t in (*module.parameters(), *module.buffers()))
    other = image_of(images, make(9))
    image.swap_in(lambda: False)
    assert answer(module) == before
    del module
    images.close(image)
    images.close(other)
    assert held(images) == (0, 0)


def test_what_lies_in_the_image_already_is_not_copied(images):
    """Parameters that a backend read into the image's memory stay there; the rest goes beside them."""
    image = images.new()
    block = image.memory(4 * 49 + 1)
    block.prepare(0, block.size)
    module = make()
    before = answer(module)
    home = block.tensor[: 4 * 49].view(torch.float32).view(7, 7).copy_(module.query.data)
    module.query.data = home
    image.adopt(module)
    assert answer(module) == before
    if images._device is None:
        assert module.query.data_ptr() == home.data_ptr()
    else:
        assert image.evict()
        image.swap_in(lambda: False)
    assert answer(module) == before
    del module, home, block
    images.close(image)


def test_memory_that_the_module_does_not_use_is_not_kept(images):
    """Where much of what was read is not used, the image is packed anew to its exact size."""
    lean = image_of(images, make())
    image = images.new()
    block = image.memory(2**20)
    block.prepare(0, block.size)
    del block
    module = make()
    before = answer(module)
    image.adopt(module)
    assert image.device_bytes == lean.device_bytes
    assert answer(module) == before
    del module
    images.close(image)
    images.close(lean)


def test_a_swap_in_that_is_cancelled_or_fails_holds_nothing(monkeypatch):
    """The module is as before: not on the device, and a later swap-in brings it back."""
    images, module = Images("sim-0"), make()
    before = answer(module)
    image = image_of(images, module)
    assert image.evict()
    image.unpoint()
    with pytest.raises(Cancelled):
        image.swap_in(lambda: True)
    with monkeypatch.context() as patch:
        patch.setattr(images._device.arena, "populate", refuse)
        patch.setattr(images._device.arena._space, "_ready", [])
        with pytest.raises(MemoryError):
            image.swap_in(lambda: False)
    assert held(images)[1] == 0
    assert all(not t.numel() for t in module.parameters())
    image.swap_in(lambda: False)
    assert answer(module) == before
    del module
    images.close(image)


def refuse(start: int, length: int) -> None:
    """Have no memory."""
    raise MemoryError


@pytest.mark.parametrize("kind", ["meta", "sparse", "subclass"])
def test_what_cannot_be_moved_by_its_bytes_is_said(kind):
    """Tensors of other layouts or types, or without memory, are refused with their name for it."""
    module = torch.nn.Module()
    if kind == "meta":
        tensor = torch.empty(3, device="meta")
    elif kind == "sparse":
        tensor = torch.eye(3).to_sparse()
    else:
        tensor = torch.rand(3).as_subclass(Other)
    module.register_buffer("tensor", tensor)
    with pytest.raises(NotImageableError):
        find_layout(module, ())


class Other(torch.Tensor):
    """A tensor of somebody's own."""


def test_the_host_copy_can_go_alone():
    """Without its host copy a model stays on its device, and cannot be kept warm any more."""
    images, module = Images("sim-0"), make()
    before = answer(module)
    image = image_of(images, module)
    image.release_host()
    assert (image.host_bytes, held(images)[0]) == (0, 0)
    assert answer(module) == before
    del module
    images.close(image)
    assert held(images) == (0, 0)
