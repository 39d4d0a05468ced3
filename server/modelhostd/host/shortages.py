"""Requests that find too little memory on their device: another model makes room, and theirs is planned with more.

What is kept for them then is given back by halves where none lacks any more (``core/estimates.py``).
"""

import asyncio
from dataclasses import replace

from modelhostd.core.errors import ModelhostError
from modelhostd.core.estimates import missing_bytes
from modelhostd.core.residency import retry_delay_s
from modelhostd.host.occupancy import Occupancy, changed
from modelhostd.host.retiring import Retiring
from modelhostd.host.routes import Route


class Shortages:
    """Learns from requests what their models lack. ``retiring`` takes others out of service for them."""

    def __init__(self, occupancy: Occupancy, retiring: Retiring) -> None:
        self._occupancy = occupancy
        self._registry = occupancy.registry
        self._routes = occupancy.routes
        self._retiring = retiring
        self._going: dict[str, asyncio.Task[None]] = {}
        """What frees the memory of whoever makes room, by the model that it is for."""

    async def fell_short(
        self, route: Route, error: ModelhostError, timeout_s: float | None, *, evict: bool
    ) -> bool:
        """Take note of a request that found too little memory beside its model; with ``evict`` the next to go leaves the
        device for it. Return whether anybody did. ``error`` says from then on when to repeat it, where that may help.

        From then on more is reserved for the model: now as far as that is free, and by the plan of its next load.
        """
        model = self._registry.decided.models.get(route.model)
        if model is None or not route.open:
            return False
        ledger, learned = self._occupancy.ledger, self._occupancy.learned
        held = ledger.held(route.device, route.model)
        at = route.version, route.device
        missing = missing_bytes(error.metadata)
        weights = route.loaded.measured_bytes if route.loaded is not None else held
        wanted = learned.request_fell_short(model, *at, weights, held, missing)
        # One that could not be had on an empty device is no reason that anybody leaves.
        view = self._occupancy.views()[route.device]
        possible = held + missing <= view.capacity_bytes
        if possible:
            error.retry_delay_s = retry_delay_s(route.model, view)
        gone = evict and possible and await self._make_room(route, timeout_s)
        instance = self._registry.decided.instance_of(route.model)
        if self._routes.get(route.model) is not route or instance is None:
            return gone
        # Another such request may have ended meanwhile.
        held = ledger.held(route.device, route.model)
        more = min(wanted - held, self._occupancy.views()[route.device].free_bytes)
        if more > 0:
            ledger.hold(route.device, route.model, held + more)
            working = instance.working_bytes + more
            details = {"workingBytes": str(working), "cause": error.reason.value}
            edits = changed(replace(instance, working_bytes=working), "FELL_SHORT", details)
            self._registry.record(edits)
        return gone

    def ease(self) -> None:
        """Give back what is kept for requests that lacked memory once, where they have not for long."""
        decided, learned = self._registry.decided, self._occupancy.learned
        for model_id in list(learned.working):
            model, route = decided.models.get(model_id), self._routes.get(model_id)
            if model is None:
                continue
            if route is not None and route.open:
                self._give_back(route, learned.kept_bytes(model))
            if not learned.lacked_bytes(model):
                del learned.working[model_id]

    def _give_back(self, route: Route, kept: int) -> None:
        """Have no more than ``kept`` bytes reserved beside the weights of a model."""
        instance = self._registry.decided.instance_of(route.model)
        less = instance.working_bytes - kept if instance is not None else 0
        if instance is not None and less > 0:
            held = self._occupancy.ledger.held(route.device, route.model)
            self._occupancy.ledger.hold(route.device, route.model, held - less)
            details = {"workingBytes": str(kept), "freedBytes": str(less)}
            edits = changed(replace(instance, working_bytes=kept), "EASED", details)
            self._registry.record(edits)

    async def _make_room(self, route: Route, timeout_s: float | None) -> bool:
        """Evict who is next to go from a device where a request found too little memory; whether anybody went.

        Requests of one model that fall short together wait for the same one to go: each would take another away for one
        and the same peak, and what they lacked is reserved once, too.
        """
        if (going := self._going.get(route.model)) is not None:
            await asyncio.wait({going}, timeout=timeout_s)
            return True
        now, policy = self._registry.clock.monotonic(), self._occupancy.policy()
        view = self._occupancy.views()[route.device]
        for holding in policy.order(view.holdings, now):
            other = self._routes.get(holding.model)
            if other is None or other is route or not holding.idle or not holding.bytes:
                continue
            if policy.young(holding, now):
                continue
            details = {
                "for": route.model,
                "freedBytes": str(holding.bytes),
                "policy": policy.name,
                "kept": policy.kept(view.holdings, {holding.model}, now),
            }
            self._retiring.evict(other, "EVICTED", details)
            retiring = self._retiring.task(holding.model)
            if retiring is not None:
                self._going[route.model] = retiring
                retiring.add_done_callback(lambda _: self._going.pop(route.model))
                await asyncio.wait({retiring}, timeout=timeout_s)
            return True
        return False
