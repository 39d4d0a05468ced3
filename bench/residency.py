"""Cold load into the host arena, swap-in to a slab and eviction, on `devices/sim-0`: a GPU's code path in RAM.

A cold load is read from the page cache into an image and its module's parameters made views of it; the reference of the first
figure is the same number of threads reading the same file into a warm buffer of its size. The other loaders
make the same tensors; where they map the file (safetensors 0.8 and torch do on a CPU) the tensors are copied, since a mapping is
the page cache's memory, which nobody accounts for and which changes with the file.

What they copy to is faulted for each load, as in any process that loads its first model or gave back the last one. A process that
loads the same sizes again and again may find them in its heap, faulted: whether it does hangs on what else malloc was asked for
between, and moves these loaders by three times. So malloc is told (`loaders.py`), and a figure says which of both it was.

A swap-in's reference is memmove between two warm buffers.
"""

import ctypes
import gc
import itertools
import random
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.figure import Effort, Figure
from bench.loaders import empty_heap, fastsafetensors, fill_heap

MIB = 2**20
TENSORS, TENSOR_BYTES = 200, 4 * MIB
MANY = 10_000
READ_SHARE, LIBRARY_TIMES, SWAP_SHARE, EVICT_MS = 0.9, 4.0, 0.8, 1.0
SWAPS = 100
READY_DEADLINE_S = 60
PAGE_BYTES = 4096


def figures(effort: Effort) -> Sequence[Figure]:
    """Measure all of it, in turns."""
    scale = min(1.0, effort.scale * 4)
    with tempfile.TemporaryDirectory(prefix="mh-bench-") as scratch:
        return [
            *cold_loads(Path(scratch), effort.rounds, scale),
            *library_loads(Path(scratch), effort.rounds, scale),
            *swaps(effort.rounds, scale),
        ]


def cold_loads(folder: Path, rounds: int, scale: float) -> list[Figure]:
    """Return how fast a file gets into an image, beside other ways into memory."""
    import torch
    from safetensors.torch import load_file

    from modelhostd.worker.image.images import Images

    path = write_weights(folder, max(4, int(TENSORS * scale)))
    size = path.stat().st_size
    ready, fresh = Images("cpu", size + 64 * MIB), Images("cpu")
    both = Images("sim-0", size + 64 * MIB)
    warm = torch.zeros(size, dtype=torch.uint8)
    with open(path, "rb") as file:
        data = 8 + int.from_bytes(file.read(8), "little")
    room = torch.zeros(size + PAGE_BYTES, dtype=torch.uint8)
    shift = (-room.data_ptr() - data) % PAGE_BYTES

    def copied() -> object:
        return {name: tensor.clone() for name, tensor in load_file(path).items()}

    ways: dict[str, Callable[[], object]] = {
        "ready": lambda: read_into(ready, folder),
        "buffer": lambda: read_raw(path, warm),
        "aligned": lambda: read_raw(path, room[shift : shift + size]),
        "fresh": lambda: read_into(fresh, folder),
        "both": lambda: read_into(both, folder),
        "safetensors": copied,
        "kept": copied,
        "mapped": lambda: [t.view(torch.uint8)[:, ::4096].sum() for t in load_file(path).values()],
        "torch": lambda: {
            name: tensor.clone()
            for name, tensor in torch.load(
                folder / "model.pt", mmap=True, weights_only=True
            ).items()
        },
        "cat": lambda: subprocess.run(["cat", path], stdout=subprocess.DEVNULL, check=True),
    }
    fast = fastsafetensors(path)
    if fast is not None:
        ways["fastsafetensors"] = fast
    wait_until_ready(ready, size)
    wait_until_ready(both, size)
    before = dict.fromkeys(("safetensors", "torch", "fastsafetensors"), empty_heap)
    seconds = in_turns(ways, rounds, before | {"kept": lambda: fill_heap(copied)})
    more = {name: ways[name] for name in ("ready", "buffer", "aligned")}
    for name, times in in_turns(more, 2 * rounds).items():
        seconds[name] += times
    rates = {name: size / 1e9 / statistics.median(times) for name, times in seconds.items()}
    unit, name = "GB/s", f"cold load of {size // MIB} MiB from the page cache"
    peer = [
        Figure(
            f"{name}, ready arena, beside fastsafetensors on cpu", rates["ready"], unit,
            reference=rates["fastsafetensors"], expected="4x",
        )
    ] if fast is not None else []  # fmt: skip
    return [
        Figure(
            f"{name}, ready arena, beside the same threads into a warm buffer", rates["ready"], unit, READ_SHARE,
            at_least=True, reference=rates["buffer"], of_reference=True,
            expected="0.9x: moved against 32 bytes 0.7x to 0.85x, to huge pages 1.2x of that",
        ),
        Figure(
            f"{name}, ready arena, beside the same, the first tensor at the begin of a page", rates["ready"], unit,
            reference=rates["aligned"], expected="1x to 1.15x: the arena is of huge pages",
        ),
        Figure(
            f"{name}, ready arena, beside safetensors.torch.load_file copied", rates["ready"], unit, LIBRARY_TIMES,
            at_least=True, reference=rates["safetensors"], of_reference=True, expected="3x to 8x",
        ),
        Figure(
            f"{name}, ready arena, beside the same in a heap that was kept", rates["ready"], unit,
            reference=rates["kept"], expected="1x: both copy once into warm memory",
        ),
        *peer,
        Figure(
            f"{name}, ready arena, beside torch.load(mmap=True) copied", rates["ready"], unit,
            reference=rates["torch"], expected="4x",
        ),
        Figure(
            f"{name} to sim-0, both tiers filled, beside the ready arena alone", rates["both"], unit,
            reference=rates["ready"], expected="0.7x",
        ),
        Figure(f"{name}, ready arena, beside cat", rates["ready"], unit, reference=rates["cat"]),
        Figure(
            f"{name}, fresh memory, beside safetensors.torch.load_file copied", rates["fresh"], unit,
            reference=rates["safetensors"], expected="1.2x",
        ),
        Figure(
            f"{name}, ready arena, beside load_file's mapping, every page touched", rates["ready"], unit,
            reference=rates["mapped"], expected="below 1x: nothing is read",
        ),
    ]  # fmt: skip


