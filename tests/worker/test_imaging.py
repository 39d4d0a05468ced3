"""From a backend's load to an image: what each kind of backend ends up with."""

import os

import pytest
import torch

from modelhostd.worker.backend import LoadContext
from modelhostd.worker.imaging import Draft, Imaging
from modelhostd.worker.wire import images
from modelhostd.worker.wire.images import PAGE_BYTES, Kept, Range
from tests.worker.torch_backend import TorchBackend


def loaded(device, **options):
    """Return a loaded backend, its image and what the images of its worker share."""
    imaging = Imaging(device)
    draft = Draft(imaging)
    backend = TorchBackend()
    keep = options.pop("keep", True)
    backend.load(
        LoadContext("m", "nowhere", "awkward", device, options=options, memory=draft.memory)
    )
    return backend, draft.finish(backend, keep=keep), imaging.images


def taken(images):
    """Return what is held in the host arena and on the device."""
    return images._arena.taken_bytes, images._device.arena.taken_bytes


def test_an_opaque_backend_has_no_image():
    """Without a module there is nothing to keep; memory that it took and uses stays until it goes."""
    imaging = Imaging("sim-0")
    draft = Draft(imaging)
    part = draft.memory(8192)
    part.prepare(0, 8192)
    part.filled(0, 8192)
    mine = part.tensor[:16]
    del part
    image = draft.finish(TorchBackend(), keep=True)
    assert image.host_bytes == 0
    assert taken(imaging.images) == (8192, 0)
    mine.fill_(3)
    del mine
    imaging.close(image)
    assert taken(imaging.images) == (0, 0)


@pytest.mark.parametrize(("keep", "kept"), [(True, True), (False, False)])
def test_host_memory_is_held_only_where_it_may_be(keep, kept):
    """Without leave to keep it the image goes as soon as the slab is full."""
    backend, image, images = loaded("sim-0", keep=keep)
    host, device = taken(images)
    assert (host > 0, device > 0) == (kept, True)
    assert (image.host_bytes > 0) == kept
    backend.unload()
    images.close(image)
    assert taken(images) == (0, 0)


def test_what_cannot_be_imaged_is_loaded_all_the_same(monkeypatch):
    """A module with tensors of a type of its own serves; it is only not kept when it leaves."""

    class Other(torch.Tensor):
        pass

    imaging = Imaging("sim-0")
    draft = Draft(imaging)
    backend = TorchBackend()
    backend.load(LoadContext("m", "nowhere", "awkward", "sim-0", memory=draft.memory))
    backend.torch_module().register_buffer("own", torch.rand(3).as_subclass(Other))
    image = draft.finish(backend, keep=True)
    assert image.host_bytes == image.device_bytes == 0
    assert backend.infer({}, None)["out"].shape == (8,)
    backend.unload()
    imaging.close(image)
    assert taken(imaging.images) == (0, 0)


def test_what_an_earlier_worker_left_is_freed_before_anything_is_loaded():
    """An image that is dropped first of all gives its memory back, and what else was left stays."""
    memory = images.create("test")
    os.pwrite(memory, b"x" * 6 * PAGE_BYTES, 0)
    kept = {
        (name, 1): Kept(Range(at, 2 * PAGE_BYTES), Range(at + 2 * PAGE_BYTES, 10), b"1")
        for name, at in (("a", 0), ("b", 3 * PAGE_BYTES))
    }
    imaging = Imaging("cpu", descriptor=memory, kept=kept)
    imaging.drop(("a", 1))
    imaging.drop(("a", 1))
    assert images.held_bytes(memory) == 3 * PAGE_BYTES
    assert imaging.images._arena.taken_bytes == 3 * PAGE_BYTES
    os.close(memory)


def test_an_arena_that_could_not_be_mapped_can_be_later(monkeypatch):
    """Without addresses a load fails; the next one finds the memory as it was."""
    memory = images.create("test")
    imaging = Imaging("cpu", descriptor=memory)

    def none_left(*_, **__):
        raise OSError(12, "Cannot allocate memory")

    with monkeypatch.context() as full:
        full.setattr("modelhostd.worker.image.arena.mmap.mmap", none_left)
        with pytest.raises(OSError, match="allocate"):
            _ = imaging.images
    assert imaging.images._arena.taken_bytes == 0
    os.close(memory)
