"""Instances on their way out: their route flips at once, their memory is freed once they are idle.

Rules:
1. A route flips closed in the same step that decides to take its instance out of service.
2. Bytes are released when the worker says that they are free, or when it is reaped.
3. Why one leaves is told once, when that is decided; when it has gone, that it has: DRAINED.
4. What leaves its device stays WARM in host memory only while that holds no more than its budget.
"""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import structlog

from modelhostd.core import host_tier as host_rules
from modelhostd.core.errors import ModelhostError
from modelhostd.core.host_tier import HOST
from modelhostd.core.lifecycle import INSTANCE, step
from modelhostd.core.residency import DeviceView
from modelhostd.core.resources import InstanceState, Tier
from modelhostd.host.copies import Copies
from modelhostd.host.occupancy import Occupancy, changed, gone
from modelhostd.host.routes import Route

log = structlog.get_logger(__name__)

LEFT = "DRAINED"
"""The reason of the event at which the memory of an instance that left is free; its ``cause`` is why that left."""


class Retiring:
    """Takes instances out of service. ``freed`` is called with each model whose memory is free."""

    def __init__(self, occupancy: Occupancy, freed: Callable[[str], None]) -> None:
        self._occupancy = occupancy
        self._registry = occupancy.registry
        self._host = occupancy.host
        self._freed = freed
        self._copies = Copies(occupancy, freed)
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def task(self, model_id: str) -> "asyncio.Task[None] | None":
        """Return what frees the model's memory now, if anything does."""
        return self._tasks.get(model_id)

    def evict(self, route: Route, reason: str, details: Mapping[str, str]) -> None:
        """Take an instance off its device; its weights stay in host memory where they may."""
        self.drain(route, reason, details, keep=self._host.keeps(route))

    def drain(
        self, route: Route, reason: str, details: Mapping[str, str], *, keep: bool = False
    ) -> None:
        """Take an instance out of service; nothing if it is on its way out already."""
        if not route.open:
            return
        self._begin(route, reason, details, keep)

    def drop(self, model_id: str, reason: str, details: Mapping[str, str]) -> None:
        """Free a warm copy in host memory; nothing where there is none."""
        route = self._host.warm.pop(model_id, None)
        if route is not None:
            self._occupancy.routes.put(route)
            self._begin(route, reason, details, keep=False)

    def drop_copy(self, model_id: str, reason: str, details: Mapping[str, str]) -> None:
        """Free a copy in host memory, be it warm or of what is on a device, which stays there."""
        route = self._occupancy.routes.get(model_id)
        if route is None:
            self.drop(model_id, reason, details)
        else:
            self._copies.drop(route, reason, details)

    def relieve(self, host: DeviceView) -> None:
        """Free copies as far as host memory holds more than it has room for."""
        policy, now = self._occupancy.policy(), self._registry.clock.monotonic()
        victims = host_rules.over_budget(host, now, policy)
        kept = policy.kept(host.holdings, victims, now)
        for model_id in victims:
            details = {
                "overBytes": str(-host.free_bytes),
                "freedBytes": str(self._host.held_bytes(model_id)),
                "policy": policy.name,
                "kept": kept,
            }
            self.drop_copy(model_id, "OVER_HOST_BUDGET", details)

    def hurry(self, route: Route) -> None:
        """Cancel the requests in flight in an instance that drains."""
        if route.draining and route.in_flight:
            self._occupancy.workers.abort(route.device, route.instance, route.generation)

    def _begin(self, route: Route, reason: str, details: Mapping[str, str], keep: bool) -> None:
        route.open, route.draining, route.keep = False, True, keep
        instance = self._registry.decided.instance_of(route.model)
        assert instance is not None
        details = {**details, "tierAfter": (Tier.HOST if keep else Tier.DISK).value}
        draining = replace(instance, state=step(INSTANCE, instance.state, InstanceState.DRAINING))
        self._registry.record(changed(draining, reason, details))
        task = asyncio.create_task(self._retire(route, reason), name=f"retire {route.model}")
        self._tasks[route.model] = task
        task.add_done_callback(partial(self._retired, route.model))

    async def stop(self) -> None:
        """End what is under way: the memory goes with its worker."""
        await self._copies.stop()
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def _retire(self, route: Route, reason: str) -> None:
        try:
            async with asyncio.timeout(self._registry.decided.settings.drain_timeout_s):
                await route.idle.wait()
        except TimeoutError:
            log.warning("drain took too long", model=route.model, in_flight=route.in_flight)
            self.hurry(route)
        try:
            kept = await self._leave(route)
        except ModelhostError as error:
            log.warning("unload failed", model=route.model, reason=error.reason)
            kept = 0
        except Exception:
            # The port promises otherwise; a model that could never be loaded again would be worse.
            log.exception("unload failed unexpectedly", model=route.model)
            kept = 0
        self._occupancy.routes.remove(route)
        if kept:
            self._now_warm(route, kept, reason)
        else:
            self._occupancy.free(route.device, route.model)
            instance = self._registry.decided.instance_of(route.model)
            if instance is not None and instance.generation == route.generation:
                left = {"cause": reason, "tierAfter": Tier.DISK.value}
                self._registry.record(gone(instance, LEFT, left))
        self._freed(route.model)

    async def _leave(self, route: Route) -> int:
        """Free what an instance holds, or only its device; return the bytes that stay in host memory."""
        workers = self._occupancy.workers
        kept = 0
        if route.keep:
            kept = await workers.demote(route.device, route.instance, route.generation)
        if kept and route.keep and not route.lost:
            return kept
        await workers.unload(route.device, route.instance, route.generation)
        return 0

    def _now_warm(self, route: Route, kept: int, reason: str) -> None:
        instance = self._registry.decided.instance_of(route.model)
        assert instance is not None
        self._occupancy.ledger.release(route.device, route.model)
        self._occupancy.ledger.hold(HOST, route.model, kept)
        self._host.add(route)
        warm = replace(
            instance,
            state=step(INSTANCE, instance.state, InstanceState.WARM),
            tier=Tier.HOST,
            host_bytes=kept,
            working_bytes=0,
        )
        left = {"cause": reason, "tierAfter": Tier.HOST.value, "hostBytes": str(kept)}
        self._registry.record(changed(warm, LEFT, left))

    def _retired(self, model_id: str, task: "asyncio.Task[None]") -> None:
        if self._tasks.get(model_id) is task:
            del self._tasks[model_id]
        if not task.cancelled() and task.exception() is not None:
            log.error("an instance did not retire", model=model_id, exc_info=task.exception())
