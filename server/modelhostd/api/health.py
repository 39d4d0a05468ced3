"""grpc.health.v1: whether the daemon, a service of it or a model serves, now.

Source: https://github.com/grpc/grpc/blob/master/doc/health-checking.md. The stock asyncio servicer writes
to its watchers while it holds a lock, so that one that never reads stops everything; here a change is a
flag, and each watcher looks at it in its own time.

Names: empty = the daemon takes calls; a service's full name; ``model/<id>`` = a request for that model
would be served now.
"""

import asyncio
from collections.abc import AsyncIterator, Collection

from grpc_health.v1 import health_pb2  # type: ignore[import-untyped]

from modelhost.v1 import options_pb2
from modelhostd.api.admission import Group
from modelhostd.api.calls import Call
from modelhostd.api.errors import shutting_down
from modelhostd.api.methods import Service
from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.names import ID
from modelhostd.host import Host
from modelhostd.host.journal import Signal

MODEL_PREFIX = "model/"

_Status = health_pb2.HealthCheckResponse


def health_service(health: "Health") -> Service:
    """Return the service to offer."""
    return Service(
        health_pb2.DESCRIPTOR.services_by_name["Health"],
        health,
        rights={"Check": options_pb2.READ, "Watch": options_pb2.READ},
        groups={"Check": Group.HEALTH},
    )


class Health:
    """Health of the daemon, its services and its models. ``serving`` is set when listeners are up."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._services: frozenset[str] = frozenset()
        self._serving = False
        self._changed = Signal()

    def offer(self, services: Collection[str]) -> None:
        """Say which services have a health."""
        self._services = frozenset(services)

    @property
    def serving(self) -> bool:
        """Whether the daemon takes calls: what Check answers for the empty name."""
        return self._serving

    def set_serving(self, serving: bool) -> None:
        """Change the daemon's health. Never waits for anybody."""
        self._serving = serving
        self._changed.notify()

    async def check(self, request: object, call: Call) -> object:
        """See Check in grpc.health.v1. Fails with NOT_FOUND for an unknown name."""
        name: str = request.service  # type: ignore[attr-defined]
        status = self._status(name)
        if status == _Status.SERVICE_UNKNOWN:
            raise ModelhostError(
                Reason.MODEL_NOT_FOUND,
                f"nothing called {name[:100]!r} has a health here; ask for '' (the daemon), a service "
                f"({', '.join(sorted(self._services))}) or {MODEL_PREFIX}<id>",
                {"model": name[:100]},
            )
        return _Status(status=status)

    async def watch(self, request: object, call: Call) -> AsyncIterator[object]:
        """See Watch in grpc.health.v1: the health now, then each change; ends when the daemon stops."""
        name: str = request.service  # type: ignore[attr-defined]
        wake = asyncio.Event()
        model_changes = self._host.registry.journal.changed
        watched = (
            (self._changed, model_changes) if name.startswith(MODEL_PREFIX) else (self._changed,)
        )
        last: int | None = None
        with self._changed.subscribed(wake), watched[-1].subscribed(wake):
            while True:
                wake.clear()
                status = self._status(name)
                if status != last:
                    last = status
                    yield _Status(status=status)
                if call.draining.is_set():
                    raise shutting_down()
                await wake.wait()

    def _status(self, name: str) -> int:
        known = not name or name in self._services
        serving = self._serving
        if name.startswith(MODEL_PREFIX):
            model = name.removeprefix(MODEL_PREFIX)
            if ID.fullmatch(model) is not None:
                try:
                    serving = self._serving and self._host.inference.ready(model)
                    known = True
                except ModelhostError:
                    known = False
        if not known:
            return int(_Status.SERVICE_UNKNOWN)
        return int(_Status.SERVING if serving else _Status.NOT_SERVING)
