"""Connections against servers that speak badly: floods, bombs, silence, TLS that is not what it says."""

import asyncio
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import cast

import pytest

from bench.loopback_hub import LoopbackHub
from modelhostd.adapters import wire
from modelhostd.adapters.blobs import Stopped
from modelhostd.adapters.cancel import Canceller
from modelhostd.adapters.connections import Connections, Credential
from modelhostd.adapters.wire import Limits, Transient
from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.origins import OriginPolicy, parse_target
from modelhostd.core.transfer import RetryPolicy
from tests.adapters.downloads_support import Site, failure
from tests.support import wait_until

Script = Callable[[socket.socket], None]
HOST = "127.0.0.1"
TRUST = OriginPolicy(frozenset({HOST, "localhost"}), frozenset({HOST}))


@contextmanager
def server(script: Script) -> Iterator[int]:
    """Run ``script`` on each connection in a thread of its own; yields the port on 127.0.0.1."""
    listener = socket.create_server((HOST, 0))
    threads: list[threading.Thread] = []
    open_sockets: list[socket.socket] = []

    def serve(connection: socket.socket) -> None:
        with connection:
            try:
                script(connection)
            except OSError:
                return

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            open_sockets.append(connection)
            threads.append(threading.Thread(target=serve, args=(connection,)))
            threads[-1].start()

    acceptor = threading.Thread(target=accept)
    acceptor.start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        acceptor.join()
        for connection in open_sockets:
            wire_shutdown(connection)
        for thread in threads:
            thread.join(60)


def wire_shutdown(connection: socket.socket) -> None:
    """End a connection that may be gone."""
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        return


def read_request(connection: socket.socket) -> bytes:
    """Return the head of one request."""
    data = b""
    while b"\r\n\r\n" not in data:
        more = connection.recv(65536)
        if not more:
            break
        data += more
    return data


def flood(piece: bytes, head: bytes = b"") -> Script:
    """Return a script that answers with ``head`` and then sends ``piece`` for ever."""

    def script(connection: socket.socket) -> None:
        read_request(connection)
        connection.sendall(head)
        while True:
            connection.sendall(piece)

    return script


def say(answer: bytes) -> Script:
    """Return a script that answers every request alike."""

    def script(connection: socket.socket) -> None:
        while read_request(connection):
            connection.sendall(answer)

    return script


