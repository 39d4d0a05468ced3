"""huggingface_hub, imported late, kept quiet, and given our own connections as its wires.

The library makes one HTTP client for the whole process. Ours has a transport that sends each request with
the ``Exchange`` of the calling thread: one policy for addresses, redirects, tokens and limits.
"""

import os
import threading
import time
from contextvars import ContextVar
from typing import Any

from modelhostd.adapters.connections import Connections, Credential
from modelhostd.adapters.wire import Transient, bad_reply
from modelhostd.core import hub_replies
from modelhostd.core.hub_replies import Asked
from modelhostd.core.values import dataclass

PLAN_REQUESTS_MAX = 1_200
PLAN_BODY_BYTES_MAX = 32 << 20

# Ours to set, or bound to one connection.
_NOT_SENT = frozenset({"host", "connection", "accept-encoding", "authorization", "content-length"})
_NOT_KEPT = frozenset({"transfer-encoding", "connection"})


@dataclass
class Exchange:
    """What the library's requests of one call run with, and how many it may make."""

    connections: Connections
    credential: Credential | None
    asked: Asked
    requests_left: int = PLAN_REQUESTS_MAX

    def send(self, method: str, url: str, headers: dict[str, str]) -> tuple[int, Any, bytes]:
        """Send one request; returns status, headers and the whole body."""
        self.requests_left -= 1
        if self.requests_left < 0:
            raise bad_reply(self.asked.source, f"more than {PLAN_REQUESTS_MAX} pages or redirects")
        response = self.connections.request(
            method, url, headers, credential=self.credential, redirects=0
        )
        body = response.read_all(PLAN_BODY_BYTES_MAX)
        if response.status in hub_replies.TRANSIENT_STATUSES:
            raise transient(self.asked, response.status, response.headers)
        return response.status, response.headers, body


def transient(asked: Asked, status: int, headers: Any) -> Transient:
    """Return the Transient for a status of ``TRANSIENT_STATUSES``."""
    return Transient(
        *hub_replies.transient_error(
            asked, status, headers.get("Retry-After"), headers.get("RateLimit"), time.time()
        )
    )


CURRENT: ContextVar[Exchange] = ContextVar("CURRENT")
_library_lock = threading.Lock()
_library_ready: list[Any] = []


def library() -> Any:
    """Import huggingface_hub once, deaf to what would make it talk by itself, and take its wires."""
    with _library_lock:
        if not _library_ready:
            for name in ("TELEMETRY", "IMPLICIT_TOKEN", "UPDATE_CHECK", "PROGRESS_BARS", "XET"):
                os.environ.setdefault(f"HF_HUB_DISABLE_{name}", "1")
            import huggingface_hub
            import huggingface_hub.errors

            huggingface_hub.set_client_factory(_client)
            _library_ready.append(huggingface_hub)
    return _library_ready[0]


def invalid_url() -> type[Exception]:
    """Return what the library's HTTP client raises for a URL that it cannot take apart."""
    import httpx2

    return httpx2.InvalidURL


def _client() -> Any:
    import httpx2

    class Transport(httpx2.BaseTransport):
        """Sends what the library asks for through the connections of the current exchange."""

        def handle_request(self, request: httpx2.Request) -> httpx2.Response:
            """Send one request whole and return its answer whole."""
            headers = {n: v for n, v in request.headers.items() if n.lower() not in _NOT_SENT}
            status, answer, body = CURRENT.get().send(request.method, str(request.url), headers)
            kept = [(n, v) for n, v in answer.items() if n.lower() not in _NOT_KEPT]
            return httpx2.Response(status, headers=kept, content=body, request=request)

    return httpx2.Client(
        transport=Transport(), follow_redirects=True, max_redirects=5, trust_env=False
    )
