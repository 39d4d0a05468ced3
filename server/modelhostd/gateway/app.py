"""The HTTP application: what is served where, and who may ask.

Everything is a GET without side effects, nothing is allowed to other origins, and a Host that is not this
machine's own name is refused: a page somewhere that points its own name at 127.0.0.1 gets nothing.
"""

import asyncio
import json
from collections.abc import Callable, Iterator, Mapping, Sequence

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from modelhostd.gateway.exposition import CONTENT_TYPE

HOSTS = ("localhost", "127.0.0.1", "[::1]")
HEADERS = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}


def make(
    metrics: Callable[[], Iterator[str]],
    health: Callable[[], tuple[bool, Mapping[str, object]]],
    hosts: Sequence[str] = (),
) -> Starlette:
    """Return the application.

    ``metrics`` yields the exposition in pieces; ``health`` tells whether calls are taken, and what else
    ``/healthz`` shows; ``hosts`` are names of this machine beside loopback's.
    """

    async def healthz(_: Request) -> Response:
        serving, facts = health()
        body = {"status": "SERVING" if serving else "NOT_SERVING", **facts}
        return Response(
            json.dumps(body) + "\n",
            status_code=200 if serving else 503,
            media_type="application/json",
            headers=HEADERS,
        )

    async def exposition(_: Request) -> Response:
        return Pieces(metrics())

    return Starlette(
        routes=[Route("/healthz", healthz), Route("/metrics", exposition)],
        middleware=[
            Middleware(TrustedHostMiddleware, allowed_hosts=[*HOSTS, *hosts], www_redirect=False)
        ],
    )


class Pieces(Response):
    """Sends the exposition as it is made, and lets others run after each piece.

    Starlette's StreamingResponse would start a task group and read the request beside it.
    """

    def __init__(self, pieces: Iterator[str]) -> None:
        super().__init__(headers={**HEADERS, "Content-Type": CONTENT_TYPE})
        del self.headers["Content-Length"]
        self._pieces = pieces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        start = {"status": self.status_code, "headers": self.raw_headers}
        await send({"type": "http.response.start", **start})
        for piece in self._pieces:
            part = {"body": piece.encode(), "more_body": True}
            await send({"type": "http.response.body", **part})
            await asyncio.sleep(0)
        await send({"type": "http.response.body", "body": b"", "more_body": False})
