"""Starts the peers of the inference benches: Triton with its python backend, and MLServer, on loopback.

What is not installed is absent, not failed: the figures say so. All that computes has the same threads:
one for each core, and tokenizers without threads of their own, as modelhost's workers have it.
"""

import json
import os
import socket
import subprocess
import sysconfig
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc

from bench import process_use
from bench.peers import install
from bench.peers.calls import SERVICE
from modelhost.oip import open_inference_pb2 as oip
from modelhostd.worker.process import die_with_parent

ROOT = Path(__file__).resolve().parents[2]
START_S, END_S = 120.0, 20.0
THREADS = len(os.sched_getaffinity(0))
ENVIRONMENT = {
    "OMP_NUM_THREADS": str(THREADS),
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
}
ABSENT = "absent: `make bench-peers` installs it"


@dataclass(frozen=True)
class Peer:
    """A server: where it listens, and its process. Its children serve models."""

    name: str
    target: str
    pids: Sequence[int]

    def cpu_s(self) -> float:
        """Return the CPU time that its processes have used."""
        # The kernel's number for the CPU clock of another process; /proc counts only ticks of 10 ms.
        return sum(time.clock_gettime((~pid << 3) | 2) for pid in self.pids)


@dataclass(frozen=True)
class Model:
    """A model that a peer serves: a class of its module here, inputs and outputs, and where its weights are.

    Inputs and outputs are (name, datatype, dimensions). ``max_batch`` 0 = dimensions are the whole shape;
    ``batching`` = Triton's dynamic batching, which waits for nobody, as by default.
    """

    kind: str
    inputs: Sequence[tuple[str, str, Sequence[int]]]
    outputs: Sequence[tuple[str, str, Sequence[int]]]
    max_batch: int = 0
    batching: bool = False
    weights: Path | None = None


@contextmanager
def triton(models: Mapping[str, Model], folder: Path) -> Iterator[Peer | None]:
    """Start tritonserver with models; None where it is not installed."""
    if not install.installed("triton"):
        yield None
        return
    # Not "triton": Python models look for packages here too, and torch for one of that name.
    repository = folder / "triton-models"
    for name, model in models.items():
        _write_model(repository / name, name, model)
    port = _free_ports(1)[0]
    command = [install.triton() / "bin" / "tritonserver", "--model-repository", repository]
    command += ["--backend-directory", install.triton() / "backends"]
    command += ["--grpc-address", "127.0.0.1", "--grpc-port", str(port), "--log-info", "false"]
    command += ["--allow-http", "false", "--allow-metrics", "false"]
    # Its stub has Python built in: the library of this Python, and the packages of its environment.
    library = str(sysconfig.get_config_var("LIBDIR") or "")
    own = {"PATH": f"{install.python('triton').parent}:{os.environ['PATH']}"}
    own["LD_LIBRARY_PATH"] = library
    with _running(list(map(str, command)), own, folder / "triton.log") as process:
        yield _ready("triton", f"127.0.0.1:{port}", process, models, folder / "triton.log")


@contextmanager
def mlserver(models: Mapping[str, Model], folder: Path) -> Iterator[Peer | None]:
    """Start MLServer with models and its own defaults; None where it is not installed."""
    if not install.installed("mlserver"):
        yield None
        return
    home = folder / "mlserver-models"
    ports = _free_ports(3)
    settings = dict(zip(("grpc_port", "http_port", "metrics_port"), ports, strict=True))
    for name, model in models.items():
        (home / name).mkdir(parents=True)
        implementation = f"bench.peers.mlserver_models.{model.kind}"
        own_settings = {"name": name, "implementation": implementation}
        if model.weights is not None:
            own_settings |= {"parameters": {"uri": str(model.weights)}}  # type: ignore[dict-item]
        (home / name / "model-settings.json").write_text(json.dumps(own_settings))
    whole = {**settings, "host": "127.0.0.1", "debug": False, "grpc_max_message_length": -1}
    (home / "settings.json").write_text(json.dumps(whole))
    command = [str(install.python("mlserver").parent / "mlserver"), "start", str(home)]
    with _running(command, {}, folder / "mlserver.log") as process:
        target = f"127.0.0.1:{ports[0]}"
        yield _ready("mlserver", target, process, models, folder / "mlserver.log")


def _write_model(folder: Path, name: str, model: Model) -> None:
    """Write a model of Triton's repository: its configuration, its code and a link to its weights."""
    version = folder / "1"
    version.mkdir(parents=True)
    lines = [f'name: "{name}"', 'backend: "python"', f"max_batch_size: {model.max_batch}"]
    for what, tensors in (("input", model.inputs), ("output", model.outputs)):
        for tensor, datatype, dims in tensors:
            shape = ", ".join(map(str, dims))
            lines.append(
                f'{what} [{{name: "{tensor}" data_type: TYPE_{datatype} dims: [{shape}]}}]'
            )
    lines.append("instance_group [{kind: KIND_CPU count: 1}]")
    if model.batching:
        lines.append("dynamic_batching {}")
    (folder / "config.pbtxt").write_text("\n".join(lines) + "\n")
    code = (
        "import sys",
        f"sys.path.insert(0, {str(ROOT)!r})",  # its stub reads no PYTHONPATH
        f"from bench.peers.triton_models import {model.kind} as TritonPythonModel",
    )
    (version / "model.py").write_text("\n".join(code) + "\n")
    if model.weights is not None:
        (version / "weights").symlink_to(model.weights)


@contextmanager
def _running(
    command: Sequence[str], own: Mapping[str, str], log: Path
) -> "Iterator[subprocess.Popen[bytes]]":
    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": str(ROOT), **own}
    bench = os.getpid()
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            env=environment,
            cwd=log.parent,  # MLServer writes its metrics where it is
            stdout=output,
            stderr=output,
            preexec_fn=lambda: die_with_parent(bench),  # noqa: PLW1509 - one thread, so far
        )
    try:
        yield process
    finally:
        left = process_use.children(process.pid)
        process.terminate()
        try:
            process.wait(END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for pid in left:
            _end(pid)


def _end(pid: int) -> None:
    """Kill a child that its server left behind."""
    if process_use.running(pid):
        os.kill(pid, 9)


def _ready(
    name: str,
    target: str,
    process: "subprocess.Popen[bytes]",
    models: Mapping[str, Model],
    log: Path,
) -> Peer:
    """Wait until all models serve; raises RuntimeError with the server's last words otherwise."""
    end = time.monotonic() + START_S
    with grpc.insecure_channel(target) as channel:
        call = channel.unary_unary(
            f"{SERVICE}/ModelReady",
            request_serializer=oip.ModelReadyRequest.SerializeToString,
            response_deserializer=oip.ModelReadyResponse.FromString,
        )
        waiting = list(models)
        while waiting and process.poll() is None and time.monotonic() < end:
            try:
                ready = call(oip.ModelReadyRequest(name=waiting[-1]), timeout=5.0).ready
            except grpc.RpcError:
                ready = False
            if ready:
                waiting.pop()
            else:
                time.sleep(0.2)
    if waiting:
        raise RuntimeError(f"{name} did not start: {log.read_text(errors='replace')[-2000:]}")
    return Peer(name, target, (process.pid, *process_use.children(process.pid)))


def _free_ports(count: int) -> Sequence[int]:
    """Return ports that nobody listens on now."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports
