"""Copies in host memory that have to go: of models on no device, which are gone with them, and of those on one.

Rules:
1. A model on a device answers on while its copy goes, and leaves the device for disk from that decision on.
2. The copy's bytes are released when its worker says that they are free, or when that is reaped.
"""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import structlog

from modelhostd.core.host_tier import HOST
from modelhostd.core.resources import Tier
from modelhostd.host.occupancy import Occupancy, changed
from modelhostd.host.routes import Route

log = structlog.get_logger(__name__)


class Copies:
    """Drops copies beside devices. ``freed`` is called with each model whose copy is gone."""

    def __init__(self, occupancy: Occupancy, freed: Callable[[str], None]) -> None:
        self._occupancy = occupancy
        self._freed = freed
        self._tasks: set[asyncio.Task[None]] = set()

    def drop(self, route: Route, reason: str, details: Mapping[str, str]) -> None:
        """Give up the copy of a model that is on its device; nothing where it goes already."""
        if not route.open or route.given_up:
            return
        route.copy_goes = route.given_up = True
        work = self._drop(route, reason, {**details, "tierAfter": Tier.DEVICE.value})
        task = asyncio.create_task(work, name=f"drop the copy of {route.model}")
        self._tasks.add(task)
        task.add_done_callback(partial(self._dropped, route))

    async def stop(self) -> None:
        """End what is under way: the memory goes with its worker."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def _drop(self, route: Route, reason: str, details: Mapping[str, str]) -> None:
        occupancy, model = self._occupancy, route.model
        if not route.given_up:
            route.copy_goes = False
            return  # Its worker went before it was told, and left the copy: that is WARM now.
        try:
            left = await occupancy.workers.drop_copy(route.device, route.instance, route.generation)
        finally:
            route.copy_goes = False
        instance = occupancy.registry.decided.instance_of(model)
        if occupancy.routes.get(model) is not route or instance is None:
            return  # It left its device meanwhile, with all that it held, or its worker did.
        freed = occupancy.ledger.held(HOST, model) - left
        if left:
            log.warning("a copy could not go: something holds views of it", model=model, bytes=left)
        occupancy.ledger.hold(HOST, model, left)
        details = {**details, "freedBytes": str(freed)}
        occupancy.registry.record(changed(replace(instance, host_bytes=left), reason, details))

    def _dropped(self, route: Route, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        if task.cancelled():
            return
        if task.exception() is not None:
            # Not tried again: the port promises otherwise. What it holds goes with its instance.
            log.error("a copy did not go", model=route.model, exc_info=task.exception())
        self._freed(route.model)
