"""The servers of the hot path: a daemon that serves an identity model, and the bare servers beside it.

All run at once and take turns, case by case and round by round, so that what the machine does meanwhile
meets them all; ratios are of medians. Read ratios, not rates.
"""

import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc

from bench import process_use
from bench.loopback_hub import LoopbackHub, Repo
from bench.running import running
from modelhost.oip import open_inference_pb2 as oip
from modelhost.v1 import (
    host_service_pb2,
    model_service_pb2,
    models_pb2,
    operation_service_pb2,
    operations_pb2,
    residency_service_pb2,
)
from modelhost.v1.host_service_pb2_grpc import HostServiceStub
from modelhost.v1.model_service_pb2_grpc import ModelServiceStub
from modelhost.v1.operation_service_pb2_grpc import OperationServiceStub
from modelhost.v1.residency_service_pb2_grpc import ResidencyServiceStub

PATH = "/inference.GRPCInferenceService/ModelInfer"
MODEL = "identity"
BARE, TUNED, OURS = "bare", "bare, our settings", "modelhost"


@dataclass(frozen=True)
class Server:
    """A server under test: where it listens, its processes, and where its loop's lag is noted."""

    name: str
    target: str
    pids: Sequence[int]
    lag: Path

    def cpu_s(self) -> float:
        """Return the CPU time that its processes have used."""
        # The kernel's number for the CPU clock of another process; /proc counts only ticks of 10 ms.
        return sum(time.clock_gettime((~pid << 3) | 2) for pid in self.pids)

    def page_faults(self) -> int:
        """Return the page faults of its processes."""
        return sum(map(process_use.page_faults, self.pids))


def request(tensor_bytes: int) -> bytes:
    """Return an encoded request with one FP32 tensor."""
    made = oip.ModelInferRequest(model_name=MODEL, id="1")
    made.inputs.add(name="INPUT0", datatype="FP32", shape=[1, tensor_bytes // 4])
    made.raw_input_contents.append(b"\0" * tensor_bytes)
    return made.SerializeToString()


@contextmanager
def servers() -> Iterator[Sequence[Server]]:
    """Start the three servers: bare, bare with our process settings, and the daemon with its model."""
    with (
        tempfile.TemporaryDirectory(prefix="mh-bench-") as scratch,
        contextlib.ExitStack() as stack,
    ):
        folder = Path(scratch)
        repo = Repo({"config.json": b"{}", "model.safetensors": safetensors()})
        hub = stack.enter_context(LoopbackHub({f"bench/{MODEL}": repo}))
        daemon = stack.enter_context(running(endpoint=hub.endpoint))
        with_model(daemon.users)
        print_settings(daemon.users)
        bare = stack.enter_context(bare_server(BARE, folder / "bare"))
        tuned = stack.enter_context(bare_server(TUNED, folder / "tuned", "--tuned"))
        pids = daemon.pid, *daemon.workers()
        yield bare, tuned, Server(OURS, daemon.users, pids, daemon.lag)


@contextmanager
def fresh_bare_server() -> Iterator[Server]:
    """Start the bare server anew, as it comes."""
    with (
        tempfile.TemporaryDirectory(prefix="mh-bench-") as scratch,
        bare_server(BARE, Path(scratch) / "bare") as server,
    ):
        yield server


@contextmanager
def bare_server(
    name: str, folder: Path, *flags: str, environment: Mapping[str, str] | None = None
) -> Iterator[Server]:
    """Start a reference server that keeps its socket and its lag in ``folder``."""
    folder.mkdir()
    script = Path(__file__).with_name("bare_server.py")
    lag = folder / "lag"
    target = f"unix:{folder}/socket"
    command = [sys.executable, str(script), target, "--lag", str(lag), *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as process:
        try:
            assert process.stdout is not None
            if process.stdout.readline() != b"serving\n":
                raise RuntimeError("the reference server did not start")
            yield Server(name, target, (process.pid,), lag)
        finally:
            process.kill()


def safetensors() -> bytes:
    """Return a file with one small tensor: the identity model's weights."""
    header = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    return len(header).to_bytes(8, "little") + header + b"\0" * 4


def with_model(target: str) -> None:
    """Register, download and load the identity model."""
    with grpc.insecure_channel(target) as channel:
        ModelServiceStub(channel).CreateModel(
            model_service_pb2.CreateModelRequest(
                model_id=MODEL,
                model=models_pb2.Model(
                    source=models_pb2.Source(uri=f"hf://bench/{MODEL}"),
                    config=models_pb2.ModelConfig(backend="identity"),
                ),
            )
        )
        name = f"models/{MODEL}"
        asked = model_service_pb2.DownloadModelRequest(name=name)
        finish(channel, ModelServiceStub(channel).DownloadModel(asked))
        load = residency_service_pb2.LoadModelRequest(name=name)
        finish(channel, ResidencyServiceStub(channel).LoadModel(load))


def print_settings(target: str) -> None:
    """Print which of the daemon's process settings act: on another libc or grpcio they may not."""
    with grpc.insecure_channel(target) as channel:
        host = HostServiceStub(channel).GetHost(host_service_pb2.GetHostRequest())
    for setting in host.process_settings:
        acts = "acts" if setting.effective else f"does not act: {setting.message}"
        print(f"# {setting.setting} = {setting.value}: {acts}", file=sys.stderr)


def finish(channel: grpc.Channel, operation: operations_pb2.Operation) -> None:
    """Wait for the good end of an operation."""
    asked = operation_service_pb2.WaitOperationRequest(name=operation.name)
    done = OperationServiceStub(channel).WaitOperation(asked)
    if done.state != operations_pb2.Operation.SUCCEEDED:
        raise RuntimeError(f"{done.name}: {done.error.message}")
