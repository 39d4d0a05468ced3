"""What is lost with a worker: its instances come back, most recently used first.

Weights that the worker left in host memory stay there: an instance of them is WARM, and adopted when it is wanted. Where
the machine is short of memory as many go at once as must: that may be why the worker was killed, and by whom nobody tells.
"""

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import replace

import structlog

from modelhostd.core import operations as op_rules
from modelhostd.core.crashes import ISOLATED_AT, last_words
from modelhostd.core.host_tier import HOST
from modelhostd.core.lifecycle import INSTANCE, step
from modelhostd.core.resources import Health, InstanceState, Tier
from modelhostd.core.state import instance_key
from modelhostd.host.crashes import Crashes
from modelhostd.host.loads import Loads
from modelhostd.host.occupancy import Occupancy, changed, gone
from modelhostd.host.retiring import Retiring
from modelhostd.host.routes import Route
from modelhostd.ports import WorkerExit

log = structlog.get_logger(__name__)


class Losses:
    """Takes out of service what went with a worker, and wants it back."""

    def __init__(
        self, occupancy: Occupancy, crashes: Crashes, loads: Loads, retiring: Retiring
    ) -> None:
        self._occupancy = occupancy
        self._registry = occupancy.registry
        self._routes = occupancy.routes
        self._crashes = crashes
        self._loads = loads
        self._retiring = retiring
        self._tasks: set[asyncio.Task[None]] = set()

    def worker_exited(self, exit: WorkerExit) -> None:
        """Take the worker's instances out of service and want them back, most recently used first."""
        log.error(
            "worker lost", device=exit.device, pid=exit.pid, exit=exit.exit, blamed=exit.blamed
        )
        self._crashes.note(exit, self._registry.decided.models.get(exit.blamed))
        routes = _of_worker(exit, self._routes)
        warm = _of_worker(exit, self._occupancy.host.warm.values())
        for route in (*warm, *routes):
            route.left_bytes = self._left(route, exit)
            route.lost = not route.left_bytes
        for route in warm:
            if route.lost:
                self._forget_warm(route, exit)
            else:
                self._stays(route, exit)
        # LOADING ends through its load, DRAINING through its unload.
        ready = sorted((r for r in routes if r.open), key=lambda r: -r.last_used)
        for route in ready:
            if route.lost:
                self._lost(route, exit)
            else:
                self._stays(route, exit)
        if (short := self._occupancy.host.shortage()) is not None:
            self._retiring.relieve(short)
        # Only now: the first that is wanted back might else evict those that are gone already; and what is here first, or
        # a copy of what comes from disk might take its place.
        for route in sorted(ready, key=lambda r: r.model not in self._occupancy.host.warm):
            there = route.model in self._registry.decided.models
            if there and self._crashes.blocked(route.model) is None:
                self._loads.want_for_queue(route.model, "recovery", lost=route)
        self._loads.pump()

    def _left(self, route: Route, exit: WorkerExit) -> int:
        """Return the bytes that the worker left of an instance, if they are to be adopted."""
        left = exit.kept.get((route.instance, route.generation), 0)
        there = self._registry.decided.instance_of(route.model) is not None
        if not left or (there and self._crashes.count(route.model) < ISOLATED_AT):
            return left
        # They may be why; and where the model has a process of its own now, they belong to another one.
        log.info("not adopted", model=route.model, bytes=left)
        key = instance_key(route.model, route.instance)
        if route.open or route.model in self._occupancy.host.warm:
            # Beside the model's own entry, which goes at once: it may be loaded anew meanwhile.
            self._occupancy.ledger.hold(HOST, key, left)
        task = asyncio.create_task(self._discard(route, key), name=f"discard {route.model}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return 0

    async def _discard(self, route: Route, key: str) -> None:
        """Free what was left of an instance; ``key`` is its entry in the ledger."""
        try:
            await self._occupancy.workers.unload(route.device, route.instance, route.generation)
        finally:
            self._occupancy.ledger.release(HOST, key)
        self._loads.pump()

    def _stays(self, route: Route, exit: WorkerExit) -> None:
        """Note an instance whose weights outlived its worker."""
        model, left = route.model, route.left_bytes
        # What was decided of it, and not begun, is decided anew: a worker that was told keeps nothing of it.
        route.given_up = False
        self._occupancy.ledger.release(route.device, model)
        self._occupancy.ledger.hold(HOST, model, left)
        self._routes.remove(route)
        self._occupancy.host.add(route)
        instance = self._registry.decided.instance_of(model)
        assert instance is not None
        warm = replace(
            instance,
            state=step(INSTANCE, instance.state, InstanceState.WARM),
            tier=Tier.HOST,
            host_bytes=left,
            working_bytes=0,
        )
        details = {**_details(route, exit), "keptBytes": str(left)}
        self._registry.record(changed(warm, "CRASHED", details))

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
            return
        blocked = replace(
            instance,
            state=step(INSTANCE, instance.state, InstanceState.BLOCKED),
            tier=Tier.DISK,
            host_bytes=0,
            working_bytes=0,
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
