"""What goes wrong on the way is seen by whoever watches: attempt, reason, next try, and what the host says."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest

from bench.loopback_hub import Fault, LoopbackHub, Repo
from modelhost import Client
from modelhost.v1 import host_pb2, operations_pb2
from tests.e2e.process import Daemon

Make = Callable[..., Daemon]

HEADER = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
STATES = host_pb2.Host.SourceStatus.State


def weights(name: str) -> bytes:
    """Return a safetensors file that no other repository has."""
    return len(HEADER).to_bytes(8, "little") + HEADER + name.encode() * 4


@pytest.fixture
def hub() -> Iterator[LoopbackHub]:
    """A hub with two repositories."""
    repos = {
        f"org/{name}": Repo(
            {"config.json": json.dumps({name: 1}).encode(), "model.safetensors": weights(name)}
        )
        for name in "ab"
    }
    with LoopbackHub(repos) as running:
        yield running


def unwell(hub: LoopbackHub) -> None:
    """Let the hub answer a few times that it is busy; for long enough that a slow client sees it, too."""
    hub.fault(Fault("*resolve*", status=503, headers={"Retry-After": "3"}, times=3))


def test_a_retry_is_seen_while_it_waits(make_daemon: Make, hub: LoopbackHub) -> None:
    """By WatchOperation, by the command line, and by GetHost, which says afterwards that all is well."""
    with make_daemon(HF_ENDPOINT=hub.endpoint) as daemon, Client(daemon.target) as client:
        unwell(hub)
        retries: list[operations_pb2.OperationProgress.Retry] = []
        states: list[str] = []

        def look(operation: operations_pb2.Operation) -> None:
            if operation.progress.HasField("retry"):
                retries.append(operation.progress.retry)
                (hf,) = [one for one in client.host().sources if one.scheme == "hf"]
                states.append(STATES.Name(hf.state))

        began = time.time()
        client.pull("hf://org/a", progress=look)
        assert retries
        assert {retry.reason for retry in retries} == {"NETWORK_ERROR"}
        assert retries[0].attempt >= 1
        assert "503" in retries[0].message
        assert retries[0].next_time.ToMicroseconds() / 1e6 >= began
        assert "UNREACHABLE" in states
        (hf,) = [one for one in client.host().sources if one.scheme == "hf"]
        assert STATES.Name(hf.state) == "REACHABLE"

        unwell(hub)
        command = [sys.executable, "-m", "modelhost", "--target", daemon.target]
        done = subprocess.run(
            [*command, "pull", "hf://org/b"],
            capture_output=True,
            text=True,
            check=True,
            timeout=250,
        )
        assert "again after NETWORK_ERROR (1)" in done.stderr
        assert "download b: 2 files" in done.stdout
        shown = subprocess.run(
            [*command, "sources", "--json"], capture_output=True, text=True, check=True, timeout=250
        )
        found = {one["scheme"]: one["state"] for one in json.loads(shown.stdout)["sources"]}
        assert found["hf"] == "REACHABLE"
        assert found["ollama"] == "UNKNOWN"
