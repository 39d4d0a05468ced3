"""After a worker's crash: from the kill to the first answer, with its image adopted and with its file read again.

A model of one file in a worker that is killed; the next one is started by itself, imports torch and loads. The file is in the page
cache, or, as after a while without use, not any more. On a GPU's path (`devices/sim-0`) both also fill the slab.
"""

import asyncio
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from bench.figure import Effort, Figure
from modelhost.oip import open_inference_pb2 as oip
from modelhostd.adapters.workers import ProcessWorkers, WorkersConfig
from modelhostd.core.resources import ModelConfig
from modelhostd.ports import LoadSpec, WorkerExit

MIB = 2**20
ROOT = str(Path(__file__).resolve().parent.parent)
TENSORS, TENSOR_BYTES = 256, 4 * MIB
FILE = "model.safetensors"
START_TIMEOUT_S = 120.0
PAUSE_S = 0.02
WAYS = {
    "adopted": "its image adopted",
    "cached": "its file read again from the page cache",
    "cold": "its file read again from the drive",
}


def figures(effort: Effort) -> Sequence[Figure]:
    """Measure all ways on both devices, in turns."""
    with tempfile.TemporaryDirectory(prefix="mh-bench-") as scratch:
        count = max(4, int(TENSORS * min(1.0, effort.scale * 4)))
        size = _write(Path(scratch), count)
        return [
            figure
            for device in ("cpu", "sim-0")
            for figure in asyncio.run(_crashes(Path(scratch), device, size, effort.rounds))
        ]


async def _crashes(folder: Path, device: str, size: int, rounds: int) -> list[Figure]:
    config = WorkersConfig(
        backends=("stored = bench.stored_backend:StoredBackend",),
        import_paths=(ROOT,),
        start_timeout_s=START_TIMEOUT_S,
    )
    took: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
    for _ in range(rounds):
        for way in WAYS:
            took[way].append(await _round(config, _spec(folder, 1), device, way))
    made = []
    for index, what in enumerate(("from the kill to the first answer", "of these the load")):
        middle = {way: statistics.median(t[index] for t in times) for way, times in took.items()}
        for way, seconds in middle.items():
            name = f"{size / 2**30:.2g} GiB on {device}, {what}, {WAYS[way]}"
            made.append(Figure(name, seconds, "s", reference=middle["cached"]))
    return made


async def _round(
    config: WorkersConfig, spec: LoadSpec, device: str, way: str
) -> tuple[float, float]:
    """Load, crash and come back, with a supervisor of its own: one that has seen crashes delays the next start."""
    workers = ProcessWorkers(config)
    seen = _Seen()
    workers.set_listener(seen)
    try:
        await workers.load(device, spec, lambda progress: None)
        expected = await _answer(workers, device, spec)
        back, whole, load = await _crash(workers, seen, device, spec, way)
        assert await _answer(workers, device, back) == expected, "other weights"
    finally:
        await workers.stop(5.0)
    return whole, load


async def _crash(
    workers: ProcessWorkers, seen: "_Seen", device: str, spec: LoadSpec, way: str
) -> tuple[LoadSpec, float, float]:
    """Kill the worker and bring the model back; return it and the seconds: of all of it, of the load."""
    (pid,) = workers.pids()
    for _ in range(int(START_TIMEOUT_S / PAUSE_S)):
        if workers.at_rest(device):
            break
        await asyncio.sleep(PAUSE_S)
    if way == "cold":
        _forget(spec.model_dir / FILE)
    seen.exited.clear()
    begin = time.monotonic()
    os.kill(pid, 9)
    await seen.exited.wait()
    if way == "adopted":
        at = device, spec.instance, spec.generation
        loaded = await workers.promote(*at, lambda progress: None)
        assert loaded.adopted_bytes, "nothing was adopted"
    else:
        await workers.unload(device, spec.instance, spec.generation)
        spec = _spec(spec.model_dir, spec.generation + 1)
        loaded = await workers.load(device, spec, lambda progress: None)
    await _answer(workers, device, spec)
    return spec, time.monotonic() - begin, loaded.load_s


class _Seen:
    """Hears of exits."""

    def __init__(self) -> None:
        self.exited = asyncio.Event()

    def worker_ready(self, device: str, pid: int) -> None:
        """Do nothing."""

    def worker_exited(self, exit: WorkerExit) -> None:
        """Note it."""
        self.exited.set()


async def _answer(workers: ProcessWorkers, device: str, spec: LoadSpec) -> bytes:
    payload = oip.ModelInferRequest(model_name=spec.model).SerializeToString()
    reply = await workers.infer(device, spec.instance, spec.generation, payload, timeout_s=None)
    return oip.ModelInferResponse.FromString(reply.payload).raw_output_contents[0]


def _spec(folder: Path, generation: int) -> LoadSpec:
    return LoadSpec("m", "m", generation, 1, folder, "stored", ModelConfig(), 0)


def _write(folder: Path, count: int) -> int:
    import torch
    from safetensors.torch import save_file

    made = (torch.rand(TENSOR_BYTES // 4) for _ in range(count))
    save_file({f"t{index}": tensor for index, tensor in enumerate(made)}, folder / FILE)
    return count * TENSOR_BYTES


def _forget(path: Path) -> None:
    """Have the page cache let go of a file."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)