def silence(connection: socket.socket) -> None:
    """Read and never answer."""
    while connection.recv(65536):
        pass


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
HOSTILE: dict[str, tuple[Script, set[Reason]]] = {
    "silence": (silence, {Reason.NETWORK_ERROR}),
    "no HTTP": (say(b"SSH-2.0-OpenSSH_9.2\r\n"), {Reason.NETWORK_ERROR}),
    "header bomb": (flood(b"X: y\r\n", b"HTTP/1.1 200 OK\r\n"), {Reason.NETWORK_ERROR}),
    "one endless header": (flood(b"x" * 65536, b"HTTP/1.1 200 OK\r\nX: "), {Reason.NETWORK_ERROR}),
    "endless status line": (flood(b"x" * 65536), {Reason.NETWORK_ERROR}),
    "100 Continue for ever": (flood(b"HTTP/1.1 100 Continue\r\n\r\n"), {Reason.NETWORK_ERROR}),
    "endless chunks": (
        flood(b"10000\r\n" + b" " * 65536 + b"\r\n", CHUNKED),
        {Reason.BAD_SOURCE_REPLY},
    ),
    "chunk of a lie": (say(CHUNKED + b"ffffffffffffffffff\r\nx"), {Reason.NETWORK_ERROR}),
    "chunk size no number": (say(CHUNKED + b"zz\r\n"), {Reason.NETWORK_ERROR}),
    "endless body": (flood(b" " * 65536, b"HTTP/1.1 200 OK\r\n\r\n"), {Reason.BAD_SOURCE_REPLY}),
    "negative length": (
        say(b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n"),
        {Reason.BAD_SOURCE_REPLY, Reason.NETWORK_ERROR},
    ),
    "gzip": (
        say(b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 2\r\n\r\n\x1f\x8b"),
        {Reason.BAD_SOURCE_REPLY},
    ),
    "body cut short": (
        say(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 50\r\n\r\n{}"),
        {Reason.NETWORK_ERROR},
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
async def test_a_server_that_speaks_badly_is_given_up_on(tmp_path: Path, name: str) -> None:
    """In bounded time and memory, with a typed error."""
    script, reasons = HOSTILE[name]
    with server(script) as port:
        site = Site(
            tmp_path / "home",
            cast("LoopbackHub", None),
            endpoint=f"http://{HOST}:{port}",
            # Where silence is no answer, one that a slow machine makes must not be taken for it.
            limits=Limits(stall_s=0.3 if Reason.NETWORK_ERROR in reasons else 20.0),
            retry=RetryPolicy(tries=1),
        )
        assert (await failure(site)).reason in reasons


def connections(canceller: Canceller, limits: Limits | None = None) -> Connections:
    """Return connections that may go to loopback."""
    return Connections(TRUST, limits or Limits(), canceller, "hf://org/x")


def test_connections_are_used_again_and_stale_ones_replaced() -> None:
    """A kept connection that the server closed meanwhile is not an error."""
    seen: list[int] = []

    def twice(connection: socket.socket) -> None:
        seen.append(0)
        for _ in range(2):
            if read_request(connection):
                seen[-1] += 1
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")

    with server(twice) as port, closing(connections(Canceller())) as pool:
        for _ in range(5):
            response = pool.request("GET", f"http://{HOST}:{port}/", {})
            assert response.read_all(10) == b"ok"
    assert seen == [2, 2, 1]


def test_a_cancel_ends_a_blocked_read_at_once() -> None:
    """From another thread; later requests do not even begin."""
    canceller = Canceller()
    with server(silence) as port, closing(connections(canceller)) as pool:
        outcome: list[BaseException] = []

        def ask() -> None:
            try:
                pool.request("GET", f"http://{HOST}:{port}/", {})
            except BaseException as error:
                outcome.append(error)

        thread = threading.Thread(target=ask)
        thread.start()
        wait_until(lambda: canceller._watches)
        canceller.cancel()
        thread.join(60)
        assert [type(error) for error in outcome] == [Stopped]
        with pytest.raises(Stopped):
            pool.request("GET", f"http://{HOST}:{port}/", {})


def test_a_cancel_ends_a_connect_that_nobody_answers() -> None:
    """A listener whose queue is full drops what comes, as a firewall does."""
    canceller = Canceller()
    with closing(socket.socket()) as listener, closing(connections(canceller)) as pool:
        listener.bind((HOST, 0))
        listener.listen(0)
        waiting = [socket.socket() for _ in range(4)]
        for sock in waiting:
            sock.setblocking(False)
            sock.connect_ex(listener.getsockname())
        outcome: list[BaseException] = []

        def ask() -> None:
            try:
                pool.request("GET", f"http://{HOST}:{listener.getsockname()[1]}/", {})
            except BaseException as error:
                outcome.append(error)

        thread = threading.Thread(target=ask)
        thread.start()
        wait_until(lambda: canceller._watches)
        canceller.cancel()
        thread.join(60)
        for sock in waiting:
            sock.close()
        assert [type(error) for error in outcome] == [Stopped]


def test_a_credential_does_not_show() -> None:
    """Neither printed nor in a traceback's locals by repr."""
    credential = Credential(parse_target("https://hub.example", "x").origin, "hf_secret")
    assert "hf_secret" not in repr(credential)
    assert "hub.example" in repr(credential)


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate for localhost that nobody signed, and its key."""
    folder = tmp_path_factory.mktemp("tls")
    made = folder / "cert.pem", folder / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt",
         "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2", "-subj", "/CN=localhost",
         "-addext", "subjectAltName=DNS:localhost", "-out", made[0], "-keyout", made[1]],
        check=True,
        capture_output=True,
    )  # fmt: skip
    return made


def over_tls(script: Script, certificate: tuple[Path, Path]) -> Script:
    """Return the script behind TLS."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)

    def wrapped(connection: socket.socket) -> None:
        with context.wrap_socket(connection, server_side=True) as secure:
            script(secure)

    return wrapped


@pytest.fixture
def trusting(certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Trust the certificate."""
    monkeypatch.setattr(wire, "_TLS_CONTEXT", [ssl.create_default_context(cafile=certificate[0])])


@pytest.mark.usefixtures("trusting")
def test_tls_carries_requests(certificate: tuple[Path, Path]) -> None:
    """With the host's name checked: the same server by address is refused."""
    answer = say(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
    with server(over_tls(answer, certificate)) as port, closing(connections(Canceller())) as pool:
        for _ in range(2):
            assert pool.request("GET", f"https://localhost:{port}/", {}).read_all(10) == b"ok"
        with pytest.raises(ModelhostError, match="certificate") as caught:
            pool.request("GET", f"https://{HOST}:{port}/", {})
        assert caught.value.reason is Reason.NETWORK_ERROR


def test_a_certificate_that_nobody_signed_is_refused(certificate: tuple[Path, Path]) -> None:
    """At once: trying again would not help."""
    with (
        server(over_tls(silence, certificate)) as port,
        closing(connections(Canceller())) as pool,
        pytest.raises(ModelhostError, match="certificate"),
    ):
        pool.request("GET", f"https://localhost:{port}/", {})


@pytest.mark.usefixtures("trusting")
@pytest.mark.parametrize("where", ["handshake", "headers", "body"])
async def test_a_cancel_ends_tls_wherever_it_is(certificate: tuple[Path, Path], where: str) -> None:
    """In the handshake, before the headers, in the body."""
    arrived = threading.Event()

    def stall(connection: socket.socket) -> None:
        read_request(connection)
        if where == "body":
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 90\r\n\r\nsome")
        arrived.set()
        silence(connection)

    def no_handshake(connection: socket.socket) -> None:
        arrived.set()
        silence(connection)

    script = no_handshake if where == "handshake" else over_tls(stall, certificate)
    canceller = Canceller()
    with server(script) as port, closing(connections(canceller)) as pool:

        def ask() -> bytes:
            return pool.request("GET", f"https://localhost:{port}/", {}).read_all(100)

        asking = asyncio.create_task(asyncio.to_thread(ask))
        await asyncio.to_thread(arrived.wait, 20)
        canceller.cancel()
        with pytest.raises(Stopped):
            await asking


@pytest.mark.usefixtures("trusting")
def test_a_handshake_that_stands_still_expires() -> None:
    """By its deadline, which someone must look at: the ticker of a download does."""
    canceller = Canceller()
    with server(silence) as port, closing(connections(canceller, Limits(connect_s=60))) as pool:
        stop = threading.Event()

        def look() -> None:
            wait_until(lambda: any(watch.deadline for watch in canceller._watches))
            while not stop.wait(0.01):
                canceller.expire(time.monotonic() + 100)

        looking = threading.Thread(target=look)
        looking.start()
        with pytest.raises(Transient):
            pool.request("GET", f"https://localhost:{port}/", {})
        stop.set()
        looking.join()
