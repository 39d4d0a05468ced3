"""HTTP connections under one policy: judged addresses, bound tokens, counted redirects, no coded bodies.

Everything that modelhost fetches goes through here, the requests of huggingface_hub too (see ``hub``).
Blocking, for threads; a ``Canceller`` ends any wait. HTTP/1.1 by ``http.client``: twice as cheap as the
asynchronous clients, and a read can be cancelled in a millisecond.
"""

import base64
import errno
import http.client
import socket
import ssl
import threading
import time
from collections.abc import Callable, Mapping

from modelhostd.adapters.cancel import Canceller
from modelhostd.adapters.wire import Connection, Limits, Transient, bad_reply, describe
from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.origins import Origin, OriginPolicy, Target, join_url, parse_target, redacted
from modelhostd.core.values import dataclass

REDIRECTS_MAX = 5
IDLE_MAX = 8
SKIP_BYTES_MAX = 64 << 10
_REDIRECTS = frozenset({301, 302, 303, 307, 308})


def _told_nobody(_: int) -> None:
    pass


@dataclass(frozen=True, slots=True)
class Credential:
    """A token, or a user with a password, and the one origin that may see it."""

    origin: Origin
    token: str
    user: str = ""
    """Whose password the token is; empty for tokens that stand for themselves."""
    answered: Callable[[int], None] = _told_nobody
    """Takes the status of each answer to a request that carried it."""

    @property
    def header(self) -> str:
        """What an Authorization header says."""
        if not self.user:
            return f"Bearer {self.token}"
        pair = f"{self.user}:{self.token}".encode()
        return f"Basic {base64.b64encode(pair).decode()}"

    def __repr__(self) -> str:
        return f"Credential({self.origin}, ***)"


class Response:
    """One answer. Read it to its end or ``close`` it; a connection that was read up is used again."""

    def __init__(
        self,
        pool: "Connections",
        connection: Connection,
        raw: http.client.HTTPResponse,
        url: str,
    ) -> None:
        self._pool = pool
        self._connection = connection
        self._raw = raw
        self.url = url
        self.status = raw.status
        self.headers = raw.headers
        self._quota = 0
        self._patience_s = 0.0
        # From here on it counts how long we wait for the server, not how long it waits for us.
        connection.watch.deadline = None

    @property
    def length(self) -> int | None:
        """Bytes of the body as announced; None where the server does not say."""
        return self._raw.length

    @property
    def origin(self) -> Origin:
        """Who answered, after redirects."""
        return self._connection.origin

    def read_into(self, buffer: memoryview) -> int:
        """Read what is there, at most ``len(buffer)``; 0 at the end. Raises Transient."""
        limits, watch = self._pool.limits, self._connection.watch
        if self._quota <= 0:
            self._patience_s, self._quota = limits.stall_s, limits.stall_bytes
        began = time.monotonic()
        watch.deadline = began + self._patience_s
        try:
            if self._raw.chunked or self._raw.length is None:
                data = self._raw.read1(len(buffer))
                buffer[: len(data)] = data
                count = len(data)
            else:
                count = self._read_plain(buffer)
        except (OSError, http.client.HTTPException, ValueError, AttributeError) as error:
            self.close()
            raise self._pool.failure(error, self._connection, "while reading the body") from error
        watch.deadline = None
        self._patience_s -= time.monotonic() - began
        self._quota -= count
        if count == 0:
            self._finish()
        return count

    def _read_plain(self, buffer: memoryview) -> int:
        """One read of the socket straight into ``buffer``: ``readinto`` would wait for all of it."""
        left = self._raw.length or 0
        if left == 0:
            return 0
        count = self._raw.fp.readinto1(buffer[: min(left, len(buffer))])
        if count == 0:
            raise http.client.IncompleteRead(b"", left)
        self._raw.length = left - count
        return int(count)

    def read_all(self, limit: int) -> bytes:
        """Read a small body. Raises BAD_SOURCE_REPLY above ``limit`` bytes, Transient on failures."""
        buffer = bytearray(min(limit + 1, 64 << 10))
        view = memoryview(buffer)
        out = bytearray()
        while count := self.read_into(view):
            out += view[:count]
            if len(out) > limit:
                self.close()
                raise bad_reply(
                    self._pool.source, f"more than {limit} bytes where few were expected"
                )
        return bytes(out)

    def skip(self) -> None:
        """Be done with an answer: read a short body up, so that the connection can be used again."""
        if self.length is not None and self.length <= SKIP_BYTES_MAX:
            try:
                self.read_all(SKIP_BYTES_MAX)
            except (Transient, ModelhostError):
                self.close()
        else:
            self.close()

    def close(self) -> None:
        """End the connection, whatever is left to read."""
        self._connection.close()
        # The parsed answer holds the socket's descriptor by a file of its own.
        self._raw.close()

    def _finish(self) -> None:
        if self._raw.will_close:
            self.close()
        else:
            self._raw.close()
            self._pool.give_back(self._connection)


