"""A daemon with a worker, a hub and clients of every kind, to be ended in the middle of it all."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2

from bench import attacks, process_use
from bench.loopback_hub import Fault, LoopbackHub, Repo
from bench.raw_connection import RawConnection
from modelhost import Client
from modelhost.oip import open_inference_pb2 as oip
from modelhost.v1 import event_service_pb2, operation_service_pb2
from modelhost.v1.event_service_pb2_grpc import EventServiceStub
from tests import event_validators as validate
from tests.e2e.process import Daemon
from tests.support import wait_until

CALL_S = 60.0
MODEL, LARGE = "m", "large"
INFER = "/inference.GRPCInferenceService/ModelInfer"
WATCH_OPERATION = "/modelhost.v1.OperationService/WatchOperation"
OWN = (("grpc.use_local_subchannel_pool", 1),)

_HEADER = json.dumps({"w": {"dtype": "U8", "shape": [2**20], "data_offsets": [0, 2**20]}}).encode()
WEIGHTS = len(_HEADER).to_bytes(8, "little") + _HEADER + bytes(2**20)
FILES = {"config.json": b"{}", "model.safetensors": WEIGHTS}


class Watcher:
    """A client that reads events until the stream ends; a thread of its own keeps what comes."""

    def __init__(self, channel: grpc.Channel, start: int) -> None:
        self.messages: list[event_service_pb2.WatchEventsResponse] = []
        self.error: grpc.RpcError | None = None
        request = event_service_pb2.WatchEventsRequest(start_sequence=start)
        self._call = EventServiceStub(channel).WatchEvents(request)
        self._thread = threading.Thread(target=self._run, name="watcher", daemon=True)
        self._thread.start()
        wait_until(lambda: self.messages, what="the opening bookmark")

    def _run(self) -> None:
        try:
            self.messages.extend(self._call)
        except grpc.RpcError as error:
            self.error = error

    @property
    def stream(self) -> validate.Stream:
        """What came so far, checked for its form."""
        return validate.take_apart(list(self.messages))

    def ended(self) -> grpc.RpcError:
        """Wait for the error that the stream ends with."""
        self._thread.join(CALL_S)
        assert self.error is not None, "the stream goes on"
        return self.error

    def leave(self) -> None:
        """End the stream from this side."""
        self._call.cancel()
        self._thread.join(CALL_S)


class Scene:
    """A running daemon with a loaded model, and what its clients do to it."""

    def __init__(self, daemon: Daemon, hub: LoopbackHub, stack: contextlib.ExitStack) -> None:
        self.daemon = daemon
        self.hub = hub
        self._stack = stack
        self.held: list[RawConnection] = []

    def channel(self) -> grpc.Channel:
        """Return a connection of its own to the operators' socket."""
        return self._stack.enter_context(grpc.insecure_channel(self.daemon.admin, options=OWN))

    def loaded(self) -> "Scene":
        """Start the daemon, and load the model in a worker."""
        self.daemon.start()
        with Client(self.daemon.admin) as client:
            client.add("hf://org/tiny", MODEL, config={"backend": "identity"})
            client.pull(MODEL)
            client.load(MODEL)
        return self

    def workers(self) -> Sequence[int]:
        """Return the process ids of the workers."""
        return process_use.children(self.daemon.pid)

    # --- what may hold up an end ------------------------------------------------------------------

    def events_stalled(self) -> None:
        """Watch events and never read, with a window that is full."""
        with Client(self.daemon.admin) as client:
            for number in range(100):
                client.update_settings({"queue_limit": 100 + number})
        self.held += attacks.never_reading(self.daemon.target, 5)
        self.held += attacks.zero_window(self.daemon.target, 2)

    def health_stalled(self) -> None:
        """Watch health with windows of 0 bytes."""
        for _ in range(3):
            connection = RawConnection(self.daemon.target).begin(initial_window=0)
            connection.call(attacks.HEALTH)
            self.held.append(connection)

    def worker_hung(self) -> None:
        """Stop the workers where they are."""
        for pid in self.workers():
            os.kill(pid, signal.SIGSTOP)

    def worker_continued(self) -> None:
        """Let stopped workers go on."""
        for pid in self.workers():
            os.kill(pid, signal.SIGCONT)

    def inferring(self) -> Any:
        """Ask a hung worker; return the call, which waits there."""
        self.worker_hung()
        call = infer(self.channel())
        with Client(self.daemon.admin) as client:
            wait_until(lambda: client.statistics().in_flight, what="the request is in flight")
        return call

    def downloading(self) -> str:
        """Begin a download whose source falls silent, with a watcher of it that never reads."""
        stall = self.hub.fault(Fault("*", where="cdn", stall_after=1000, times=99))
        with Client(self.daemon.admin) as client:
            client.add("hf://org/large", LARGE, config={"backend": "identity"})
            operation = client.pull(LARGE, wait=False).name
        assert stall.reached.wait(CALL_S)
        connection = RawConnection(self.daemon.target).begin(initial_window=0)
        request = operation_service_pb2.WatchOperationRequest(name=operation)
        connection.call(WATCH_OPERATION, request.SerializeToString())
        self.held.append(connection)
        return operation

    # --- afterwards -------------------------------------------------------------------------------

    def check_ended(self, workers: Sequence[int]) -> None:
        """Fail unless nothing of the daemon is left, its home is in order and nothing surprised it."""
        assert not [pid for pid in workers if process_use.running(pid)]
        for text in ("Traceback", "failed unexpectedly", "never retrieved"):
            assert text not in self.daemon.log, self.daemon.log[-5000:]
        command = [sys.executable, "-m", "modelhostd", "fsck", "--home", str(self.daemon.home)]
        checked = subprocess.run(command, capture_output=True, text=True, timeout=250, check=False)
        assert checked.returncode == 0, checked.stdout + checked.stderr