def write_weights(folder: Path, count: int) -> Path:
    """Write so many tensors as safetensors and as torch does; return the former."""
    import torch
    from safetensors.torch import save_file

    weights = {
        f"block.{index}.weight": torch.randint(0, 255, (TENSOR_BYTES,), dtype=torch.uint8)
        .view(torch.float32)
        .reshape(1024, -1)
        for index in range(count)
    }
    path = folder / "model.safetensors"
    save_file(weights, path)
    torch.save(weights, folder / "model.pt")
    return path


def library_loads(folder: Path, rounds: int, scale: float) -> list[Figure]:
    """Return how long it takes until a model of the transformers library is there, beside the library."""
    import transformers

    from modelhostd.worker.backend import LoadContext
    from modelhostd.worker.backends.building import build
    from modelhostd.worker.image.images import Images

    quiet: Any = transformers.utils.logging
    quiet.set_verbosity_error()
    quiet.disable_progress_bar()
    config = transformers.BertConfig(num_hidden_layers=max(1, int(24 * scale)))
    model_dir = folder / "bert"
    transformers.BertModel(config).save_pretrained(model_dir)
    size = (model_dir / "model.safetensors").stat().st_size
    images = Images("cpu", size + 64 * MIB)
    wait_until_ready(images, size)

    def ours() -> None:
        image = images.new()
        context = LoadContext("m", model_dir, "t", "cpu", memory=image.memory)
        module = build(context, config, {type(config): transformers.BertModel})
        image.adopt(module)
        del module, context
        images.close(image)

    def library() -> None:
        module = transformers.BertModel.from_pretrained(model_dir)
        for parameter in module.parameters():
            parameter.data = parameter.data.clone()

    ways = {
        "ours": ours,
        "faulted": library,
        "kept": library,
    }
    before = {"faulted": empty_heap, "kept": lambda: fill_heap(library)}
    seconds = in_turns(ways, rounds, before)
    ours_s, faulted_s, kept_s = (statistics.median(seconds[name]) for name in ways)
    name = f"BERT of {size // MIB} MiB to a module on cpu"
    return [
        Figure(
            f"{name}, beside from_pretrained with its mapping copied", ours_s, "s",
            reference=faulted_s, expected="0.4x",
        ),
        Figure(
            f"{name}, beside the same in a heap that was kept", ours_s, "s",
            reference=kept_s, expected="1x: the module takes longer than the copy",
        ),
    ]  # fmt: skip


