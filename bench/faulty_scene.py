"""A daemon process with models that bring their workers down on request, and what a client sees of it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import grpc
import numpy as np

from bench import process_use
from bench.demo import wait_until_serving
from bench.loopback_hub import LoopbackHub, Repo
from modelhost import Client
from modelhost.oip import open_inference_pb2 as oip
from modelhost.v1 import event_service_pb2
from modelhost.v1.event_service_pb2_grpc import EventServiceStub
from modelhost.v1.events_pb2 import Event

T = TypeVar("T")

PROGRAM = Path(__file__).resolve().parent / "faulty_daemon.py"
INFER = "/inference.GRPCInferenceService/ModelInfer"
CALL_S = 60.0
POLL_S = 0.001

BACKEND = "faulty = bench.faulty_backend:FaultyBackend"


def files_of(size: int) -> Mapping[str, bytes]:
    """Return the files of a model whose weights have ``size`` bytes."""
    tensor = {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}
    header = json.dumps({"w": tensor}).encode()
    weights = len(header).to_bytes(8, "little") + header + bytes(size)
    return {"config.json": b"{}", "model.safetensors": weights}


FILES = files_of(4)


def wait_for(what: str, condition: Callable[[], T | None], deadline_s: float = CALL_S) -> T:
    """Return the first true value of a condition; raises TimeoutError saying what was waited for."""
    end = time.monotonic() + deadline_s
    while not (value := condition()):
        if time.monotonic() > end:
            raise TimeoutError(f"not within {deadline_s:g} s: {what}")
        time.sleep(POLL_S)
    return value


@dataclass(frozen=True)
class Seen:
    """An event, and when it came here (monotonic seconds)."""

    at: float
    event: Event


class Watcher:
    """Keeps the events of a daemon as they come, in a thread of its own."""

    def __init__(self, channel: grpc.Channel) -> None:
        self.seen: list[Seen] = []
        self.sequence = 0
        self._opened = threading.Event()
        self._call = EventServiceStub(channel).WatchEvents(event_service_pb2.WatchEventsRequest())
        self._thread = threading.Thread(target=self._run, name="watcher", daemon=True)
        self._thread.start()
        if not self._opened.wait(CALL_S):
            raise TimeoutError("the stream of events does not open")

    def _run(self) -> None:
        try:
            for message in self._call:
                now = time.monotonic()
                self.seen.extend(Seen(now, event) for event in message.events)
                last = message.events[-1].sequence if message.events else 0
                self.sequence = max(self.sequence, message.bookmark.sequence, last)
                self._opened.set()
        except grpc.RpcError:
            return

    def of(self, reason: str, model: str = "", since: int = 0) -> list[Seen]:
        """Return the instances' events of one reason, of one model or of all, from an index on."""
        prefix = f"models/{model}/instances/" if model else "models/"
        return [
            seen
            for seen in self.seen[since:]
            if seen.event.reason == reason
            and seen.event.name.startswith(prefix)
            and "/instances/" in seen.event.name
        ]

    def close(self) -> None:
        """End the stream."""
        self._call.cancel()
        self._thread.join(CALL_S)


