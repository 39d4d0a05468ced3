"""A real daemon with a real worker and a hub on loopback, for everything that is done to it."""

import contextlib
import http.client
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from prometheus_client.parser import text_string_to_metric_families

from bench import process_use
from bench.loopback_hub import LoopbackHub, Repo
from modelhost import Client
from modelhost.v1 import event_service_pb2, host_pb2, host_service_pb2
from modelhost.v1.event_service_pb2_grpc import EventServiceStub
from modelhost.v1.host_service_pb2_grpc import HostServiceStub
from tests import event_validators as validate
from tests.api.support import CLIENT_OPTIONS
from tests.e2e.process import Daemon
from tests.support import free_port, wait_until

CALL_S = 60.0

_HEADER = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
WEIGHTS = len(_HEADER).to_bytes(8, "little") + _HEADER + b"\0" * 4
FILES = {"config.json": b"{}", "model.safetensors": WEIGHTS}

# What the daemon logs when something surprised it. An expected failure is logged in other words.
SURPRISES = (
    "Traceback",
    "failed unexpectedly",
    "never retrieved",
    "was destroyed but it is pending",
)


@dataclass
class Live:
    """A running daemon. ``channel`` goes to its operators' socket."""

    daemon: Daemon
    hub: LoopbackHub
    channel: grpc.Channel
    pid: int
    tcp: str = ""
    """HOST:PORT of its users' TCP address."""
    http: int = 0
    """The port of its metrics."""
    workers: Sequence[int] = field(default_factory=tuple)
    """The process ids of its workers when the models were loaded."""

    def host(self) -> host_pb2.Host:
        """Ask who is there: an RPC of another client, which must always be answered."""
        return HostServiceStub(self.channel).GetHost(
            host_service_pb2.GetHostRequest(), timeout=CALL_S
        )

    def check_alive(self) -> None:
        """Fail unless the same process answers."""
        assert self.host().pid == self.pid

    def worker_pids(self) -> list[int]:
        """Return the process ids of its children: its workers."""
        return process_use.children(self.pid)

    def check_log(self) -> None:
        """Fail if anything surprised the daemon."""
        log = self.daemon.log
        for text in SURPRISES:
            at = log.find(text)
            assert at < 0, log[max(0, at - 3000) : at + 3000]

    # --- what it uses ---------------------------------------------------------------------------

    def descriptors(self) -> int:
        """Return how many descriptors it has open."""
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def open_calls(self) -> dict[str, int]:
        """Return how many calls of each method have begun and not ended, by its own counts."""
        connection = http.client.HTTPConnection("127.0.0.1", self.http, timeout=CALL_S)
        with contextlib.closing(connection):
            connection.request("GET", "/metrics")
            text = connection.getresponse().read().decode()
        calls: Counter[str] = Counter()
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                sign = {"grpc_server_started_total": 1, "grpc_server_handled_total": -1}
                calls[sample.labels.get("grpc_method", "")] += int(
                    sign.get(sample.name, 0) * sample.value
                )
        return {method: count for method, count in calls.items() if count}

    def rss_bytes(self) -> int:
        """Return its resident memory."""
        pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def fsck(self) -> "subprocess.CompletedProcess[str]":
        """Check its home, once it has ended."""
        command = [sys.executable, "-m", "modelhostd", "fsck", "--home", str(self.daemon.home)]
        return subprocess.run(command, capture_output=True, text=True, timeout=250, check=False)


@contextmanager
def live(*flags: str, models: Sequence[str] = ("m",)) -> Iterator[Live]:
    """Start a daemon with loaded identity models of these ids, and end it at last."""
    folder = Path(tempfile.mkdtemp(prefix="mh-"))
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        repos = {"org/tiny": Repo(FILES), "org/bare": Repo({"README.md": b"x"})}
        hub = stack.enter_context(LoopbackHub(repos))
        daemon = Daemon(
            folder / "d",
            flags=(
                *("--set", "worker.backends=identity"),  # which starts without torch
                *("--set", "downloads.hosts=127.0.0.1"),  # nothing leaves this machine
                *("--grpc", "127.0.0.1:0"),
                *("--http", f"127.0.0.1:{(port := free_port())}"),
                *flags,
            ),
            environment={"HF_ENDPOINT": hub.endpoint},
        )
        stack.enter_context(daemon)
        with Client(daemon.target) as client:
            for model in models:
                have(client, model)
                client.load(model)
        channel = stack.enter_context(
            grpc.insecure_channel(daemon.admin, options=list(CLIENT_OPTIONS))
        )
        made = Live(daemon, hub, channel, daemon.pid, http=port)
        made.tcp = next(x.address for x in made.host().listeners if ":/" not in x.address)
        made.workers = made.worker_pids()
        yield made


def have(client: Client, model: str) -> None:
    """Register an identity model and bring its files to disk."""
    client.add("hf://org/tiny", model, config={"backend": "identity"})
    client.pull(model)


class Recorder:
    """A watcher in a thread of its own: keeps what it is sent until the stream ends."""

    def __init__(self, channel: grpc.Channel, **request: Any) -> None:
        self.messages: list[event_service_pb2.WatchEventsResponse] = []
        self.end: grpc.RpcError | None = None
        asked = event_service_pb2.WatchEventsRequest(**request)
        self._call = EventServiceStub(channel).WatchEvents(asked)
        self._thread = threading.Thread(target=self._run, name="recorder", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            for message in self._call:
                self.messages.append(message)
        except grpc.RpcError as error:
            self.end = error

    @property
    def stream(self) -> validate.Stream:
        """What came so far, checked for its form."""
        return validate.take_apart(list(self.messages))

    def until(self, sequence: int) -> validate.Stream:
        """Return the stream once it has told all up to ``sequence``."""
        wait_until(lambda: self._position() >= sequence, CALL_S, what=f"event {sequence}")
        return self.stream

    def _position(self) -> int:
        for message in reversed(list(self.messages)):
            if message.HasField("bookmark"):
                return message.bookmark.sequence
            if message.events:
                return message.events[-1].sequence
        return 0

    def ended(self) -> grpc.RpcError:
        """Wait for the error that the stream ends with."""
        self._thread.join(CALL_S)
        assert self.end is not None, "the stream goes on"
        return self.end

    def cancel(self) -> None:
        """Leave."""
        self._call.cancel()
        self._thread.join(CALL_S)


def snapshot(channel: grpc.Channel) -> validate.Stream:
    """Return the whole state as a new watcher is told it."""
    recorder = Recorder(channel, include_snapshot=True)
    wait_until(lambda: any(m.HasField("bookmark") for m in recorder.messages), CALL_S)
    recorder.cancel()
    return recorder.stream