BURDENS: Mapping[str, Callable[[Scene], object]] = {
    "nothing": lambda at: None,
    "stalled watchers": Scene.events_stalled,
    "zero-window health": Scene.health_stalled,
    "hung worker": Scene.worker_hung,
    "inference in flight": Scene.inferring,
    "running download": Scene.downloading,
}


def all_burdens(at: Scene) -> None:
    """Impose everything at once."""
    at.events_stalled()
    at.health_stalled()
    at.downloading()
    at.inferring()


def infer(channel: grpc.Channel) -> Any:
    """Ask the model, and return the call."""
    request = oip.ModelInferRequest(model_name=MODEL, raw_input_contents=[b"four"])
    request.inputs.add(name="x", datatype="UINT8", shape=[4])
    call = channel.unary_unary(INFER, response_deserializer=oip.ModelInferResponse.FromString)
    return call.future(request.SerializeToString(), timeout=CALL_S * 3)


def health(channel: grpc.Channel) -> int:
    """Ask for the daemon's health."""
    call = channel.unary_unary(
        "/grpc.health.v1.Health/Check",
        response_deserializer=health_pb2.HealthCheckResponse.FromString,
    )
    return int(call(b"", timeout=CALL_S).status)


@contextmanager
def scene(*flags: str) -> Iterator[Scene]:
    """Make a daemon, not started yet, with a hub of two models; whatever is left at the end is killed."""
    folder = Path(tempfile.mkdtemp(prefix="mh-"))
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        repos = {
            "org/tiny": Repo(FILES),
            "org/large": Repo({**FILES, "more.safetensors": WEIGHTS[:-1] + b"x"}),
        }
        hub = stack.enter_context(LoopbackHub(repos))
        fixed = ("--set", "worker.backends=identity", "--set", "worker.arena_bytes=1MiB")
        environment = {"HF_ENDPOINT": hub.endpoint}
        daemon = Daemon(folder / "d", flags=(*fixed, *flags), environment=environment)
        at = Scene(daemon, hub, stack)
        try:
            yield at
        finally:
            if daemon.process is not None and daemon.process.poll() is None:
                daemon.kill()
            for connection in at.held:
                connection.close()