class Scene:
    """A running daemon and its client. Models are loaded by ``model``."""

    def __init__(self, folder: Path, process: "subprocess.Popen[bytes]", stack: ExitStack) -> None:
        self.folder = folder
        self.process = process
        self.target = f"unix:{folder}/s/modelhost.sock"
        self.client = stack.enter_context(Client(f"unix:{folder}/s/admin.sock"))
        self.channel = stack.enter_context(grpc.insecure_channel(self.target))
        self.watcher = Watcher(self.channel)
        stack.callback(self.watcher.close)
        self._infer: Any = self.channel.unary_unary(
            INFER, response_deserializer=oip.ModelInferResponse.FromString
        )

    @property
    def log(self) -> str:
        """What the daemon and its workers wrote so far."""
        return (self.folder / "log").read_text(errors="replace")

    def told(self) -> int:
        """Return how many events were seen, once all that there are by now were: those behind them are newer."""
        last = self.client.host().sequence
        wait_for("all events", lambda: self.watcher.sequence >= last)
        return len(self.watcher.seen)

    def model(self, name: str, *, alone: bool = False, **options: object) -> None:
        """Register, fetch and load a model, in the common worker or in one of its own; the watcher has seen it READY."""
        since = self.told()
        config: dict[str, Any] = {"backend": "faulty", "backend_options": options}
        config["load_on_demand"] = False
        if alone:
            config["isolation"] = "PROCESS"
        self.client.add("hf://org/tiny", name, config=config)
        self.client.pull(name)
        self.client.load(name)
        # Or else a READY that comes late is taken for that of the replacement.
        wait_for("READY", lambda: self.watcher.of("READY", name, since))

    def infer(self, model: str, do: str = "", *, timeout_s: float = CALL_S) -> Any:
        """Ask a model to do something; return the call."""
        request = oip.ModelInferRequest(model_name=model)
        if do:
            request.parameters["do"].string_param = do
        return self._infer.future(request.SerializeToString(), timeout=timeout_s)

    def pid(self, model: str) -> int:
        """Return the process id of the worker that a model is in."""
        response = self.infer(model, "pid").result()
        return int(np.frombuffer(response.raw_output_contents[0], np.int64)[0])

    def workers(self) -> list[int]:
        """Return the process ids of the daemon's children, those included that nobody waited for."""
        return process_use.children(self.process.pid)

    def tasks(self) -> Sequence[str]:
        """Return the names of the daemon's tasks."""
        path = self.folder / "tasks"
        path.unlink(missing_ok=True)
        self.process.send_signal(signal.SIGUSR2)
        wait_for("the tasks", path.exists)
        names: list[str] = json.loads(path.read_text())
        return names


@contextmanager
def scene(
    *flags: str,
    environment: Mapping[str, str] | None = None,
    sizes: Mapping[str, int] | None = None,
    backend: str = BACKEND,
) -> Iterator[Scene]:
    """Run a daemon with no model; ends it with SIGTERM, and raises RuntimeError if that is no clean end.

    Its hub has ``hf://org/tiny``, and a repository for each of ``sizes`` with weights of so many bytes.
    """
    folder = Path(tempfile.mkdtemp(prefix="mh-"))
    repos = {f"org/{name}": Repo(files_of(size)) for name, size in (sizes or {}).items()}
    repos["org/tiny"] = Repo(FILES)
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        hub = stack.enter_context(LoopbackHub(repos))
        sockets = folder / "s"
        sockets.mkdir(mode=0o700)
        command = [sys.executable, str(PROGRAM), "--home", str(folder / "home")]
        command += ["--grpc", f"unix:{sockets}/modelhost.sock", "--http", "off"]
        command += ["--set", f"worker.backends={backend}"]
        own = {"HF_ENDPOINT": hub.endpoint, "RUNTIME_DIRECTORY": str(sockets)}
        own["FAULTY_TASKS"] = str(folder / "tasks")
        log = stack.enter_context((folder / "log").open("wb"))
        process = subprocess.Popen(
            [*command, *flags], env={**os.environ, **own, **(environment or {})}, stderr=log
        )
        stack.callback(end, process)
        try:
            wait_until_serving(f"unix:{sockets}/modelhost.sock", process)
        except RuntimeError as error:
            raise RuntimeError((folder / "log").read_text()) from error
        with ExitStack() as clients:
            yield Scene(folder, process, clients)
        process.send_signal(signal.SIGTERM)
        code = process.wait(CALL_S)
        if code != 0:
            raise RuntimeError(f"the daemon ended with {code}: {(folder / 'log').read_text()}")


def end(process: "subprocess.Popen[bytes]") -> None:
    """Kill a process that is still there."""
    if process.poll() is None:
        process.kill()
        process.wait()
