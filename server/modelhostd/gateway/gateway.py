"""The gateway as the daemon knows it: listen, start, stop.

``listen`` binds before READY; ``start`` returns at once and imports the server in a thread, so that neither
READY nor the calls of the first moment wait for it; who asks meanwhile waits in the socket's backlog.
"""

import asyncio
import importlib
import importlib.util
import socket
from collections.abc import Callable
from typing import Any

import structlog

from modelhostd.gateway import listener
from modelhostd.gateway.sources import Sources

log = structlog.get_logger(__name__)

NEEDED = ("starlette", "uvicorn", "h11")
STOP_S = 2.5
"""How long stopping may take: uvicorn's grace, its pauses, and then the rest is cut."""


class Gateway:
    """HTTP on one address. ``serving`` tells whether the daemon takes calls: the truth of gRPC's health."""

    def __init__(
        self, address: listener.Address, sources: Sources, serving: Callable[[], bool]
    ) -> None:
        self._address = address
        self._sources = sources
        self._serving = serving
        self._socket: socket.socket | None = None
        self._server: Any = None
        self._task: asyncio.Task[None] | None = None

    def listen(self) -> str:
        """Bind, and return the URL. Raises WRONG_STATE with what is in the way."""
        for name in NEEDED:
            if importlib.util.find_spec(name) is None:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        self._socket = listener.bind(self._address)
        host, port = self._socket.getsockname()[:2]
        return listener.url(host, port)

    def start(self) -> None:
        """Serve what ``listen`` has bound, as soon as the server is imported."""
        self._task = asyncio.create_task(self._serve(), name="gateway")

    async def stop(self) -> None:
        """End within ``STOP_S`` and give the port back, whatever clients do."""
        task, self._task = self._task, None
        if task is not None:
            if self._server is None:
                task.cancel()
            else:
                self._server.stop()
            await asyncio.wait({task}, timeout=STOP_S)
            task.cancel()
            if self._server is not None:
                self._server.cut()
        if self._socket is not None:
            self._socket.close()

    async def _serve(self) -> None:
        try:
            app = await asyncio.to_thread(importlib.import_module, "modelhostd.gateway.app")
            http = await asyncio.to_thread(importlib.import_module, "modelhostd.gateway.http")
            metrics = await asyncio.to_thread(importlib.import_module, "modelhostd.gateway.metrics")
            self._server = http.HttpServer(
                app.make(
                    lambda: metrics.families(self._sources),
                    lambda: (self._serving(), self._facts()),
                    [self._address.host],
                )
            )
            await self._server.serve(sockets=[self._socket])
        except Exception:
            # The daemon serves without it: what it is for goes through gRPC.
            log.exception("HTTP ended unexpectedly; /metrics and /healthz are gone until a restart")

    def _facts(self) -> dict[str, object]:
        registry = self._sources.host.registry
        return {"storeId": registry.store_id, "sequence": registry.journal.last_sequence}
