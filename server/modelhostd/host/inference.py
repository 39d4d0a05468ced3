"""The inference hot path: from a name and raw bytes to a worker's answer, without parsing tensors."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from modelhostd.core import stand_ins
from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.resources import Event, Kind
from modelhostd.host.arrivals import Arrivals, no_version
from modelhostd.host.figures import Figures
from modelhostd.host.registry import Registry
from modelhostd.host.residency import Residency
from modelhostd.host.routes import Route, Routes
from modelhostd.host.slots import Slots
from modelhostd.ports import InferReply, Workers


class Inference:
    """Sends requests where they are routed, or to a fallback model, once more where memory was short, and counts."""

    def __init__(
        self,
        registry: Registry,
        residency: Residency,
        workers: Workers,
        routes: Routes,
        slots: Slots,
    ) -> None:
        self._residency = residency
        self._workers = workers
        self._routes = routes
        self._clock = registry.clock
        self._arrivals = Arrivals(registry, residency.loads, routes, slots)
        self.model_for, self.ready = self._arrivals.model_for, self._arrivals.ready
        self.loaded_route = self._arrivals.loaded_route
        self.figures: dict[tuple[str, int], Figures] = {}
        self.in_flight = 0
        self.request_count = 0
        """Requests answered since the daemon started, errors included; of deleted models too."""
        self.error_count = 0
        registry.subscribe(self._published)

    @property
    def accepting(self) -> bool:
        """Whether requests are taken; false once the daemon stops."""
        return self._arrivals.accepting

    async def infer(
        self,
        name: str,
        version: str,
        payload: bytes,
        timeout_s: float | None,
        priority: int = 0,
        *,
        asked: str = "",
        repeated: bool = False,
    ) -> InferReply:
        """Send one encoded ModelInferRequest to the instance that ``name`` routes to.

        Waits in the model's bounded queue while the model is loaded on demand. Where it cannot be loaded its
        fallback model answers; ``asked`` is then the name that the request has. Where it finds too little memory
        another model makes room, and it is ``repeated`` once. Raises
        MODEL_NOT_FOUND, MODEL_NOT_LOADED, MODEL_NOT_DOWNLOADED, QUEUE_FULL, a load's error, the
        worker's error, or WORKER_LOST.
        """
        started, given_s = self._clock.monotonic(), timeout_s
        route = self._routes.get(name)
        # No await between look-up and count: a drain sees this request or closed the route before.
        if route is not None and route.open and self._arrivals.accepting:
            route.enter(self._clock)
        else:
            try:
                route = await self._arrivals.enter(name, timeout_s, version)
            except ModelhostError as error:
                if asked or not (other := stand_ins.stand_in(self.model_for(name), error)):
                    raise
                return await self._by_stand_in(
                    other, error, name, payload, self._left(timeout_s, started), priority
                )
            waited = self._clock.monotonic() - started
            self._figures(route).load_ns += int(waited * 1e9)
            timeout_s = self._left(timeout_s, started)
        self.in_flight += 1
        reply: InferReply | None = None
        try:
            if version and version != str(route.version):
                raise no_version(name, version, route.version)
            reply = await self._workers.infer(
                route.device,
                route.instance,
                route.generation,
                payload,
                timeout_s=timeout_s,
                priority=priority,
                name=asked or name,
            )
        except ModelhostError as error:
            short = error.reason is Reason.OUT_OF_DEVICE_MEMORY
            left = self._left(given_s, started) if short else None
            if not short or not await self._residency.fell_short(
                route, error, left, evict=not repeated
            ):
                route.vitals.failed(error.reason)
                self._failed(route, started)
                raise
        finally:
            self.in_flight -= 1
            route.leave()
        if reply is None:
            # Counted out before: its model may be on its way out by now, and that waits for whoever is counted in.
            left = self._left(given_s, started)
            return await self.infer(
                name, version, payload, left, priority, asked=asked, repeated=True
            )
        self._succeeded(route, reply, started)
        return reply

    async def stream(
        self, name: str, version: str, payload: bytes, timeout_s: float | None, priority: int = 0
    ) -> AsyncGenerator[tuple[bool, InferReply], None]:
        """Send a request as :meth:`infer` does, and yield its responses, each with whether its model is decoupled.

        Of a model that is not there is exactly one, and so it is of a fallback model. Leaving the iterator early cancels the request.
        """
        started = self._clock.monotonic()
        try:
            route = await self._arrivals.enter(name, timeout_s, version)
        except ModelhostError as error:
            if not (other := stand_ins.stand_in(self.model_for(name), error)):
                raise
            left = self._left(timeout_s, started)
            yield False, await self._by_stand_in(other, error, name, payload, left, priority)
            return
        waited = self._clock.monotonic() - started
        self._figures(route).load_ns += int(waited * 1e9)
        timeout_s = self._left(timeout_s, started)
        whole: InferReply | None = None
        self.in_flight += 1
        try:
            if version and version != str(route.version):
                raise no_version(name, version, route.version)
            at = route.device, route.instance, route.generation, payload
            if route.loaded is None or not route.loaded.decoupled:
                whole = await self._workers.infer(
                    *at, timeout_s=timeout_s, priority=priority, name=name
                )
                yield False, whole
            else:
                replies = self._workers.stream_infer(
                    *at, timeout_s=timeout_s, priority=priority, name=name
                )
                async with aclosing(replies):
                    async for reply in replies:
                        whole = reply if whole is None else _added(whole, reply)
                        yield True, reply
        except ModelhostError as error:
            if error.reason is Reason.OUT_OF_DEVICE_MEMORY:
                await self._residency.fell_short(route, error, None, evict=False)
            route.vitals.failed(error.reason)
            self._failed(route, started)
            raise
        finally:
            self.in_flight -= 1
            route.leave()
        if whole is not None:
            self._succeeded(route, whole, started)

    async def _by_stand_in(
        self,
        model: str,
        why: ModelhostError,
        name: str,
        payload: bytes,
        timeout_s: float | None,
        priority: int,
    ) -> InferReply:
        """Return the answer of another model, which says so; raises ``why`` where that cannot be had either."""
        try:
            reply = await self.infer(model, "", payload, timeout_s, priority, asked=name)
        except ModelhostError as error:
            if error.reason in stand_ins.NO_LOAD or error.reason is Reason.MODEL_NOT_FOUND:
                raise why from error
            raise
        return reply._replace(payload=reply.payload + stand_ins.mark(model))

    def _left(self, timeout_s: float | None, started: float) -> float | None:
        """Return what is left of a request's time."""
        if timeout_s is None:
            return None
        return max(0.0, timeout_s - (self._clock.monotonic() - started))

    def stop(self) -> None:
        """Refuse what comes from now on."""
        self._arrivals.accepting = False

    def _published(self, events: Sequence[Event]) -> None:
        """Forget the figures of deleted models."""
        for event in events:
            if event.kind is Kind.MODEL and event.resource is None:
                for key in [k for k in self.figures if k[0] == event.key]:
                    del self.figures[key]

    def _figures(self, route: Route) -> Figures:
        key = route.model, route.version
        figures = self.figures.get(key)
        if figures is None:
            figures = self.figures[key] = Figures()
        return figures

    def _failed(self, route: Route, started: float) -> None:
        self.request_count += 1
        self.error_count += 1
        route.request_count += 1
        route.error_count += 1
        passed_ns = int((self._clock.monotonic() - started) * 1e9)
        self._figures(route).failed(passed_ns)

    def _succeeded(self, route: Route, reply: InferReply, started: float) -> None:
        self.request_count += 1
        route.request_count += 1
        route.vitals.answered(reply.infer_ns, reply.item_count)
        passed_ns = int((self._clock.monotonic() - started) * 1e9)
        self._figures(route).succeeded(reply, passed_ns, int(self._clock.time() * 1000))


def _added(whole: InferReply, reply: InferReply) -> InferReply:
    """Return the figures of a stream's responses so far, with one more."""
    return whole._replace(
        payload=b"",
        infer_ns=whole.infer_ns + reply.infer_ns,
        output_ns=whole.output_ns + reply.output_ns,
    )
