"""HTTP of the real daemon: it starts and ends with it, counts its work, and agrees with its health."""

import asyncio
import http.client
import json
import os
import signal
import socket
from collections.abc import Callable, Iterator

import grpc
import numpy as np
import pytest

from bench import process_use
from bench.loopback_hub import LoopbackHub, Repo
from modelhost import AsyncClient, Client
from tests.e2e.process import Daemon, DaemonFailed
from tests.gateway.support import value
from tests.gateway.truth import DEADLINE_S, Truth, watching
from tests.support import free_port, wait_until

Make = Callable[..., Daemon]

HEADER = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
WEIGHTS = len(HEADER).to_bytes(8, "little") + HEADER + b"\0" * 4
FILES = {"config.json": b"{}", "model.safetensors": WEIGHTS}


@pytest.fixture
def port() -> int:
    """A port that nobody listens on."""
    return free_port()


@pytest.fixture
def hub() -> Iterator[LoopbackHub]:
    """A hub with one model that needs no library."""
    with LoopbackHub({"org/tiny": Repo(FILES)}) as running:
        yield running


@pytest.fixture
def served(make_daemon: Make, hub: LoopbackHub, port: int) -> Iterator[Daemon]:
    """A daemon with HTTP on ``port`` whose model ``m`` answers what it is asked, and does not load
    by itself.
    """
    daemon = make_daemon(
        *("--http", f"127.0.0.1:{port}"),
        *("--set", "worker.backends=identity"),  # which starts without torch
        HF_ENDPOINT=hub.endpoint,
    )
    with daemon, Client(daemon.target) as client:
        config = {"backend": "identity", "load_on_demand": False}
        client.add("hf://org/tiny", "m", config=config)
        client.pull("m")
        client.load("m")
        yield daemon


def get(port: int, path: str) -> tuple[int, str]:
    """Return the status and the body of a path."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=DEADLINE_S)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def test_the_main_job_can_be_read_off_the_metrics(served: Daemon, port: int) -> None:
    """Download, load and inference of a model, and the calls that asked for them, are counted."""
    with Client(served.target) as client:
        client.infer("m", {"x": np.zeros(3, np.float32)})
        sequence = client.host().sequence
    status, text = get(port, "/metrics")
    assert status == 200
    size = sum(map(len, FILES.values()))
    assert value(text, "modelhost_download_bytes_total", model="m", source="hf") == size
    assert value(text, "modelhost_model_loads_total", model="m", result="ready") == 1
    assert value(text, "modelhost_infer_requests_total", model="m", result="ok") == 1
    assert value(text, "modelhost_workers", device="cpu") == 1
    assert value(text, "modelhost_events_seq") == sequence
    handled = {"grpc_method": "ModelInfer", "grpc_code": "OK"}
    assert value(text, "grpc_server_handled_total", **handled) == 1
    assert value(text, "modelhost_build_info") == 1
    status, body = get(port, "/healthz")
    assert (status, json.loads(body)["status"]) == (200, "SERVING")


async def test_health_agrees_with_the_events_while_workers_are_lost(
    served: Daemon, port: int
) -> None:
    """A worker is killed, and the one in its place: no answer differs from what the events say."""
    async with (
        AsyncClient(served.target) as client,
        grpc.aio.insecure_channel(served.target) as channel,
    ):
        edits = 0

        async def barrier() -> int:
            nonlocal edits
            edits += 1
            # Acknowledged once it is durable, and so is all that was decided before it.
            await client.update("m", {"description": str(edits)})
            return (await client.host()).sequence

        async def healthz() -> int:
            return (await asyncio.to_thread(get, port, "/healthz"))[0]

        async with watching(Truth(channel, healthz, barrier)) as truth:
            await truth.poll()
            for losses in (1, 2):
                (worker,) = process_use.children(served.pid)
                os.kill(worker, signal.SIGKILL)
                await truth.poll_until(lambda n=losses: truth.count("READY") == n)
                assert truth.count("CRASHED") == losses
                assert truth.polls[-1].said
            assert not all(poll.said for poll in truth.polls)


def test_open_connections_do_not_keep_the_daemon(make_daemon: Make, port: int) -> None:
    """SIGTERM ends it with 0 while connections say nothing, say half or were just served."""
    with make_daemon("--http", f"127.0.0.1:{port}") as daemon:
        wait_until(lambda: get(port, "/healthz")[0] == 200)
        held = [socket.create_connection(("127.0.0.1", port)) for _ in range(3)]
        held[1].sendall(b"GET /metr")
        held[2].sendall(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert daemon.stop() == 0
        for one in held:
            one.close()
    assert "Traceback" not in daemon.log


def test_a_port_of_http_in_use_is_named(make_daemon: Make) -> None:
    """What is in the way is one clear line, and the home is left in order."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(DaemonFailed) as caught:
            make_daemon("--http", f"127.0.0.1:{port}").start()
    assert f"http://127.0.0.1:{port}: another process listens there" in str(caught.value)
    assert "--http" in str(caught.value)
    assert "Traceback" not in str(caught.value)
    with make_daemon() as daemon, Client(daemon.target) as client:
        assert client.host().pid == daemon.pid
