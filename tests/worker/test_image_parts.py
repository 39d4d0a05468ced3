"""Parts of images: extents go to the device while others are read, and the order of calls that CUDA needs."""

import threading

import pytest
import torch
from safetensors.torch import save_file

from modelhostd.worker.backend import LoadContext
from modelhostd.worker.backends import files
from modelhostd.worker.image import part as parts
from modelhostd.worker.image import reading
from modelhostd.worker.image.arena import HostArena
from modelhostd.worker.image.cuda import CudaDevice
from modelhostd.worker.image.image import Image
from modelhostd.worker.image.images import Images
from tests.fakes.cuda import FakeCuda
from tests.worker.torch_backend import Awkward

EXTENT = 8192


@pytest.fixture
def small(monkeypatch):
    """Have extents and chunks be small."""
    monkeypatch.setattr(parts, "EXTENT_BYTES", EXTENT)
    monkeypatch.setattr(reading, "CHUNK_BYTES", 3000 // 8 * 8)


@pytest.fixture
def gpu():
    """Give a CUDA device whose memory is RAM, and the log of its calls."""
    cuda = FakeCuda()
    device = CudaDevice(0, cuda)
    device.torch_device = torch.device("cpu")
    return device, cuda


@pytest.mark.parametrize("to", [None, torch.bfloat16])
def test_extents_go_to_the_device_while_others_are_read(small, tmp_path, to):
    """When all is read the slab is full, before the module is even built; nothing is copied twice."""
    torch.manual_seed(3)
    weights = {f"w{index}": torch.rand(index * 101 + 1) for index in range(12)}
    save_file(weights, tmp_path / "model.safetensors")
    images = Images("sim-0")
    image = images.new()
    found = files.read_weights(LoadContext("m", tmp_path, "t", "sim-0", memory=image.memory), to)
    (part,) = image._parts
    assert part._missing == [0] * len(part._missing)
    assert torch.equal(part.slab.tensor, part.tensor)
    module = torch.nn.ParameterDict(
        {name: torch.nn.Parameter(tensor, requires_grad=False) for name, tensor in found.items()}
    )
    image.adopt(module)
    del found
    part.slab.copy = None
    for name, tensor in weights.items():
        assert torch.equal(module[name], tensor.to(to) if to else tensor)
    del part
    assert image.evict()
    image.swap_in(lambda: False)
    for name, tensor in weights.items():
        assert torch.equal(module[name], tensor.to(to) if to else tensor)
    del module
    images.close(image)
    assert (images._arena.taken_bytes, images._device.arena.taken_bytes) == (0, 0)


def test_on_cuda_memory_is_pinned_copied_and_waited_for_in_order(small, gpu):
    """Pinned once, copied in a stream of its own, which the default stream waits for; freed when both are done."""
    device, cuda = gpu
    torch.manual_seed(1)
    module = Awkward(40).eval().requires_grad_(False)
    image = Image(device, HostArena("test"))
    image.adopt(module)
    extents = -(-image.device_bytes // EXTENT)
    assert extents > 2
    assert cuda.log == ["register", "allocate", "copy in copies"] + [
        "register", "copy in copies",
    ] * (extents - 1) + ["default waits for copies"]  # fmt: skip
    assert sum(cuda.registered.values()) == image.device_bytes
    for _ in range(3):
        cuda.log.clear()
        assert image.evict()
        assert cuda.log == ["synchronised with copies", "synchronised with default"]
        assert cuda.pools == 0
        # Views that are left hold no memory.
        assert {t.untyped_storage().nbytes() for t in module.parameters()} == {0}
        cuda.log.clear()
        image.swap_in(lambda: False)
        assert cuda.log == ["allocate", *["copy in copies"] * extents, "default waits for copies"]
    cuda.log.clear()
    del module
    assert image.close()
    assert cuda.log[:2] == ["synchronised with copies", "synchronised with default"]
    assert cuda.log[2:] == ["unregister"] * extents
    assert (cuda.registered, cuda.pools) == ({}, 0)


def test_the_host_copy_goes_only_when_it_was_copied(small, gpu):
    """Letting go of the host's copy waits for the copies in flight before memory is unpinned."""
    device, cuda = gpu
    module = Awkward(40).eval()
    image = Image(device, HostArena("test"))
    image.adopt(module)
    cuda.log.clear()
    assert image.release_host() == 0
    assert cuda.log[0] == "synchronised with copies"
    assert set(cuda.log[1:]) == {"unregister"}
    assert image.host_bytes == 0
    del module
    assert image.close()


def test_a_view_of_the_copy_keeps_it_until_the_module_has_gone(small):
    """What somebody has a view of stays where it is, and is told; nothing can come back from it."""
    images = Images("sim-0")
    module, image = Awkward(40).eval(), images.new()
    image.adopt(module)
    held = image.host_bytes
    view = image._parts[0].tensor[:8]
    for _ in range(2):
        assert image.release_host() == held
    assert image.host_bytes == 0
    assert images._arena.taken_bytes >= held
    del view, module
    images.close(image)
    assert images._arena.taken_bytes == 0


def test_without_pinned_memory_it_goes_on(small, gpu):
    """A registration that fails costs speed, not the load; what was pinned is unpinned in the end."""
    device, cuda = gpu
    cuda.refuse_after = 1
    module = Awkward(40).eval()
    image = Image(device, HostArena("test"))
    image.adopt(module)
    assert len(cuda.registered) == 1
    # A thread whose registration failed is told of it once more, by its next kernel.
    assert threading.get_ident() not in cuda.registrars
    assert image.evict()
    image.swap_in(lambda: False)
    del module
    assert image.close()
    assert cuda.registered == {}
