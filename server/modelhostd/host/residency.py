"""Residency: carries out what ``core.residency`` plans, and what comes in from workers and operators.

Rule: an operation UNLOAD that SUCCEEDED means that the memory is free.
"""

import asyncio
from collections.abc import Mapping, Sequence
from functools import partial

import structlog

from modelhostd.core.resources import (
    Event,
    InstanceState,
    Kind,
    Operation,
    OperationKind,
    Phase,
)
from modelhostd.host.budgets import Budgets
from modelhostd.host.crashes import Crashes
from modelhostd.host.loads import Loads
from modelhostd.host.losses import Losses
from modelhostd.host.occupancy import Occupancy, gone
from modelhostd.host.registry import Request
from modelhostd.host.retiring import Retiring
from modelhostd.host.routes import Route
from modelhostd.host.shortages import Shortages
from modelhostd.host.upkeep import Upkeep
from modelhostd.host.wanted import shutting_down
from modelhostd.ports import WorkerExit

log = structlog.get_logger(__name__)


class Residency:
    """Which models are on which device, and the work that changes it."""

    def __init__(self, occupancy: Occupancy) -> None:
        self._occupancy = occupancy
        self._registry = occupancy.registry
        self._operations = occupancy.operations
        self._host = occupancy.host
        self.routes = occupancy.routes
        self._crashes = Crashes(occupancy.registry.clock)
        self._retiring = Retiring(occupancy, self._freed)
        self.drain, self.drop = self._retiring.drain, self._retiring.drop
        shortages = Shortages(occupancy, self._retiring)
        self.fell_short = shortages.fell_short
        self.loads = Loads(occupancy, self._crashes, self._retiring)
        self._losses = Losses(occupancy, self._crashes, self.loads, self._retiring)
        self._upkeep = Upkeep(occupancy, self.loads, self._retiring, shortages)
        self.ticked_within = self._upkeep.ticked_within
        self.loads.settled = self._upkeep.enforce_budgets
        self.budgets = Budgets(occupancy, self.enforce_budgets)
        self.set_budget = self.budgets.set
        self._registry.subscribe(self._published)

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
        self,
        model_id: str,
        principal: str = "",
        request: Request | None = None,
        *,
        keep_warm: bool = False,
        force: bool = False,
    ) -> Operation:
        """Return the operation that takes a model off its device and out of host memory.

        With ``keep_warm`` its weights stay in host memory where there is room; with ``force`` the requests in
        flight are cancelled instead of waited for.
        """
        answered = await self._registry.answered(request)
        if answered is not None:
            return self._operations.get(answered)
        self._registry.decided.model(model_id)
        work = partial(self._unload, model_id, keep_warm, force)
        return await self._operations.start(
            OperationKind.UNLOAD,
            model=model_id,
            join_key=self._unload_key(model_id, keep_warm, force),
            principal=principal,
            request=request,
            begun=lambda o: self._operations.run(o.id, Phase.DRAINING, work),
        )

    def _unload_key(self, model_id: str, keep_warm: bool, force: bool) -> str:
        """Return what two unloads have in common: they end the same load and the same instance, alike.

        One that was asked for after the next load is not done when an earlier one is.
        """
        wanted, instance = self.loads.get(model_id), self._held(model_id)
        load = wanted.number if wanted is not None else 0
        generation = instance.generation if instance is not None else 0
        return f"unload:{model_id}:{load}:{generation}:{keep_warm}:{force}"

    def _held(self, model_id: str) -> Route | None:
        """Return the way to what the model holds of a device or of host memory."""
        return self.routes.get(model_id) or self._host.warm.get(model_id)

    async def _unload(self, model_id: str, keep_warm: bool, force: bool) -> Mapping[str, object]:
        before = self._host.held_bytes(model_id)
        freed = await self.remove(model_id, "UNLOADED", keep_warm=keep_warm, force=force)
        warm = model_id in self._host.warm
        return {
            "freed_bytes": freed,
            "freed_host_bytes": max(0, before - self._host.held_bytes(model_id)),
            "warm": warm,
        }

    async def remove(
        self, model_id: str, reason: str, *, keep_warm: bool = False, force: bool = False
    ) -> int:
        """Take a model off its device, and out of host memory, and wait until that is free; returns the
        device's bytes.

        Requests that wait for it go on waiting, and load it again.
        """
        held = self._held(model_id)
        freed = self._occupancy.ledger.held(held.device, model_id) if held is not None else 0
        if held is not None and not keep_warm:
            # A swap-in that is stopped, or a drain, then leaves nothing behind.
            held.keep = False
        self.loads.cancel(model_id, stays=True)
        running = self.loads.running.task(model_id)
        if running is not None:
            await asyncio.wait({running})
        if held is not None and self._held(model_id) is held:
            if held.open:
                keep = keep_warm and self._host.keeps(held)
                self._retiring.drain(held, reason, {}, keep=keep)
            elif not keep_warm:
                self._retiring.drop(model_id, reason, {})
            if force:
                self._retiring.hurry(held)
            retiring = self._retiring.task(model_id)
            if retiring is not None:
                await asyncio.wait({retiring})
        self._drop_remains(model_id)
        return freed

    def enforce_budgets(self) -> None:
        """Act at once on a budget that has changed."""
        self._upkeep.enforce_budgets()
        self.loads.pump()

    async def unblock(self, model_id: str) -> None:
        """Forget a model's crashes, so that it may be loaded again."""
        self._registry.decided.model(model_id)
        self._crashes.forget(model_id)
        self._occupancy.learned.failed.pop(model_id, None)
        self._drop_remains(model_id)
        await self._registry.flush()

    # --- starting and stopping ------------------------------------------------------------------

    def start(self) -> None:
        """Start what ends waits, keeps keep_alive and enforces budgets."""
        self._upkeep.start()

    async def stop(self, timeout_s: float) -> None:
        """Begin no more loads; wait up to ``timeout_s`` for what is in flight."""
        self._upkeep.stop()
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
                self._occupancy.learned.forget(event.key)
                self._occupancy.text_memories.forget(event.key)
                self.routes.forget(event.key)

    # --- WorkerListener -------------------------------------------------------------------------

    def worker_ready(self, device: str, pid: int) -> None:
        """See :class:`modelhostd.ports.WorkerListener`."""
        log.info("worker ready", device=device, pid=pid)
        self.loads.pump()

    def worker_exited(self, exit: WorkerExit) -> None:
        """See :class:`modelhostd.ports.WorkerListener`."""
        self._losses.worker_exited(exit)
