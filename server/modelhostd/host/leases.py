"""Leases: acquired, renewed, released, and ended when their time is up. None outlives the daemon."""

import asyncio
import uuid
from collections.abc import Callable
from dataclasses import replace

import structlog

from modelhostd.core import leases as rules
from modelhostd.core.names import not_found
from modelhostd.core.resources import Lease
from modelhostd.host.registry import Registry, Request

log = structlog.get_logger(__name__)

TICK_S = 0.25


class Leases:
    """Every lease's deadline. ``freed`` is called when a model may have lost its last one; ``check`` with each that
    gets one, and raises where that cannot be.
    """

    def __init__(
        self, registry: Registry, freed: Callable[[], None], check: Callable[[str], None]
    ) -> None:
        self._registry = registry
        self._freed = freed
        self._check = check
        # By the monotonic clock: a wall clock that is set neither ends a lease nor keeps it.
        self._deadlines: dict[str, float] = {}
        self._ticker: asyncio.Task[None] | None = None

    def get(self, key: str) -> Lease:
        """Return a lease, or raise LEASE_NOT_FOUND."""
        lease = self._registry.decided.leases.get(key)
        if lease is None:
            raise not_found("leases", key, "it has ended; acquire a new one")
        return lease

    async def acquire(
        self, model: str, ttl_s: float | None, principal: str = "", request: Request | None = None
    ) -> Lease:
        """Forbid a model's eviction for ``ttl_s`` seconds (None = 60 s).

        Raises MODEL_NOT_FOUND, INVALID_ARGUMENT, QUEUE_FULL, REQUEST_ID_REUSED; OUT_OF_DEVICE_MEMORY for a model
        that leaves because its device is above its budget; LEASE_NOT_FOUND when the lease that this request made
        before has ended.
        """
        answered = await self._registry.answered(request)
        if answered is not None:
            return self.get(answered)
        ttl_s = rules.check_ttl(ttl_s)
        decided = self._registry.decided
        decided.model(model)
        rules.check_room(decided, model, principal)
        self._check(model)
        now = self._registry.clock.time()
        lease = Lease(str(uuid.uuid4()), model, principal, now, now + ttl_s)
        self._deadlines[lease.id] = self._registry.clock.monotonic() + ttl_s
        await self._registry.stage([rules.edit(lease, "ACQUIRED")], principal, request, lease.id)
        return lease

    async def renew(self, key: str, ttl_s: float | None, principal: str = "") -> Lease:
        """Count a lease's time anew. Raises LEASE_NOT_FOUND, INVALID_ARGUMENT."""
        ttl_s = rules.check_ttl(ttl_s)
        lease = replace(self.get(key), expire_time=self._registry.clock.time() + ttl_s)
        self._deadlines[key] = self._registry.clock.monotonic() + ttl_s
        await self._registry.stage(
            [rules.edit(lease, "RENEWED")],
            principal,
            undone=lambda: self._forget(key),
        )
        return lease

    async def release(self, key: str, principal: str = "") -> None:
        """End a lease; one that has ended stays so."""
        lease = self._registry.decided.leases.get(key)
        if lease is None:
            await self._registry.stage(())
            return
        done = self._registry.stage([rules.ended(lease, "RELEASED")], principal)
        self._freed()
        await done

    # --- time -----------------------------------------------------------------------------------

    def start(self) -> None:
        """Start ending leases whose time is up."""
        self._ticker = asyncio.create_task(self._tick(), name="leases")

    def stop(self) -> None:
        """End nothing any more: the next daemon tells of those that are left."""
        if self._ticker is not None:
            self._ticker.cancel()

    async def _tick(self) -> None:
        while True:
            await self._registry.clock.sleep(TICK_S)
            try:
                self._expire()
            except Exception:
                # The next tick finds the same leases again.
                log.exception("leases could not be ended")

    def _expire(self) -> None:
        clock = self._registry.clock
        now, time = clock.monotonic(), clock.time()
        leases = self._registry.decided.leases
        for key in self._deadlines.keys() - leases.keys():
            del self._deadlines[key]
        over = []
        for key, lease in leases.items():
            # One whose change could not be stored is as it was before, and has no deadline here.
            if self._deadlines.setdefault(key, now + lease.expire_time - time) <= now:
                over.append(lease)
        if over:
            # Recorded, not staged: that the time is up does not depend on whether it can be stored.
            self._registry.record([rules.ended(lease, "EXPIRED") for lease in over])
            self._freed()

    def _forget(self, key: str) -> None:
        self._deadlines.pop(key, None)
