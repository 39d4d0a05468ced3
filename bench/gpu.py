"""Images on a GPU beside the machine's own limits and other ways of loading: ``make bench-gpu``.

    python bench/gpu.py                        on cuda-0 where torch finds a GPU, else on sim-0
    python bench/gpu.py --sizes 1 16 --rounds 7

Models of random weights: large tensors (290 of them, whatever the size) and, of the first size, 10,000 small ones. All ways take
turns in one run, the first round is not counted, the device is waited for. Peers that are not installed are left out. On sim-0 the
same code runs, so that nobody needs a GPU to change it; its figures say nothing of one.
"""

import argparse
import importlib
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import safetensors

# Run as a script: the repository's root is not on the path by itself.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.figure import Figure
from bench.figures import conditions, table
from bench.residency import in_turns, wait_until_ready

GIB, MIB = 2**30, 2**20
LARGE, MANY = 290, 10_000
READY_BYTES = 2 * GIB
"""Of the host arena, faulted before anything is measured: as an operator sets it who reloads much."""
PEAK_SHARE, PINNED_TIMES, PAGEABLE_TIMES, EVICT_MS, MEMORY_SHARE = 0.95, 2.0, 5.0, 1.0, 0.03


class Bench:
    """A device, and what every measurement does with it."""

    def __init__(self, device: str, rounds: int) -> None:
        import torch

        from modelhostd.worker.image.devices import find_device
        from modelhostd.worker.image.images import Images

        self.torch = torch
        self.name = device
        self.device = find_device(device)
        self.cuda = self.device.type == "cuda"
        self.images: Any = Images(device, READY_BYTES)
        self.rounds = rounds

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.cuda:
            self.torch.cuda.synchronize(self.device)

    def median_s(self, ways: Mapping[str, Callable[[], object]]) -> dict[str, float]:
        """Return the median seconds of each way until the device is done, by turns."""

        def waited(way: Callable[[], object]) -> Callable[[], object]:
            def run() -> None:
                way()
                self.synchronize()

            return run

        seconds = in_turns({name: waited(way) for name, way in ways.items()}, self.rounds)
        return {name: statistics.median(times) for name, times in seconds.items()}

    def module(self, size: int, tensors: int) -> Any:
        """Return a module of ``tensors`` equal parameters, ``size`` bytes in all."""
        elements = max(1, size // tensors // 2)
        make = self.torch.nn.Parameter
        return self.torch.nn.ParameterList(
            make(self.torch.ones(elements, dtype=self.torch.bfloat16), requires_grad=False)
            for _ in range(tensors)
        )


def swap_ins(bench: Bench, size: int, tensors: int) -> list[Figure]:
    """Return how fast an image gets to the device and leaves it, beside other ways from the host's memory."""
    torch = bench.torch
    module = bench.module(size, tensors)
    image = bench.images.new()
    image.adopt(module)
    bench.synchronize()
    total = image.device_bytes
    piece = min(total, GIB)
    host = torch.ones(piece, dtype=torch.uint8, pin_memory=bench.cuda)
    target = torch.empty(piece, dtype=torch.uint8, device=bench.device)
    shapes = [parameter.numel() for parameter in module]
    pinned = torch.ones(total // 2, dtype=torch.bfloat16, pin_memory=bench.cuda)
    pageable = torch.ones(total // 2, dtype=torch.bfloat16)
    evictions: list[float] = []

    def swap() -> None:
        image.swap_in(lambda: False)

    def each(source: Any, *, non_blocking: bool) -> None:
        parts = source[: sum(shapes)].split(shapes)
        _ = [part.to(bench.device, non_blocking=non_blocking, copy=True) for part in parts]
        bench.synchronize()

    def evict() -> None:
        begin = time.perf_counter()
        assert image.evict()
        evictions.append(time.perf_counter() - begin)

    evict()
    ways: dict[str, Callable[[], object]] = {
        "peak": lambda: target.copy_(host, non_blocking=True),
        "swap": swap,
        "evict": evict,
        "pinned": lambda: each(pinned, non_blocking=True),
        "pageable": lambda: each(pageable, non_blocking=False),
    }
    seconds = bench.median_s(ways)
    rate = total / 1e9 / seconds["swap"]
    name = f"{total / GIB:.2f} GiB in {tensors} tensors to {bench.name}"
    figures = [
        Figure(
            f"swap-in of {name}, beside one pinned copy", rate, "GB/s",
            PEAK_SHARE if total >= 0.9 * GIB and tensors == LARGE else None,
            at_least=True, reference=piece / 1e9 / seconds["peak"], of_reference=True, expected="0.97x",
        ),
        Figure(
            f"swap-in of {name}, beside pinned copies of each tensor", rate, "GB/s",
            PINNED_TIMES if tensors == MANY else None,
            at_least=True, reference=total / 1e9 / seconds["pinned"], of_reference=True,
            expected="3x" if tensors == MANY else "1x",
        ),
        Figure(
            f"swap-in of {name}, beside .to() of each tensor from pageable memory", rate, "GB/s",
            PAGEABLE_TIMES if tensors == LARGE else None,
            at_least=True, reference=total / 1e9 / seconds["pageable"], of_reference=True, expected="6x",
        ),
        Figure(
            f"evict {name}, host copy kept, median", statistics.median(evictions) * 1e3, "ms",
            EVICT_MS, expected="0.3 ms",
        ),
    ]  # fmt: skip
    del module
    bench.images.close(image)
    return figures


def files_in(bench: Bench, size: int) -> list[Figure]:
    """Return how fast a file gets from the page cache to the device, beside the libraries that can."""
    from safetensors.torch import load_file, save_file

    from modelhostd.worker.backend import LoadContext
    from modelhostd.worker.backends import files

    with tempfile.TemporaryDirectory(prefix="mh-bench-") as scratch:
        folder = Path(scratch)
        path = folder / "model.safetensors"
        module = bench.module(size, LARGE)
        save_file({f"w{index}": tensor.data for index, tensor in enumerate(module)}, path)
        del module

        def ours() -> None:
            image = bench.images.new()
            context = LoadContext("m", folder, "t", bench.name, memory=image.memory)
            weights = files.read_weights(context, None)
            parameters = bench.torch.nn.ParameterList(
                bench.torch.nn.Parameter(tensor, requires_grad=False) for tensor in weights.values()
            )
            del weights, context
            image.adopt(parameters)
            bench.synchronize()
            del parameters
            bench.images.close(image)

        ways: dict[str, Callable[[], object]] = {
            "ours": ours,
            f"safetensors {version('safetensors')}": lambda: [
                tensor.to(bench.device, copy=not bench.cuda)
                for tensor in load_file(path, device=str(bench.device)).values()
            ],
        }
        seconds = bench.median_s(ways | peers(bench, path))
        total = path.stat().st_size / 1e9
        return [
            Figure(
                f"file of {total:.2f} GB in the page cache to {bench.name}, beside {name}",
                total / seconds["ours"], "GB/s", 1.0, at_least=True,
                reference=total / taken, of_reference=True, expected="above 1x",
            )
            for name, taken in seconds.items() if name != "ours"
        ]  # fmt: skip


def peers(bench: Bench, path: Path) -> dict[str, Callable[[], object]]:
    """Return the loaders that are installed and can load to the device."""
    found: dict[str, Callable[[], object]] = {}
    if bench.cuda and hasattr(safetensors.safe_open, "prefetch"):  # from 0.9 on

        def prefetched() -> None:
            with safetensors.safe_open(path, framework="pt", device=str(bench.device)) as file:
                file.prefetch()
                names = file.keys()
                _ = [file.get_tensor(name) for name in names]

        found[f"safetensors {version('safetensors')} with prefetch"] = prefetched
    elif bench.cuda:
        print("# this safetensors has no prefetch: left out", file=sys.stderr)
    if bench.cuda:
        try:
            fast = importlib.import_module("fastsafetensors")
        except ImportError:
            print("# fastsafetensors is not installed: left out", file=sys.stderr)
        else:

            def fastsafetensors() -> None:
                group = fast.SingleGroup()
                loader = fast.SafeTensorsFileLoader(group, bench.device, nogds=True)
                loader.add_filenames({0: [str(path)]})
                buffer = loader.copy_files_to_device()
                _ = [buffer.get_tensor(name) for name in loader.get_keys()]
                buffer.close()
                loader.close()

            # Its default reads past the page cache, which all others read from.
            os.environ.setdefault("FASTSAFETENSORS_ODIRECT", "0")
            found[f"fastsafetensors {version('fastsafetensors')}"] = fastsafetensors
    try:
        streamer = importlib.import_module("runai_model_streamer")
    except ImportError:
        print("# runai_model_streamer is not installed: left out", file=sys.stderr)
    else:

        def runai() -> None:
            with streamer.SafetensorsStreamer() as stream:
                stream.stream_file(str(path))
                for _, tensor in stream.get_tensors():
                    tensor.to(bench.device, copy=not bench.cuda)

        found[f"Run:ai streamer {version('runai-model-streamer')}"] = runai
    return found


def accounting(bench: Bench, size: int) -> list[Figure]:
    """Return what a model takes of the device beside what its tensors say, and what is left after it."""
    module = bench.module(size, LARGE)
    predicted = sum(tensor.numel() * tensor.element_size() for tensor in module)
    before = held(bench)
    image = bench.images.new()
    image.adopt(module)
    bench.synchronize()
    measured = held(bench) - before
    image.evict()
    left = held(bench) - before
    del module
    bench.images.close(image)
    return [
        Figure(
            f"memory of {predicted / GIB:.2f} GiB, measured beyond predicted",
            abs(measured - predicted) / predicted, "of it", MEMORY_SHARE, expected="0.001",
        ),
        Figure("bytes of it left on the device after its eviction", left, "", 0.0, expected="0"),
    ]  # fmt: skip


def held(bench: Bench) -> int:
    """Return the bytes that are allocated on the device."""
    if bench.cuda:
        return int(bench.torch.cuda.memory_allocated(bench.device))
    return int(bench.images._device.arena.taken_bytes)  # noqa: SLF001


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    import torch

    found = "cuda-0" if torch.cuda.is_available() else "sim-0"
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--device", default=found)
    parser.add_argument(
        "--sizes", type=float, nargs="+", default=[1, 16] if found == "cuda-0" else [0.125],
        metavar="GIB", help="of models",
    )  # fmt: skip
    parser.add_argument("--rounds", type=int, default=7 if found == "cuda-0" else 2)
    given = parser.parse_args(arguments)
    bench = Bench(given.device, given.rounds)
    wait_until_ready(bench.images, READY_BYTES)
    first = int(given.sizes[0] * GIB)
    figures = accounting(bench, first)
    for size in given.sizes:
        figures += swap_ins(bench, int(size * GIB), LARGE)
    figures += swap_ins(bench, first, MANY)
    figures += files_in(bench, first)
    gpu = torch.cuda.get_device_name(bench.device) if bench.cuda else "none: RAM stands for one"
    print(f"{conditions()}\n- GPU: {gpu}\n- torch: {torch.__version__}\n\n{table(figures)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
