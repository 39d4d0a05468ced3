"""Connections that misbehave, and the end: each of them is cut, the port is given back."""

import asyncio
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from modelhostd.config_values import Address
from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.rpc_stats import RpcStats
from modelhostd.core.tallies import Tallies
from modelhostd.gateway import http
from modelhostd.gateway.gateway import Gateway
from modelhostd.gateway.sources import Sources
from modelhostd.host import Host
from tests.gateway.support import DEADLINE_S, Scene, gateway_on, read_answer
from tests.host.support import World

GET = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.fixture
async def host(tmp_path: Path) -> AsyncIterator[Host]:
    """A host without models."""
    async with World(tmp_path).host() as running:
        yield running.host


@pytest.fixture
async def scene(host: Host) -> AsyncIterator[Scene]:
    """A gateway that serves."""
    async with gateway_on(host) as scene:
        assert (await scene.get("/healthz")).status == 200
        yield scene


async def ended(reader: asyncio.StreamReader) -> bytes:
    """Return what comes until the other side ends the connection."""
    try:
        async with asyncio.timeout(DEADLINE_S):
            return await reader.read()
    except ConnectionResetError:
        return b""


# --- misbehaving ----------------------------------------------------------------------------------


@pytest.mark.parametrize("said", [b"", b"GET /hea", GET[:-2], GET[:-2] + b"X: "])
async def test_a_request_that_does_not_come_is_not_waited_for(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, said: bytes
) -> None:
    """A connection that says nothing, or half a request, is cut."""
    monkeypatch.setattr(http, "ANSWER_S", 0.05)
    reader, writer = await scene.connect()
    writer.write(said)
    assert await ended(reader) == b""


async def test_an_answer_that_is_not_read_is_not_kept(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that asks again and again and reads nothing is cut; others are served meanwhile."""
    monkeypatch.setattr(http, "ANSWER_S", 2.0)
    with socket.socket() as lazy:
        lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        lazy.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(lazy, ("127.0.0.1", scene.port))
        ask = b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n" * 2000
        with pytest.raises(ConnectionError):
            async with asyncio.timeout(DEADLINE_S):
                while True:
                    await loop.sock_sendall(lazy, ask)
                    assert (await scene.get("/healthz")).status == 200


async def test_there_is_a_limit_of_connections(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond it a connection is cut at once, and a place that becomes free is used again."""
    monkeypatch.setattr(http, "CONNECTIONS_MAX", 2)
    held = [await scene.connect() for _ in range(2)]
    for reader, writer in held:
        writer.write(GET)
        assert (await read_answer(reader)).status == 200
    reader, writer = await scene.connect()
    writer.write(GET)
    assert await ended(reader) == b""
    held[0][1].close()
    await held[0][1].wait_closed()
    async with asyncio.timeout(DEADLINE_S):
        while True:
            reader, writer = await scene.connect()
            writer.write(GET)
            if (await ended_or_answer(reader)).startswith(b"HTTP/1.1 200"):
                return


async def ended_or_answer(reader: asyncio.StreamReader) -> bytes:
    """Return the first line of an answer, or nothing where the connection was cut."""
    try:
        return await reader.readline()
    except ConnectionResetError:
        return b""


async def test_a_connection_serves_several_requests(scene: Scene) -> None:
    """Requests behind one another on one connection are all answered."""
    reader, writer = await scene.connect()
    for _ in range(3):
        writer.write(GET)
        assert (await read_answer(reader)).status == 200


# --- the end --------------------------------------------------------------------------------------


async def test_the_end_waits_for_nobody(host: Host) -> None:
    """Idle, half-said and unread connections do not keep the gateway, and its port is free again."""
    async with gateway_on(host) as scene:
        assert (await scene.get("/healthz")).status == 200
        readers = []
        for said in (b"", b"GET /hea", GET):
            reader, writer = await scene.connect()
            writer.write(said)
            readers.append(reader)
        async with asyncio.timeout(DEADLINE_S):
            await scene.gateway.stop()
        for reader in readers:
            await ended(reader)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", scene.port))


async def test_a_gateway_that_never_started_gives_its_port_back(host: Host) -> None:
    """A start that fails after the port was taken leaves nothing behind."""
    sources = Sources(host, RpcStats(), Tallies())
    gateway = Gateway(Address("127.0.0.1", 0), sources, lambda: True)
    port = int(gateway.listen().rpartition(":")[2])
    await gateway.stop()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", port))


async def test_signals_stay_the_daemon_s(host: Host) -> None:
    """uvicorn takes neither SIGTERM nor SIGINT."""
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    async with gateway_on(host) as scene:
        assert (await scene.get("/healthz")).status == 200
        assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == before


# --- the start ------------------------------------------------------------------------------------


async def test_a_port_in_use_is_named(host: Host) -> None:
    """What is in the way and how to go round it is one line."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        gateway = Gateway(
            Address("localhost", port), Sources(host, RpcStats(), Tallies()), lambda: True
        )
        with pytest.raises(ModelhostError) as caught:
            gateway.listen()
    assert caught.value.reason is Reason.WRONG_STATE
    assert f"http://127.0.0.1:{port}: another process listens there" in caught.value.message
    assert "--http" in caught.value.message
    assert "\n" not in caught.value.message


async def test_who_asks_too_early_waits(host: Host) -> None:
    """A request from before the server was imported is answered when it is there."""
    tallies = Tallies()
    gateway = Gateway(Address("127.0.0.1", 0), Sources(host, RpcStats(), tallies), lambda: True)
    port = int(gateway.listen().rpartition(":")[2])
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(GET)
    gateway.start()
    try:
        async with asyncio.timeout(DEADLINE_S):
            assert (await read_answer(reader)).status == 200
    finally:
        writer.close()
        await gateway.stop()


def test_the_server_is_not_imported_before_it_is_needed() -> None:
    """The daemon's own import brings neither starlette nor uvicorn: its start does not pay for them."""
    code = (
        "import sys, modelhostd.daemon;"
        "print(*(m for m in ('starlette', 'uvicorn', 'h11', 'anyio') if m in sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60
    )
    assert set(done.stdout.split()) <= {"h11", "anyio"}