def swaps(rounds: int, scale: float) -> list[Figure]:
    """Return how fast images are swapped in, and what an eviction and a hundred swaps cost."""
    import torch

    from modelhostd.worker.image.images import Images

    images = Images("sim-0")
    count = max(4, int(TENSORS * scale))
    whole = torch.nn.ParameterList(
        torch.nn.Parameter(torch.ones(TENSOR_BYTES // 4), requires_grad=False) for _ in range(count)
    )
    many = torch.nn.ParameterList(
        torch.nn.Parameter(torch.ones(1000), requires_grad=False)
        for _ in range(max(100, int(MANY * scale)))
    )
    image, scattered = images.new(), images.new()
    image.adopt(whole)
    scattered.adopt(many)
    size = image.device_bytes
    source, target = torch.ones(size, dtype=torch.uint8), torch.zeros(size, dtype=torch.uint8)
    copied: list[float] = []
    swapped: list[float] = []
    evicted: list[float] = []
    evicted_many: list[float] = []
    swapped_many: list[float] = []
    told_many: list[float] = []
    for _ in range(max(5, rounds * 3)):
        copied.append(timed(lambda: ctypes.memmove(target.data_ptr(), source.data_ptr(), size)))
        evicted.append(timed(image.evict))
        image.unpoint()
        swapped.append(timed(lambda: image.swap_in(lambda: False)))
        evicted_many.append(timed(scattered.evict))
        told_many.append(timed(scattered.unpoint))
        swapped_many.append(timed(lambda: scattered.swap_in(lambda: False)))
    leaked = leaks(images, [image, scattered])
    rate, reference = (size / 1e9 / statistics.median(times) for times in (swapped, copied))
    return [
        Figure(
            f"swap-in of {size // MIB} MiB to sim-0, beside memmove", rate, "GB/s", SWAP_SHARE,
            at_least=True, reference=reference, of_reference=True, expected="0.95x",
        ),
        Figure(
            f"evict {count} tensors with host copy, median", statistics.median(evicted) * 1e3, "ms",
            EVICT_MS, expected="0.05 ms",
        ),
        Figure(
            f"evict {len(many)} tensors with host copy, median", statistics.median(evicted_many) * 1e3, "ms",
            EVICT_MS, expected="0.05 ms",
        ),
        Figure(
            f"{len(many)} tensors told of it, after the eviction was answered, median",
            statistics.median(told_many) * 1e3, "ms", expected="4 ms",
        ),
        Figure(
            f"swap-in of {len(many)} tensors of 4 kB, median", statistics.median(swapped_many) * 1e3, "ms",
            expected="30 ms",
        ),
        Figure(f"bytes leaked by {SWAPS} random swaps", leaked, "", 0.0, expected="0"),
    ]  # fmt: skip


def leaks(images: Any, swapped: Sequence[Any]) -> int:
    """Return the bytes by which what is held differs from what should be, after random swaps."""
    out: set[Any] = set()
    generator = random.Random(7)
    for _ in range(SWAPS):
        image = generator.choice(list(swapped))
        if image in out:
            image.swap_in(lambda: False)
            out.discard(image)
        else:
            image.evict()
            out.add(image)
    held = images._device.arena.taken_bytes  # noqa: SLF001
    wanted = sum(image.device_bytes for image in swapped if image not in out)
    page = PAGE_BYTES * len(swapped)  # a slab's end is a page's
    return max(0, int(abs(held - wanted)) - page)


def wait_until_ready(images: Any, size: int) -> None:
    """Wait until so many bytes of the arena are faulted, and of huge pages where the kernel gives them."""
    end = time.monotonic() + READY_DEADLINE_S
    while images._arena.ready_bytes < size:  # noqa: SLF001
        if time.monotonic() > end:
            raise TimeoutError(f"{size} bytes were not faulted within {READY_DEADLINE_S} s")
        time.sleep(0.05)


def read_into(images: Any, folder: Path) -> None:
    """Load a file into an image, then let go of it."""
    from modelhostd.worker.backend import LoadContext
    from modelhostd.worker.backends import files

    image = images.new()
    found = files.read_weights(LoadContext("m", folder, "t", "sim-0", memory=image.memory), None)
    del found
    image.close()


def read_raw(path: Path, target: Any) -> None:
    """Read a file into a buffer with as many threads as a load has, in the same chunks."""
    import os

    from modelhostd.worker.image.reading import MAX_THREADS, chunk_bytes

    view = target.numpy().data
    size = path.stat().st_size
    count = min(MAX_THREADS, len(os.sched_getaffinity(0)))
    ends = [0]
    while ends[-1] < size:
        ends.append(min(size, ends[-1] + chunk_bytes(size - ends[-1], count)))
    chunks = iter(list(itertools.pairwise(ends)))
    lock = threading.Lock()

    def run() -> None:
        while True:
            with lock:
                position, end = next(chunks, (0, 0))
            if not end:
                return
            while position < end:
                position += os.preadv(file.fileno(), [view[position:end]], position)

    with open(path, "rb", buffering=0) as file:
        threads = [threading.Thread(target=run) for _ in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def in_turns(
    ways: Mapping[str, Callable[[], object]],
    rounds: int,
    before: Mapping[str, Callable[[], object]] | None = None,
) -> dict[str, list[float]]:
    """Return the seconds of each way, by turns, there and back; not counted: the first round, and what comes ``before`` a way."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in list(ways.items())[:: -1 if number % 2 else 1]:
            gc.collect()
            if before and name in before:
                before[name]()
            taken = timed(way)
            if number:
                seconds[name].append(taken)
    return seconds


def timed(what: Callable[[], object]) -> float:
    """Return the seconds that a call takes."""
    begin = time.perf_counter()
    what()
    return time.perf_counter() - begin
