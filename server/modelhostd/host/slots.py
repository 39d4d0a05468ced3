"""Slots: switched from one model to another without a request refused.

Where the new model fits beside the old one it is loaded first, and requests go to the old one meanwhile.
Where it does not, requests to the slot wait until the switch is over: they would else bring the old
model back into the memory that the new one needs.
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import field
from functools import partial

from modelhostd.core import slots as rules
from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.residency import Fits
from modelhostd.core.resources import Operation, OperationKind, Phase
from modelhostd.core.state import Edit
from modelhostd.core.values import dataclass
from modelhostd.host.operations import Operations
from modelhostd.host.registry import Registry, Request
from modelhostd.host.residency import Residency


@dataclass(slots=True)
class _Gate:
    """A slot whose requests wait: how many switches hold them up, and how many of them there are."""

    switches: int = 0
    waiting: int = 0
    opened: asyncio.Event = field(default_factory=asyncio.Event)


class Slots:
    """Carries out switches, and holds up requests to a slot whose models do not fit side by side."""

    def __init__(self, registry: Registry, operations: Operations, residency: Residency) -> None:
        self._registry = registry
        self._operations = operations
        self._residency = residency
        self._shut: dict[str, _Gate] = {}

    # --- requests -------------------------------------------------------------------------------

    def shut(self, name: str) -> bool:
        """Whether requests by this name are to wait."""
        return name in self._shut

    async def opened(self, name: str) -> None:
        """Wait until requests by this name may go on. Raises QUEUE_FULL when too many wait."""
        limit = self._registry.decided.settings.queue_limit
        while (gate := self._shut.get(name)) is not None:
            if gate.waiting >= limit:
                raise ModelhostError(
                    Reason.QUEUE_FULL,
                    f"{limit} requests wait for the switch of slot '{name}' already; try again in "
                    f"a second",
                    {"model": name, "queue": "slot", "limit": str(limit)},
                    retry_delay_s=1.0,
                )
            gate.waiting += 1
            try:
                await gate.opened.wait()
            finally:
                gate.waiting -= 1

    # --- switches -------------------------------------------------------------------------------

    async def switch(
        self,
        key: str,
        model: str,
        *,
        etag: str = "",
        unload_previous: bool = False,
        principal: str = "",
        request: Request | None = None,
    ) -> Operation:
        """Return the operation that loads ``model`` and then makes the slot stand for it.

        Raises at once what ``core.slots.switched`` and a load raise.
        """
        answered = await self._registry.answered(request)
        if answered is not None:
            return self._operations.get(answered)
        rules.switched(self._registry.decided, key, model, etag, self._registry.clock.time())
        self._residency.loads.check_loadable(self._registry.decided.model(model))
        work = partial(self._switch, key, model, etag, unload_previous, principal)
        return await self._operations.start(
            OperationKind.SWITCH,
            model=model,
            join_key=f"switch:{key}:{model}:{etag}:{unload_previous}",
            principal=principal,
            request=request,
            begun=lambda o: self._operations.run(
                o.id, Phase.WAITING, partial(work, o.id), cancellable=True
            ),
        )

    async def clear(self, key: str, etag: str = "", principal: str = "") -> None:
        """Remove a slot. Raises SLOT_NOT_FOUND, ETAG_MISMATCH."""
        slot = self._registry.decided.slot(key)
        await self._registry.stage(rules.cleared(slot, etag), principal)

    async def _switch(
        self,
        key: str,
        model: str,
        etag: str,
        unload_previous: bool,
        principal: str,
        operation: str,
    ) -> Mapping[str, object]:
        slot = self._registry.decided.slots.get(key)
        previous = slot.model if slot is not None else ""
        beside = not previous or previous == model or self._fits(model)
        if not beside:
            self._shut.setdefault(key, _Gate()).switches += 1
        try:
            load = await self._residency.load(model, principal=principal)
            await self._operations.follow(load.id, operation)
            result = {"slot": key, "model": model, "previous_model": previous}
            await self._operations.settle(
                lambda: self._switched(operation, result, etag), principal
            )
        finally:
            if not beside:
                self._reopen(key)
        if unload_previous and previous not in ("", model):
            await self._unload(previous, principal)
        return result

    def _switched(self, operation: str, result: dict[str, str], etag: str) -> Sequence[Edit]:
        """Return slot and operation as they are after the switch: both change at one moment."""
        decided, now = self._registry.decided, self._registry.clock.time()
        slot = decided.slots.get(result["slot"])
        edits = rules.switched(decided, result["slot"], result["model"], etag, now)
        # Another switch may have been quicker.
        result["previous_model"] = slot.model if slot is not None else ""
        return [*edits, *self._operations.succeeded(operation, result)]

    def _fits(self, model: str) -> bool:
        """Whether the model is loaded, or can be without another one having to go."""
        route = self._residency.routes.get(model)
        if route is not None and route.open:
            return True
        plan, _ = self._residency.loads.plan(model)
        return isinstance(plan, Fits)

    def _reopen(self, key: str) -> None:
        gate = self._shut[key]
        gate.switches -= 1
        if not gate.switches:
            del self._shut[key]
            gate.opened.set()

    async def _unload(self, previous: str, principal: str) -> None:
        if previous in self._registry.decided.models:
            await self._residency.unload(previous, principal)