class Connections:
    """The connections of one transfer; keeps idle ones for the next request to the same origin."""

    def __init__(
        self, policy: OriginPolicy, limits: Limits, canceller: Canceller, source: str
    ) -> None:
        self.policy = policy
        self.limits = limits
        self.canceller = canceller
        self.source = source
        self._lock = threading.Lock()
        self._idle: dict[Origin, list[Connection]] = {}

    def close(self) -> None:
        """Close what is idle."""
        with self._lock:
            idle = [connection for kept in self._idle.values() for connection in kept]
            self._idle.clear()
        for connection in idle:
            connection.close()

    def request(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        *,
        credential: Credential | None = None,
        body: bytes | None = None,
        redirects: int = REDIRECTS_MAX,
    ) -> Response:
        """Send a request and return the answer's head, after redirects; none is followed with a ``body``.

        Each hop is judged anew, and the token goes to the credential's origin only. With
        ``redirects=0`` a redirect is returned like any answer. Raises Transient, SOURCE_NOT_ALLOWED,
        BAD_SOURCE_REPLY, or Stopped when cancelled.
        """
        for _ in range(redirects + 1):
            target = parse_target(url, self.source)
            self.policy.check_target(target, self.source)
            out = {"Accept-Encoding": "identity", **headers}
            shown = credential if credential and credential.origin == target.origin else None
            if shown is not None:
                out["Authorization"] = shown.header
            if body is not None:
                out["Content-Length"] = str(len(body))
            response = self._exchange(method, target, out, url, body)
            if shown is not None:
                shown.answered(response.status)
            coding = response.headers.get("Content-Encoding", "identity").strip().lower()
            if coding not in {"", "identity"}:
                response.close()
                raise bad_reply(
                    self.source, f"{redacted(url)} sent a body coded as {coding[:20]!r}"
                )
            location = response.headers.get("Location")
            final = redirects == 0 or body is not None or response.status not in _REDIRECTS
            if final or location is None:
                return response
            response.skip()
            url = join_url(url, location, self.source)
        raise bad_reply(self.source, f"more than {redirects} redirects")

    def _exchange(
        self, method: str, target: Target, headers: Mapping[str, str], url: str, body: bytes | None
    ) -> Response:
        connection, reused = self._take(target.origin)
        try:
            return Response(
                self, connection, connection.send(method, target.path, headers, body), url
            )
        except (OSError, http.client.HTTPException, ValueError) as error:
            connection.close()
            # A server may close a kept connection at any moment: that says nothing about a new one.
            if not reused or self.canceller.cancelled or connection.watch.expired:
                raise self.failure(error, connection, "before the headers") from error
        connection = self._open(target.origin)
        try:
            return Response(
                self, connection, connection.send(method, target.path, headers, body), url
            )
        except (OSError, http.client.HTTPException, ValueError) as error:
            connection.close()
            raise self.failure(error, connection, "before the headers") from error

    def _take(self, origin: Origin) -> tuple[Connection, bool]:
        with self._lock:
            kept = self._idle.get(origin)
            if kept:
                return kept.pop(), True
        return self._open(origin), False

    def give_back(self, connection: Connection) -> None:
        """Keep a connection whose answer was read to its end."""
        connection.watch.deadline = None
        with self._lock:
            kept = self._idle.setdefault(connection.origin, [])
            if len(kept) < IDLE_MAX and not self.canceller.cancelled:
                kept.append(connection)
                return
        connection.close()

    def _open(self, origin: Origin) -> Connection:
        self.canceller.check()
        try:
            found = socket.getaddrinfo(origin.host, origin.port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            self.canceller.check()
            raise Transient(self._unreachable(error, origin)) from error
        last: Exception | None = None
        for family, kind, protocol, _, address in found[:4]:
            # The address that was judged is the one that is connected to.
            self.policy.check_address(origin.host, str(address[0]), self.source)
            try:
                return Connection(
                    self.canceller, self.limits, origin, (family, kind, protocol), address
                )
            except ssl.SSLCertVerificationError as error:
                raise ModelhostError(
                    Reason.NETWORK_ERROR,
                    f"{self.source}: {origin} has no valid certificate ({error.verify_message}); check "
                    "the clock and the machine's certificate authorities",
                    {"source": self.source, "cause": "certificate"},
                ) from error
            except (OSError, ValueError) as error:
                self.canceller.check()
                last = error
        assert last is not None
        raise Transient(self._unreachable(last, origin)) from last

    def failure(self, error: Exception, connection: Connection, when: str) -> Transient:
        """Return a broken connection as a failure that may pass. Raises Stopped when we broke it."""
        self.canceller.check()
        stalled = connection.watch.expired or isinstance(error, TimeoutError)
        cause = f"no progress for {self.limits.stall_s:g} s" if stalled else describe(error)
        return Transient(
            ModelhostError(
                Reason.NETWORK_ERROR,
                f"{self.source}: the connection to {connection.origin} failed {when} ({cause}); "
                "download again, what was fetched is kept",
                {"source": self.source, "cause": cause},
            )
        )

    def _unreachable(self, error: Exception, origin: Origin) -> ModelhostError:
        offline = (
            isinstance(error, socket.gaierror) and error.errno == socket.EAI_AGAIN
        ) or getattr(error, "errno", None) in {errno.ENETUNREACH, errno.ENETDOWN}
        if offline:
            return ModelhostError(
                Reason.OFFLINE,
                f"{self.source}: no network to {origin} ({describe(error)}); what is on disk works, "
                "download again when the network is back",
                {"source": self.source},
            )
        return ModelhostError(
            Reason.NETWORK_ERROR,
            f"{self.source}: cannot connect to {origin} ({describe(error)}); check the network and "
            "the endpoint",
            {"source": self.source, "cause": describe(error)},
        )
