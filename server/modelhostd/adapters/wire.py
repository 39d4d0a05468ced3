"""One HTTP/1.1 connection to one judged address, under the eyes of a canceller."""

import errno
import http.client
import os
import select
import socket
import ssl
import threading
import time
from collections.abc import Mapping
from contextlib import suppress

from modelhostd.adapters.cancel import Canceller, Watch
from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.origins import Origin
from modelhostd.core.values import dataclass

CONNECT_LOOK_MS = 20

Address = tuple[str, int] | tuple[str, int, int, int] | tuple[int, bytes]


@dataclass(frozen=True, slots=True)
class Limits:
    """Seconds without which a server is given up on."""

    connect_s: float = 10.0
    """TCP and TLS together, per address."""
    stall_s: float = 30.0
    """Until the headers are there, and for each ``stall_bytes`` of the body."""
    stall_bytes: int = 16 << 10


@dataclass
class Transient(Exception):
    """A failure that may pass by itself. ``error`` is what to say when patience ends."""

    error: ModelhostError
    retry_after_s: float | None = None


class Connection:
    """One connected socket with its parser."""

    def __init__(
        self,
        canceller: Canceller,
        limits: Limits,
        origin: Origin,
        kind: tuple[int, int, int],
        address: Address,
    ) -> None:
        self.origin = origin
        self._canceller = canceller
        self._limits = limits
        sock = socket.socket(*kind)
        try:
            self.watch: Watch = canceller.watch(sock)
        except BaseException:
            sock.close()
            raise
        self._http = http.client.HTTPConnection(origin.host, origin.port)
        self._http.auto_open = 0
        self._http.default_port = 443 if origin.scheme == "https" else 80
        self._http.sock = sock
        try:
            self._connect(sock, address)
        except BaseException:
            self.close()
            raise

    def _connect(
        self,
        sock: socket.socket,
        address: Address,
    ) -> None:
        self.watch.deadline = deadline = time.monotonic() + self._limits.connect_s
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._reach(sock, address, deadline)
        sock.settimeout(self._limits.connect_s)
        if self.origin.scheme == "https":
            wrapped = _tls().wrap_socket(
                sock, server_hostname=self.origin.host, do_handshake_on_connect=False
            )
            self._http.sock = wrapped
            self._canceller.swap(self.watch, wrapped)
            wrapped.do_handshake()
        self._http.sock.settimeout(self._limits.stall_s)

    def _reach(self, sock: socket.socket, address: Address, deadline: float) -> None:
        """Connect, looking up between short waits: a socket that is not connected yet cannot be
        shut down, so a cancel would have to wait for the whole time-out.
        """
        sock.setblocking(False)
        status = sock.connect_ex(address)
        waiting = select.poll()
        waiting.register(sock, select.POLLOUT)
        while status in {errno.EINPROGRESS, errno.EAGAIN}:
            self._canceller.check()
            if waiting.poll(CONNECT_LOOK_MS):
                status = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            elif time.monotonic() >= deadline or self.watch.expired:
                status = errno.ETIMEDOUT
        if status:
            raise OSError(status, os.strerror(status))

    def send(
        self, method: str, path: str, headers: Mapping[str, str], body: bytes | None = None
    ) -> http.client.HTTPResponse:
        """Send a request and read the answer's head."""
        self.watch.deadline = time.monotonic() + self._limits.stall_s
        self._http.putrequest(method, path, skip_accept_encoding=True)
        for name, value in headers.items():
            self._http.putheader(name, value)
        self._http.endheaders(body)
        return self._http.getresponse()

    def close(self) -> None:
        """Close the socket and forget it."""
        self._canceller.unwatch(self.watch)
        with suppress(OSError):
            self._http.close()
        with suppress(OSError):
            self.watch.sock.close()


_TLS_LOCK = threading.Lock()
_TLS_CONTEXT: list[ssl.SSLContext] = []


def _tls() -> ssl.SSLContext:
    # Reading the machine's authorities takes some 20 ms: once, and when first needed.
    with _TLS_LOCK:
        if not _TLS_CONTEXT:
            context = ssl.create_default_context()
            context.set_alpn_protocols(["http/1.1"])
            _TLS_CONTEXT.append(context)
        return _TLS_CONTEXT[0]


def bad_reply(source: str, cause: str) -> ModelhostError:
    """Return BAD_SOURCE_REPLY: the server speaks, and not what it should."""
    return ModelhostError(
        Reason.BAD_SOURCE_REPLY,
        f"{source}: unusable answer: {cause}; a proxy or mirror may be in the way, check the endpoint",
        {"source": source, "cause": cause},
    )


def describe(error: Exception) -> str:
    """Return one word or sentence for what broke a connection, without names of hosts or URLs."""
    if isinstance(error, http.client.IncompleteRead):
        return "the connection was cut"
    number = getattr(error, "errno", None)
    if isinstance(error, socket.gaierror):
        return f"name not found: {error.strerror}"
    if isinstance(number, int) and number in errno.errorcode:
        return errno.errorcode[number]
    return type(error).__name__
