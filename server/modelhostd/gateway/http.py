"""uvicorn as a part of the daemon: it takes no signals, sets up no logs, and every connection ends.

What uvicorn leaves open is closed here: a connection that says nothing, sends its request a byte at a time
or never reads its answer has ``ANSWER_S`` for each request, and there are at most ``CONNECTIONS_MAX``.
"""

import asyncio
import contextlib
from collections.abc import Iterator
from typing import Any

from starlette.types import ASGIApp
from uvicorn import Config, Server
from uvicorn.protocols.http.h11_impl import H11Protocol

CONNECTIONS_MAX = 64
ANSWER_S = 15.0
KEEP_ALIVE_S = 5
HEAD_BYTES_MAX = 16 * 1024
"""Of a request's line and headers, beyond what one read of the socket brings; bodies are not read."""
GRACE_S = 1
"""For answers under way when the daemon stops."""


class Connection(H11Protocol):
    """One connection, which is cut when it takes too long from one answer to the next."""

    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """See asyncio.Protocol."""
        super().connection_made(transport)
        if len(self.connections) > CONNECTIONS_MAX:
            transport.abort()
        else:
            self._begin()

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio.Protocol."""
        if self._late is not None:
            self._late.cancel()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        """See H11Protocol: an answer has been handed to the socket."""
        self._begin()
        super().on_response_complete()

    def _begin(self) -> None:
        if self._late is not None:
            self._late.cancel()
        self._late = self.loop.call_later(ANSWER_S, self.transport.abort)


class HttpServer(Server):
    """A server whose owner says when it ends: ``should_exit`` and nothing else."""

    def __init__(self, app: ASGIApp) -> None:
        super().__init__(
            Config(
                app,
                http=Connection,
                ws="none",
                lifespan="off",
                interface="asgi3",
                log_config=None,
                log_level="error",
                access_log=False,
                proxy_headers=False,
                server_header=False,
                date_header=False,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=GRACE_S,
                h11_max_incomplete_event_size=HEAD_BYTES_MAX,
            )
        )
        self._ended = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave SIGTERM and SIGINT to the daemon."""
        yield

    async def main_loop(self) -> None:
        """Wait to be stopped, instead of looking ten times a second whether that has happened."""
        await self.on_tick(0)
        await self._ended.wait()

    def stop(self) -> None:
        """Begin to end: take no more connections, let answers under way go out."""
        self.should_exit = True
        self._ended.set()

    def cut(self) -> None:
        """Drop the connections that are left."""
        for connection in list(self.server_state.connections):
            transport: Any = connection.transport
            transport.abort()
