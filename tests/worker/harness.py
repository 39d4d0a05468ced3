"""What the worker tests share: requests and answers on the wire, a listener, workers that are stopped."""

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from modelhost.oip import open_inference_pb2 as oip
from modelhostd.adapters.workers import ProcessWorkers, WorkersConfig
from modelhostd.core.resources import Isolation, ModelConfig, Progress
from modelhostd.ports import LoadSpec, WorkerExit
from modelhostd.worker.backend import Tensor
from modelhostd.worker.tensors import as_tensor, to_raw
from tests.fakes.clock import settle
from tests.support import DEADLINE_S

ROOT = Path(__file__).resolve().parents[2]

CONFIG = WorkersConfig(
    backends=(
        "identity",
        "example = tests.worker.example_backend:ExampleBackend",
        "trouble = tests.worker.trouble_backend:TroubleBackend",
    ),
    import_paths=(str(ROOT),),
    arena_bytes=4 * 2**20,
    heartbeat_interval_s=0.05,
    start_timeout_s=120.0,
)
"""Workers that start in a fraction of a second, since none of their backends needs torch."""


def encode(
    inputs: Mapping[str, Any],
    *,
    name: str = "m",
    version: str = "",
    id: str = "",
    outputs: Sequence[str] = (),
    parameters: Mapping[str, object] | None = None,
) -> bytes:
    """Return an encoded ModelInferRequest with the arrays (or tensors) as raw contents."""
    request = oip.ModelInferRequest(model_name=name, model_version=version, id=id)
    for tensor_name, value in inputs.items():
        tensor = value if isinstance(value, Tensor) else as_tensor(value)
        shape = tensor.array.shape
        request.inputs.add(name=tensor_name, datatype=tensor.datatype, shape=shape)
        request.raw_input_contents.append(bytes(to_raw(tensor)))
    for output in outputs:
        request.outputs.add(name=output)
    for key, value in (parameters or {}).items():
        if isinstance(value, int):
            request.parameters[key].int64_param = value
        else:
            request.parameters[key].string_param = str(value)
    return request.SerializeToString()


def numbers(count: int) -> np.ndarray:
    """Return ``count`` different FP32 numbers."""
    return np.arange(count, dtype=np.float32)


def decode(payload: bytes) -> tuple[oip.ModelInferResponse, dict[str, np.ndarray]]:
    """Return a response, and its FP32, INT64 and UINT8 outputs as arrays."""
    response = oip.ModelInferResponse.FromString(payload)
    dtypes = {"FP32": "<f4", "INT64": "<i8", "UINT8": "u1"}
    arrays = {
        output.name: np.frombuffer(raw, dtypes[output.datatype]).reshape(output.shape)
        for output, raw in zip(response.outputs, response.raw_output_contents, strict=True)
        if output.datatype in dtypes
    }
    return response, arrays


def spec(
    model: str = "m",
    *,
    backend: str = "identity",
    generation: int = 1,
    task: str = "other",
    model_dir: Path = Path("/nonexistent"),
    isolation: Isolation = Isolation.SHARED,
    **options: object,
) -> LoadSpec:
    """Return what a worker is told to load; ``options`` are the backend's."""
    config = ModelConfig(backend=backend, isolation=isolation, backend_options=options)
    return LoadSpec(model, f"{model}-1", generation, 1, model_dir, task, config, 0)


def ignore(progress: Progress) -> None:
    """Take a progress report, and do nothing with it."""


class Listener:
    """Remembers what workers tell; ``exits`` and ``ready`` can be waited for."""

    def __init__(self) -> None:
        self.ready: list[tuple[str, int]] = []
        self.exits: list[WorkerExit] = []
        self._changed = asyncio.Event()

    def worker_ready(self, device: str, pid: int) -> None:
        """Remember a start."""
        self.ready.append((device, pid))
        self._changed.set()

    def worker_exited(self, exit: WorkerExit) -> None:
        """Remember an exit."""
        self.exits.append(exit)
        self._changed.set()

    async def wait(self, *, exits: int = 0, ready: int = 0) -> None:
        """Wait until there were so many exits and starts."""
        async with asyncio.timeout(DEADLINE_S):
            while len(self.exits) < exits or len(self.ready) < ready:
                self._changed.clear()
                await self._changed.wait()


@contextlib.asynccontextmanager
async def running(config: WorkersConfig = CONFIG) -> AsyncIterator[tuple[ProcessWorkers, Listener]]:
    """Give workers and their listener; stop the workers at the end."""
    workers = ProcessWorkers(config)
    listener = Listener()
    workers.set_listener(listener)
    try:
        yield workers, listener
    finally:
        async with asyncio.timeout(DEADLINE_S):
            await workers.stop(0.5)
        assert workers.pids() == {}


def open_descriptors() -> dict[str, str]:
    """Return what this process has open."""
    links = {}
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            links[number] = os.readlink(f"/proc/self/fd/{number}")
    return links


def started(gate: Path) -> int:
    """Return how many stand (or stood) before a gate of the trouble backend."""
    return len(list(gate.parent.glob(f"{gate.name}.*.started")))


async def cancelled_in_vain(task: "asyncio.Task[Any]", pid: int) -> None:
    """Cancel work of a worker again and again while that stands still: it ends only when the worker has gone on."""
    for _ in range(3):
        await settle(2)
        task.cancel()
    await settle(1)
    assert not task.done()
    os.kill(pid, signal.SIGCONT)
    with pytest.raises(asyncio.CancelledError):
        await task
