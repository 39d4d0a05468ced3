"""Requests that arrive: from the name that they ask for to the route that counts them in.

One whose model is not there waits in the model's bounded queue, and has it loaded on demand.
"""

import asyncio

from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.names import shown
from modelhostd.core.resources import Health, InstanceState, Model
from modelhostd.host.loads import Loads
from modelhostd.host.registry import Registry
from modelhostd.host.routes import Route, Routes
from modelhostd.host.slots import Slots


class Arrivals:
    """Knows which model a name stands for, whether it would answer now, and the way to it."""

    def __init__(self, registry: Registry, loads: Loads, routes: Routes, slots: Slots) -> None:
        self._registry = registry
        self._loads = loads
        self._routes = routes
        self._slots = slots
        self._clock = registry.clock
        self.accepting = True
        """Whether requests are taken; false once the daemon stops."""

    def model_for(self, name: str) -> Model:
        """Return the model that a name (an id or a slot) stands for.

        Raises MODEL_NOT_FOUND in the words that clients of the protocol look for.
        """
        committed = self._registry.committed
        slot = committed.slots.get(name)
        model = committed.models.get(slot.model if slot is not None else name)
        if model is None:
            # Clients look for the quotes.
            raise ModelhostError(
                Reason.MODEL_NOT_FOUND,
                f"Request for unknown model: '{shown(name)}' is not found",
                {"model": shown(name)},
            )
        return model

    def ready(self, name: str, version: str = "", *, stand_in: bool = False) -> bool:
        """Whether a request would be served now: READY and not UNHEALTHY, or on disk and loaded on demand, or its
        fallback model is.

        ``stand_in``: it is asked of a fallback model.
        """
        model = self.model_for(name)
        route = self._routes.get(model.id)
        instance = self._registry.decided.instance_of(model.id)
        if route is not None and route.open:
            sick = instance is not None and instance.health is Health.UNHEALTHY
            return not sick and (not version or version == str(route.version))
        have = model.available
        if not self.accepting or have is None or not self._on_demand(model):
            return False
        no_use = (InstanceState.BLOCKED, InstanceState.FAILED)
        failed = instance is not None and instance.state in no_use
        if failed or not self._loads.is_worth(model):
            other = self._registry.committed.models.get(model.config.fallback_model)
            # One that does not load has no stand-in of its own here.
            return other is not None and not stand_in and self.ready(other.id, stand_in=True)
        return not version or version == str(have.version)

    async def loaded_route(self, name: str, timeout_s: float | None) -> Route:
        """Return the open route of a model, loading it on demand as a request would."""
        model = self.model_for(name)
        route = self._routes.get(model.id)
        if route is not None and route.open:
            return route
        route = await self.enter(name, timeout_s)
        route.leave()
        return route

    async def enter(self, name: str, timeout_s: float | None, version: str = "") -> Route:
        """Return the model's route once it is open, with this request counted in it.

        Raises as :meth:`Inference.infer` does, and DEADLINE_EXCEEDED.
        """
        try:
            async with asyncio.timeout(timeout_s):
                if self._slots.shut(name):
                    await self._slots.opened(name)
                model = self.model_for(name)
                route = self._routes.get(model.id)
                if route is not None and route.open and self.accepting:
                    route.enter(self._clock)
                    return route
                return await self._join(model, name, version)
        except TimeoutError:
            raise ModelhostError(
                Reason.DEADLINE_EXCEEDED,
                f"model '{name}' was not ready within the request's deadline of {timeout_s:g} s",
                {"method": "ModelInfer"},
            ) from None

    async def _join(self, model: Model, name: str, version: str) -> Route:
        if not self.accepting:
            raise ModelhostError(
                Reason.SHUTTING_DOWN,
                "GRPC server is shutting down and has stopped accepting new requests.",
                retry_delay_s=2.0,
            )
        loads = self._loads
        coming = loads.get(model.id) is not None
        if not coming:
            loads.check_loadable(model)
            if not self._on_demand(model):
                raise _not_loaded(model)
            have = model.available
            if version and have is not None and version != str(have.version):
                # Before it evicts others for nothing.
                raise no_version(name, version, have.version)
            loads.check_worth(model)
        limit = model.config.queue_limit or self._registry.decided.settings.queue_limit
        waiter = self._routes.join(model.id, limit)
        if not coming:
            try:
                loads.want(model.id, principal="inference", on_demand=True)
            except ModelhostError:
                waiter.cancel()
                raise
        elif self._routes.queued(model.id) == 1:
            # The load may have stood still because nobody waited for it.
            loads.pump()
        try:
            return await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled() and waiter.exception() is None:
                waiter.result().leave()
            raise

    def _on_demand(self, model: Model) -> bool:
        own = model.config.load_on_demand
        return own if own is not None else self._registry.decided.settings.load_on_demand


def no_version(name: str, asked: str, have: int) -> ModelhostError:
    """Return MODEL_NOT_FOUND: the model has another version than the one that was asked for."""
    return ModelhostError(
        Reason.MODEL_NOT_FOUND,
        f"Request for unknown model: '{name}' version {shown(asked)} is not found; version {have} is "
        f"served (an empty version takes it)",
        {"model": name},
    )


def _not_loaded(model: Model) -> ModelhostError:
    return ModelhostError(
        Reason.MODEL_NOT_LOADED,
        f"Request for unknown model: '{model.id}' has no available versions: it is not loaded and "
        f"load_on_demand is off; load it first (LoadModel, `modelhost load`)",
        {"model": model.id, "state": model.state.value},
    )
