"""Residency: carries out what ``core.residency`` plans, and what comes in from workers and operators.

Rule: an operation UNLOAD that SUCCEEDED means that the memory is free.
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import structlog

from modelhostd.core import operations as op_rules
from modelhostd.core import residency as rules
from modelhostd.core.errors import invalid
from modelhostd.core.lifecycle import INSTANCE, step
from modelhostd.core.resources import (
    Device,
    Event,
    Health,
    InstanceState,
    Kind,
    Operation,
    OperationKind,
    Phase,
    Tier,
)
from modelhostd.core.state import Edit
from modelhostd.host.crashes import STDERR_MAX, Crashes
from modelhostd.host.loads import Loads
from modelhostd.host.occupancy import Occupancy, changed, gone
from modelhostd.host.registry import Request
from modelhostd.host.retiring import Retiring
from modelhostd.host.routes import Route
from modelhostd.host.wanted import shutting_down
from modelhostd.ports import WorkerExit

log = structlog.get_logger(__name__)

TICK_S = 0.25


class Residency:
    """Which models are on which device, and the work that changes it."""

    def __init__(self, occupancy: Occupancy) -> None:
        self._occupancy = occupancy
        self._registry = occupancy.registry
        self._operations = occupancy.operations
        self.routes = occupancy.routes
        self._crashes = Crashes(occupancy.registry.clock)
        self._retiring = Retiring(occupancy, self._freed)
        self.drain = self._retiring.drain
        self.loads = Loads(occupancy, self._crashes, self.drain)
        self.loads.settled = self._enforce_budgets
        self._over_since: dict[str, float] = {}
        self._ticker: asyncio.Task[None] | None = None
        self._registry.subscribe(self._published)
        self._ticked = occupancy.registry.clock.monotonic()

    # --- what operators and clients ask ---------------------------------------------------------

    async def load(
        self,
        model_id: str,
        *,
        device: str = "",
        priority: int | None = None,
        principal: str = "",
        request: Request | None = None,
    ) -> Operation:
        """Return the operation that brings a model to READY, started, joined or done already."""
        answered = await self._registry.answered(request)
        if answered is not None:
            return self._operations.get(answered)
        key, done = self.loads.want(
            model_id, device=device, priority=priority, principal=principal, request=request
        )
        await done
        return self._operations.get(key)

    async def unload(
        self, model_id: str, principal: str = "", request: Request | None = None
    ) -> Operation:
        """Return the operation that takes a model off its device."""
        answered = await self._registry.answered(request)
        if answered is not None:
            return self._operations.get(answered)
        self._registry.decided.model(model_id)
        return await self._operations.start(
            OperationKind.UNLOAD,
            model=model_id,
            join_key=self._unload_key(model_id),
            principal=principal,
            request=request,
            begun=lambda o: self._operations.run(
                o.id, Phase.DRAINING, partial(self._unload, model_id)
            ),
        )

    def _unload_key(self, model_id: str) -> str:
        """Return what two unloads have in common: they end the same load and the same instance.

        One that was asked for after the next load is not done when an earlier one is.
        """
        wanted, route = self.loads.get(model_id), self.routes.get(model_id)
        load = wanted.number if wanted is not None else 0
        return f"unload:{model_id}:{load}:{route.generation if route is not None else 0}"

    async def _unload(self, model_id: str) -> Mapping[str, object]:
        return {"freed_bytes": await self.remove(model_id, "UNLOADED")}

    async def remove(self, model_id: str, reason: str) -> int:
        """Take a model off its device and wait until its memory is free; returns its bytes.

        Requests that wait for it go on waiting, and load it again.
        """
        route = self.routes.get(model_id)
        freed = self._occupancy.ledger.held(route.device, model_id) if route is not None else 0
        self.loads.cancel(model_id, stays=True)
        running = self.loads.running.task(model_id)
        if running is not None:
            await asyncio.wait({running})
        if route is not None and self.routes.get(model_id) is route:
            self.drain(route, reason, {})
            retiring = self._retiring.task(model_id)
            if retiring is not None:
                await asyncio.wait({retiring})
        self._drop_remains(model_id)
        return freed

    async def set_budget(self, device_id: str, budget_bytes: int, principal: str = "") -> Device:
        """Change a device's budget (0 = back to the default); shrinking evicts idle instances.

        Raises INVALID_ARGUMENT for a budget below 0 or above the device's memory.
        """
        device = self._registry.decided.device(device_id)
        if budget_bytes == 0:
            budget_bytes = self._occupancy.default_budget_bytes(device)
        if not 0 < budget_bytes <= device.total_bytes:
            expected = f"1 to {device.total_bytes}, or 0 for the default"
            raise invalid("device.budget_bytes", expected, budget_bytes)
        device = replace(device, budget_bytes=budget_bytes)
        edit = Edit(Kind.DEVICE, device_id, device, "BUDGET_CHANGED")
        done = self._registry.stage([edit], principal)
        self._enforce_budgets()
        self.loads.pump()
        await done
        return device

    async def unblock(self, model_id: str) -> None:
        """Forget a model's crashes, so that it may be loaded again."""
        self._registry.decided.model(model_id)
        self._crashes.forget(model_id)
        self._drop_remains(model_id)
        await self._registry.flush()

    # --- the ticker -----------------------------------------------------------------------------

    def start(self) -> None:
        """Start what ends waits, keeps keep_alive and enforces budgets."""
        self._ticker = asyncio.create_task(self._tick(), name="residency")

    async def stop(self, timeout_s: float) -> None:
        """Begin no more loads; wait up to ``timeout_s`` for what is in flight."""
        if self._ticker is not None:
            self._ticker.cancel()
        self.loads.stop()
        for model_id in self.routes.waited_for():
            self.routes.fail(model_id, shutting_down(model_id))
        await self.loads.running.wait(timeout_s)
        busy = [asyncio.ensure_future(r.idle.wait()) for r in self.routes if r.in_flight]
        if busy:
            await asyncio.wait(busy, timeout=timeout_s)
            for task in busy:
                task.cancel()

    async def close(self) -> None:
        """End what still waits for workers, which are gone by now."""
        await self._retiring.stop()

    def ticked_within(self, age_s: float) -> bool:
        """Whether the ticker ran within the last ``age_s`` seconds: for the watchdog."""
        return self._registry.clock.monotonic() - self._ticked <= age_s

    async def _tick(self) -> None:
        while True:
            await self._registry.clock.sleep(TICK_S)
            self._ticked = self._registry.clock.monotonic()
            try:
                now = self._registry.clock.monotonic()
                self.loads.expire(now)
                self._expire_idle(now)
                self._enforce_budgets()
                self.loads.pump()
            except Exception:
                # The next tick finds the same state again; ending here would end every wait.
                log.exception("residency tick failed")

    def _expire_idle(self, now: float) -> None:
        leased = {lease.model for lease in self._registry.decided.leases.values()}
        for route in self.routes:
            model = self._registry.decided.models.get(route.model)
            if model is None or model.pinned or model.id in leased or not route.open:
                continue
            keep = self._occupancy.keep_alive_s(model)
            busy = route.in_flight or self.routes.queued(route.model)
            if keep is not None and not busy and now - route.last_used >= keep:
                self.drain(route, "KEEP_ALIVE", {"idleSeconds": f"{now - route.last_used:.1f}"})

    def _enforce_budgets(self) -> None:
        now = self._registry.clock.monotonic()
        policy = self._occupancy.policy()
        for view in self._occupancy.views().values():
            if view.free_bytes >= 0:
                self._over_since.pop(view.id, None)
                continue
            lasted = now - self._over_since.setdefault(view.id, now)
            for victim in rules.over_budget(view, now, policy, busy=lasted >= rules.BUSY_GRACE_S):
                route = self.routes.get(victim.model)
                if route is not None:
                    details = {
                        "overBytes": str(-view.free_bytes),
                        "freedBytes": str(victim.bytes),
                        "policy": policy.name,
                    }
                    self.drain(route, "OVER_BUDGET", details)

    def _freed(self, model_id: str) -> None:
        """Go on where a model's memory has become free."""
        if self.routes.queued(model_id) and self.loads.get(model_id) is None:
            self.loads.want_for_queue(model_id, "inference")
        self.loads.pump()

    def _drop_remains(self, model_id: str) -> None:
        """Forget a FAILED or BLOCKED instance."""
        instance = self._registry.decided.instance_of(model_id)
        if instance is not None and instance.state in (
            InstanceState.FAILED,
            InstanceState.BLOCKED,
        ):
            self._registry.record(gone(instance, "UNLOADED"))

    def _published(self, events: Sequence[Event]) -> None:
        """Forget what was kept of deleted models: their ids may come again."""
        for event in events:
            if event.kind is Kind.MODEL and event.resource is None:
                self._crashes.forget(event.key)
                self._occupancy.measured.pop(event.key, None)
                self.routes.forget(event.key)

    # --- crashes (WorkerListener) ---------------------------------------------------------------

    def worker_ready(self, device: str, pid: int) -> None:
        """See :class:`modelhostd.ports.WorkerListener`."""
        log.info("worker ready", device=device, pid=pid)
        self.loads.pump()

    def worker_exited(self, exit: WorkerExit) -> None:
        """Take the worker's instances out of service and want them back, most recently used first."""
        log.error(
            "worker lost", device=exit.device, pid=exit.pid, exit=exit.exit, blamed=exit.blamed
        )
        self._crashes.note(exit, self._registry.decided.models.get(exit.blamed))
        lost = [
            r
            for r in self.routes
            # LOADING ends through its load, DRAINING through its unload.
            if r.open
            and r.device == exit.device
            and (r.model == exit.model if exit.model else not r.own_worker)
        ]
        for route in sorted(lost, key=lambda r: -r.last_used):
            self._lost(route, exit)
        self.loads.pump()

    def _lost(self, route: Route, exit: WorkerExit) -> None:
        self._occupancy.ledger.release(route.device, route.model)
        self.routes.remove(route)
        instance = self._registry.decided.instance_of(route.model)
        if instance is None:
            return
        details = {"exit": exit.exit, "blamed": exit.blamed, "pid": str(exit.pid)}
        if exit.blamed == route.model and exit.stderr_tail:
            # With one of them only: it may be long, and a worker may have had many models.
            details["stderr"] = exit.stderr_tail[-STDERR_MAX:]
        why = self._crashes.blocked(route.model)
        if why is None:
            self._registry.record(gone(instance, "CRASHED", details))
            self.loads.want_for_queue(route.model, "recovery", lost=route)
            return
        blocked = replace(
            instance,
            state=step(INSTANCE, instance.state, InstanceState.BLOCKED),
            tier=Tier.DISK,
            health=Health.UNHEALTHY,
            crash_count=self._crashes.count(route.model),
            error=op_rules.stored(why),
        )
        self._registry.record(changed(blocked, "BLOCKED", details))
        self.routes.fail(route.model, why)
