"""Images on a real GPU: the same bits, pinned memory, and nothing left behind. Run with ``-m gpu``."""

import gc
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from modelhostd.worker.image.images import Images
from tests.worker.torch_backend import Awkward

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU"),
]


def answer(module):
    """Return what the module makes of fixed rows on the GPU, to the bit."""
    with torch.inference_mode():
        rows = torch.arange(32, device="cuda").reshape(8, 4) % 11
        return module(rows).cpu().numpy().tobytes()


def large(mebibytes=256):
    """Return a module of some size."""
    return torch.nn.ParameterList(
        torch.nn.Parameter(torch.rand(2**18), requires_grad=False) for _ in range(mebibytes)
    )


def test_a_hundred_swaps_change_nothing_and_leave_nothing():
    """Outputs are equal to the bit; with everything evicted torch holds not a byte more than before."""
    images = Images("cuda-0")
    torch.manual_seed(1)
    module = Awkward().eval().requires_grad_(False)
    image = images.new()
    image.adopt(module)
    before = answer(module)
    assert image.evict()
    gc.collect()
    torch.cuda.empty_cache()
    allocated = torch.cuda.memory_allocated()
    for _ in range(100):
        image.swap_in(lambda: False)
        assert torch.cuda.memory_allocated() >= allocated + image.device_bytes
        assert answer(module) == before
        assert image.evict()
        assert torch.cuda.memory_allocated() == allocated
    del module
    images.close(image)
    assert images._arena.taken_bytes == 0


def test_the_arena_is_pinned():
    """torch sees the image's memory as pinned, although it is read-only to this process."""
    images = Images("cuda-0")
    module = large(80)
    image = images.new()
    image.adopt(module)
    (part,) = image._parts
    assert part.tensor[: 2**20].is_pinned()
    assert part.tensor[-(2**20) :].is_pinned()
    del module, part
    images.close(image)


def test_a_slab_goes_back_to_the_driver():
    """After an eviction the driver has its memory again: no cached block is left of a slab."""
    images = Images("cuda-0")
    module = large(512)
    image = images.new()
    image.adopt(module)
    torch.cuda.synchronize()
    free, _ = torch.cuda.mem_get_info()
    assert image.evict()
    after, _ = torch.cuda.mem_get_info()
    assert after - free >= 512 * 2**20
    del module
    images.close(image)


def test_a_copy_goes_while_passes_run():
    """The host's memory is unpinned and free while the module computes on the device, to the bit as before; then it goes whole."""
    images = Images("cuda-0")
    torch.manual_seed(1)
    module = Awkward(400).eval().requires_grad_(False)
    image = images.new()
    image.adopt(module)
    before, size = answer(module), image.device_bytes
    assert images._arena.taken_bytes >= size
    with ThreadPoolExecutor(1) as passes:
        answers = [passes.submit(answer, module) for _ in range(200)]
        assert image.release_host() == 0
        assert images._arena.taken_bytes == 0
        assert {each.result() for each in answers} == {before}
    assert image.host_bytes == 0
    assert answer(module) == before
    allocated = torch.cuda.memory_allocated()
    del module
    images.close(image)
    assert torch.cuda.memory_allocated() <= allocated - size


def test_out_of_memory_is_said_and_nothing_is_held():
    """A slab that does not fit raises torch's error, and the image comes back when there is room."""
    images = Images("cuda-0")
    module = large(256)
    image = images.new()
    image.adopt(module)
    expected = module[7].clone().cpu()
    assert image.evict()
    free, _ = torch.cuda.mem_get_info()
    hog = torch.empty(free - 128 * 2**20, dtype=torch.uint8, device="cuda")
    with pytest.raises(torch.OutOfMemoryError):
        image.swap_in(lambda: False)
    del hog
    torch.cuda.empty_cache()
    image.swap_in(lambda: False)
    assert torch.equal(module[7].cpu(), expected)
    del module
    images.close(image)
