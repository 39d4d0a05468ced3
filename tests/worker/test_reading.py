"""Weights read by several threads into the memory of an image: every byte in its place, or an error."""

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from modelhostd.worker.backend import Cancelled, LoadContext, LoadError
from modelhostd.worker.backends import files
from modelhostd.worker.image import reading
from modelhostd.worker.image.images import Images
from modelhostd.worker.image.layout import ALIGNMENT
from modelhostd.worker.image.reading import LARGE_BYTES, NEAR_BYTES, Plan, Stored
from modelhostd.worker.wire.images import PAGE_BYTES

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]


def write(folder, tensors, name="model.safetensors"):
    """Write a model's weights."""
    save_file(tensors, folder / name)


def random(shape, dtype):
    """Return random bits of a type, no NaN among them."""
    return (torch.rand(shape) * 100).to(dtype)


def read(folder, dtype=None, **more):
    """Read a model's weights."""
    return files.read_weights(LoadContext("m", folder, "t", "cpu", **more), dtype)


# Dimensions up to 12: some thousands of the smallest chunks. Those of 40 made a hundred thousand, a minute's work.
@settings(max_examples=20, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(0, 12), max_size=3).map(tuple), min_size=1, max_size=12),
    chunk=st.sampled_from([64, 512, 4096]),
    vectors=st.sampled_from([1, 3, 1024]),
    to=st.sampled_from([None, torch.bfloat16, torch.float32]),
    seed=st.integers(0, 999),
)
def test_every_tensor_is_what_was_written(tmp_path_factory, shapes, chunk, vectors, to, seed):
    """Whatever the shapes, types, chunks and precision: equal to the file, and aligned."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(seed)
    tensors = {
        f"t{index}": random(shape, DTYPES[(index + seed) % len(DTYPES)])
        for index, shape in enumerate(shapes)
    }
    half = len(shapes) // 2
    write(folder, dict(list(tensors.items())[:half]), "a.safetensors")
    write(folder, dict(list(tensors.items())[half:]), "b.safetensors")
    names = {
        name: "a.safetensors" if i < half else "b.safetensors" for i, name in enumerate(tensors)
    }
    index = '{"weight_map": {' + ", ".join(f'"{k}": "{v}"' for k, v in names.items()) + "}}"
    (folder / "model.safetensors.index.json").write_text(index)
    images = Images("sim-0")
    image = images.new()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "CHUNK_BYTES", chunk)
        patch.setattr(reading, "MAX_VECTORS", vectors)
        found = read(folder, to, memory=image.memory)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        wanted = tensor.to(to) if to is not None and tensor.is_floating_point() else tensor
        assert found[name].dtype is wanted.dtype
        assert torch.equal(found[name], wanted)
        assert tensor.numel() == 0 or found[name].data_ptr() % ALIGNMENT == 0
    del found
    images.close(image)
    assert images._arena.taken_bytes == 0


class Listening(files.OwnMemory):
    """Memory that begins a page and notes what it is told is filled."""

    def __init__(self, size):
        super().__init__(size + PAGE_BYTES)
        begin = -self.tensor.data_ptr() % PAGE_BYTES
        self.tensor = self.tensor[begin : begin + size]
        self.told = []

    def filled(self, start, length):
        self.told.append((start, start + length))


@settings(max_examples=20, deadline=None)
@given(
    lengths=st.lists(st.sampled_from([0, 8, 4000, 64 * 1024, 100_008]), max_size=8),
    begin=st.sampled_from([*range(4032, 4097, 8), 4100, 1864]),
    converted=st.booleans(),
)
def test_large_tensors_keep_away_from_where_they_are_copied_slowly(
    tmp_path_factory, lengths, begin, converted
):
    """Wherever a file's bytes begin: aligned in order, none just behind its place in a page, all of memory told once."""
    path = tmp_path_factory.mktemp("weights") / "file"
    numbers = torch.arange(sum(lengths) // 4, dtype=torch.float32)
    path.write_bytes(bytes(begin) + numbers.numpy().tobytes())
    to = torch.float64 if converted else torch.float32
    starts = [begin + sum(lengths[:index]) for index in range(len(lengths))]
    stored = [
        Stored(f"{start}-{index}", torch.float32, to, (length // 4,), 0, start, length)
        for index, (start, length) in enumerate(zip(starts, lengths, strict=True))
    ]
    plan = Plan(stored)
    memory = Listening(plan.total_bytes)
    with (
        open(path, "rb") as file,
        plan.reading(["file"], [file.fileno()], memory, lambda _: None) as found,
    ):
        offsets = [tensor.data_ptr() - memory.tensor.data_ptr() for tensor in found.values()]
    for tensor, offset, start in zip(found.values(), offsets, starts, strict=True):
        wanted = path.read_bytes()[start : start + tensor.numel() * 4]
        read = torch.frombuffer(bytearray(wanted), dtype=torch.float32) if wanted else tensor
        assert torch.equal(tensor, read.to(to))
        if tensor.numel() * 4 >= LARGE_BYTES and not converted:
            assert not 0 < (offset - start) % PAGE_BYTES < NEAR_BYTES
    real = [offset for offset, length in zip(offsets, lengths, strict=True) if length]
    assert real == sorted(real)
    assert all(offset % ALIGNMENT == 0 for offset in real)
    assert plan.total_bytes <= sum(2 * ALIGNMENT + one.final_bytes for one in stored)
    ends = [0, *(end for _, end in sorted(memory.told))]
    assert [start for start, _ in sorted(memory.told)] == ends[:-1]
    assert ends[-1] == plan.total_bytes


@given(
    left=st.integers(1, 10**11),
    threads=st.integers(1, 16),
)
def test_chunks_become_small_towards_the_end(left, threads):
    """No thread has more than half of its share to read when the others may be done, but for what is least."""
    size = reading.chunk_bytes(left, threads)
    assert reading.LAST_BYTES <= size <= reading.CHUNK_BYTES
    assert size in (reading.LAST_BYTES, reading.CHUNK_BYTES) or size * 2 * threads <= left


def test_progress_counts_every_byte_of_the_file(tmp_path):
    """Bytes are reported as they come, up to the size of the files, also where they are converted."""
    write(tmp_path, {"a": torch.rand(1000, 50), "b": torch.rand(3)})
    seen = []
    read(tmp_path, torch.bfloat16, report=lambda done, total: seen.append((done, total)))
    size = (tmp_path / "model.safetensors").stat().st_size
    assert seen[-1] == (size, size)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


@pytest.mark.parametrize("where", ["empty", "prefix", "header", "data", "last byte"])
def test_a_file_that_ends_too_early_is_refused(tmp_path, where):
    """Wherever a file was cut, the load fails with its name and holds nothing."""
    write(tmp_path, {"a": torch.rand(1000), "b": torch.rand(1000)})
    path = tmp_path / "model.safetensors"
    size = path.stat().st_size
    header = int.from_bytes(path.read_bytes()[:8], "little")
    ends = {"empty": 0, "prefix": 5, "header": header // 2, "data": 8 + header + 400}
    os.truncate(path, ends.get(where, size - 1))
    images = Images("sim-0")
    image = images.new()
    with pytest.raises(LoadError, match=r"model\.safetensors"):
        read(tmp_path, memory=image.memory)
    images.close(image)
    assert images._arena.taken_bytes == 0


def test_a_file_that_shrinks_while_it_is_read_is_refused(tmp_path):
    """What was there when the header was read and is not when its bytes are is an error, not zeros."""
    write(tmp_path, {"a": torch.rand(100_000), "b": torch.rand(100_000)})
    path = tmp_path / "model.safetensors"

    def shrink(size):
        os.truncate(path, path.stat().st_size // 2)
        return files.OwnMemory(size)

    with pytest.raises(LoadError, match="shorter"):
        read(tmp_path, memory=shrink)


def test_a_cancelled_load_stops_reading(tmp_path):
    """Threads stop at the next chunk, and what they read is free."""
    write(tmp_path, {"a": torch.rand(100_000)})
    with pytest.raises(Cancelled):
        read(tmp_path, cancelled=lambda: True)


def test_without_memory_the_load_says_so(tmp_path):
    """A thread's MemoryError is the load's."""
    write(tmp_path, {"a": torch.rand(100_000)})

    class Nothing(files.OwnMemory):
        def prepare(self, start, length):
            raise MemoryError

    with pytest.raises(MemoryError):
        read(tmp_path, memory=Nothing)
