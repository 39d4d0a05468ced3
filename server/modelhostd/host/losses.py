"""What is lost with a worker: its instances come back, most recently used first; its warm copies do not."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import structlog

from modelhostd.core import operations as op_rules
from modelhostd.core.crashes import last_words
from modelhostd.core.lifecycle import INSTANCE, step
from modelhostd.core.resources import Health, InstanceState, Tier
from modelhostd.host.crashes import Crashes
from modelhostd.host.loads import Loads
from modelhostd.host.occupancy import Occupancy, changed, gone
from modelhostd.host.routes import Route
from modelhostd.ports import WorkerExit

log = structlog.get_logger(__name__)


class Losses:
    """Takes out of service what went with a worker, and wants it back."""

    def __init__(self, occupancy: Occupancy, crashes: Crashes, loads: Loads) -> None:
        self._occupancy = occupancy
        self._registry = occupancy.registry
        self._routes = occupancy.routes
        self._crashes = crashes
        self._loads = loads

    def worker_exited(self, exit: WorkerExit) -> None:
        """Take the worker's instances out of service and want them back, most recently used first."""
        log.error(
            "worker lost", device=exit.device, pid=exit.pid, exit=exit.exit, blamed=exit.blamed
        )
        self._crashes.note(exit, self._registry.decided.models.get(exit.blamed))
        lost = _of_worker(exit, self._routes)
        for route in lost:
            route.lost = True
        for warm in _of_worker(exit, self._occupancy.host.warm.values()):
            self._forget_warm(warm, exit)
        # LOADING ends through its load, DRAINING through its unload.
        for route in sorted((r for r in lost if r.open), key=lambda r: -r.last_used):
            self._lost(route, exit)
        self._loads.pump()

    def _forget_warm(self, route: Route, exit: WorkerExit) -> None:
        """Tell that a copy in host memory went with the worker that held it; nothing waits for it."""
        del self._occupancy.host.warm[route.model]
        self._occupancy.free(route.device, route.model)
        instance = self._registry.decided.instance_of(route.model)
        if instance is not None:
            self._registry.record(gone(instance, "CRASHED", _details(route, exit)))

    def _lost(self, route: Route, exit: WorkerExit) -> None:
        self._occupancy.free(route.device, route.model)
        self._routes.remove(route)
        instance = self._registry.decided.instance_of(route.model)
        if instance is None:
            return
        details = _details(route, exit)
        why = self._crashes.blocked(route.model)
        if why is None:
            self._registry.record(gone(instance, "CRASHED", details))
            self._loads.want_for_queue(route.model, "recovery", lost=route)
            return
        blocked = replace(
            instance,
            state=step(INSTANCE, instance.state, InstanceState.BLOCKED),
            tier=Tier.DISK,
            host_bytes=0,
            health=Health.UNHEALTHY,
            crash_count=self._crashes.count(route.model),
            error=op_rules.stored(why),
        )
        self._registry.record(changed(blocked, "BLOCKED", details))
        self._routes.fail(route.model, why)


def _of_worker(exit: WorkerExit, routes: Iterable[Route]) -> Sequence[Route]:
    """Return the routes to what the worker had."""
    return [
        r
        for r in routes
        if r.device == exit.device and (r.model == exit.model if exit.model else not r.own_worker)
    ]


def _details(route: Route, exit: WorkerExit) -> dict[str, str]:
    details = {"exit": exit.exit, "blamed": exit.blamed, "pid": str(exit.pid)}
    if exit.blamed == route.model and exit.stderr_tail:
        # With one of them only: it may be long, and a worker may have had many models.
        details["stderr"] = last_words(exit.stderr_tail)
    return details
