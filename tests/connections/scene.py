"""A daemon as a process, and another client of it whose calls must always be answered."""

import contextlib
import itertools
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc

from bench import process_use
from modelhost import Client
from modelhost.v1 import (
    event_service_pb2,
    host_pb2,
    host_service_pb2,
    model_service_pb2,
    models_pb2,
)
from modelhost.v1.event_service_pb2_grpc import EventServiceStub
from modelhost.v1.host_service_pb2_grpc import HostServiceStub
from modelhost.v1.model_service_pb2_grpc import ModelServiceStub
from tests.e2e.process import Daemon

CALL_S = 60.0
MIB = 2**20
MODEL = "models/m"
OWN = (("grpc.use_local_subchannel_pool", 1),)


class Scene:
    """A running daemon with one model, which is on no disk; ``tcp`` is its users' HOST:PORT."""

    def __init__(self, daemon: Daemon, stack: contextlib.ExitStack) -> None:
        self.daemon = daemon
        self.pid = daemon.pid
        self._channel = stack.enter_context(grpc.insecure_channel(daemon.admin, options=OWN))
        self._models = ModelServiceStub(self._channel)
        self._host = HostServiceStub(self._channel)
        self._numbers = itertools.count()
        self._log_seen = 0
        listeners = self.host().listeners
        self.tcp = next(x.address for x in listeners if ":/" not in x.address)

    def host(self) -> host_pb2.Host:
        """Ask who is there."""
        return self._host.GetHost(host_service_pb2.GetHostRequest(), timeout=CALL_S)

    def last_sequence(self) -> int:
        """Return the sequence of the last event."""
        listed = EventServiceStub(self._channel).ListEvents(
            event_service_pb2.ListEventsRequest(page_size=1), timeout=CALL_S
        )
        return listed.sequence

    def subscribers(self) -> int:
        """Return how many streams of events are open."""
        figures = self._host.GetStatistics(host_service_pb2.GetStatisticsRequest(), timeout=CALL_S)
        return figures.subscriber_count

    def publish(self, count: int, *, padding: int = 400) -> int:
        """Make ``count`` events by changes that are acknowledged; return the last one's sequence."""
        for _ in range(count):
            text = f"{next(self._numbers)} " + "x" * padding
            request = model_service_pb2.UpdateModelRequest(
                model=models_pb2.Model(name=MODEL, description=text)
            )
            assert self._models.UpdateModel(request, timeout=CALL_S).description == text
        return self.last_sequence()

    def rss_bytes(self) -> int:
        """Return the daemon's resident memory."""
        return process_use.rss_bytes(self.pid)

    def descriptors(self) -> int:
        """Return how many descriptors the daemon has open."""
        return process_use.descriptors(self.pid)

    def check(self) -> None:
        """Fail unless the same process answers and nothing surprised it since the last check."""
        assert self.host().pid == self.pid
        log = self.daemon.log
        new, self._log_seen = log[self._log_seen :], len(log)
        for text in ("Traceback", "failed unexpectedly", "never retrieved"):
            assert text not in new, new[-5000:]


@contextmanager
def scene(*flags: str) -> Iterator[Scene]:
    """Start a daemon, and end it at last as anybody would: it must exit with 0."""
    folder = Path(tempfile.mkdtemp(prefix="mh-"))
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        fixed = ("--set", "worker.backends=identity", "--grpc", "127.0.0.1:0")
        daemon = stack.enter_context(Daemon(folder / "d", flags=(*fixed, *flags)))
        with Client(daemon.admin) as client:
            client.add("hf://org/one", MODEL.removeprefix("models/"))
        at = Scene(daemon, stack)
        yield at
        at.check()
    assert daemon.process is not None
    assert daemon.process.returncode == 0
