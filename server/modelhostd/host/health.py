"""Health of instances: canaries on a schedule, requests judged, sick instances reloaded.

Rules:
1. A canary is no use of a model: it moves neither last use nor keep_alive, and keeps nobody from evicting it.
2. Only a change of health is an event. Its details say why.
3. An instance that is UNHEALTHY is reloaded from disk, at most ``RELOADS_MAX`` times in ``RELOAD_WINDOW_S``
   for one model; from then on it is left as it is, and says so.
"""

import asyncio
import random
from collections.abc import Sequence
from dataclasses import field, replace

import structlog

from modelhostd.core import health as rules
from modelhostd.core.errors import ModelhostError
from modelhostd.core.residency import Refuse
from modelhostd.core.resources import Event, Health, Instance, Kind
from modelhostd.core.values import dataclass
from modelhostd.host.occupancy import Occupancy, changed
from modelhostd.host.residency import Residency
from modelhostd.host.routes import Route

log = structlog.get_logger(__name__)

LOOK_S = 1.0
JITTER = 0.2
CHEAP_S = 0.02
"""A canary that takes no longer than this is sent to a busy instance as well."""
PATIENCE_S = 5.0
"""A bad answer that came later than this, with requests in flight meanwhile, says nothing."""
CANARIES_MAX = 4
"""Canaries of the schedule under way at a time."""


@dataclass(slots=True, eq=False)
class _Patient:
    """One instance that is watched."""

    route: Route
    due: float
    record: rules.Record = field(default_factory=rules.Record)
    told: bool = False
    """Whether its bad health was dealt with."""


class HealthWatch:
    """Looks at every instance each second. ``interval_s`` between its canaries, 0 = none by themselves."""

    def __init__(self, occupancy: Occupancy, residency: Residency, interval_s: float) -> None:
        self._occupancy = occupancy
        self._registry = occupancy.registry
        self._residency = residency
        self._interval_s = interval_s
        self._clock = occupancy.registry.clock
        self._patients: dict[str, _Patient] = {}
        self._reloads: dict[str, tuple[float, ...]] = {}
        self._canaries: set[asyncio.Task[None]] = set()
        self._looker: asyncio.Task[None] | None = None
        self._registry.subscribe(self._published)

    def start(self) -> None:
        """Begin to look."""
        self._looker = asyncio.create_task(self._look_for_ever(), name="health")

    async def stop(self) -> None:
        """Look no more."""
        tasks = [*self._canaries, *([self._looker] if self._looker is not None else [])]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def check(self, model_id: str) -> tuple[Health, str]:
        """Send a canary to a READY instance now and return its health; another one keeps what it had."""
        instance = self._registry.decided.instance_of(model_id)
        route = self._occupancy.routes.get(model_id)
        if instance is None or route is None or not route.open:
            return (instance.health if instance else Health.UNKNOWN), "not loaded"
        health, why = await self._canary(self._patient(route))
        patient = self._patients.get(model_id)
        if patient is None or patient.route is not route:
            return health, why  # it has gone meanwhile
        verdict = patient.record.verdict
        return verdict if verdict[0] is not Health.HEALTHY else (health, why)

    # --- looking --------------------------------------------------------------------------------

    async def _look_for_ever(self) -> None:
        while True:
            await self._clock.sleep(LOOK_S)
            try:
                self._look()
            except Exception:
                # The next look finds the same instances; ending here would leave all unwatched.
                log.exception("looking at health failed")

    def _look(self) -> None:
        now = self._clock.monotonic()
        for route in self._occupancy.routes:
            if not route.open:
                continue
            patient = self._patient(route)
            if route.vitals.count >= rules.WINDOW_MIN:
                vitals, route.vitals = route.vitals, rules.Vitals()
                patient.record = patient.record.after_requests(vitals)
                self._tell(patient)
            if self._interval_s and now >= patient.due and len(self._canaries) < CANARIES_MAX:
                self._send(patient, now)
            if patient.record.verdict[0] is Health.UNHEALTHY and not patient.told:
                self._treat(patient, now)

    def _patient(self, route: Route) -> _Patient:
        patient = self._patients.get(route.model)
        if patient is None or patient.route is not route:
            patient = _Patient(route, self._clock.monotonic() + self._pause_s())
            self._patients[route.model] = patient
        return patient

    def _pause_s(self) -> float:
        return self._interval_s * random.uniform(1.0 - JITTER, 1.0 + JITTER)  # noqa: S311 - jitter

    def _send(self, patient: _Patient, now: float) -> None:
        route, usual = patient.route, patient.record.canary_s
        if route.in_flight and (usual is None or usual > CHEAP_S):
            return  # looked at again in a second; meanwhile its requests tell
        patient.due = now + self._pause_s()
        task = asyncio.create_task(self._scheduled(patient), name=f"canary {route.model}")
        self._canaries.add(task)
        task.add_done_callback(self._canaries.discard)

    async def _scheduled(self, patient: _Patient) -> None:
        try:
            await self._canary(patient)
        except Exception:
            log.exception("a canary failed unexpectedly", model=patient.route.model)

    async def _canary(self, patient: _Patient) -> tuple[Health, str]:
        route, before, answered = (
            patient.route,
            self._clock.monotonic(),
            patient.route.request_count,
        )
        busy = route.in_flight > 0
        health, why = await self._occupancy.workers.check(
            route.device, route.instance, route.generation
        )
        took_s = self._clock.monotonic() - before
        alone = not (busy or route.in_flight or route.request_count != answered)
        if health is Health.UNHEALTHY and took_s >= PATIENCE_S and not alone:
            # It may have stood behind a long request all that time. A hang is found by other means.
            health, why = Health.UNKNOWN, f"{why} Requests were in flight."
        if route.open:
            patient.record = patient.record.after_canary(
                health, why, took_s if alone else None, requests=route.vitals.count > 0
            )
            self._tell(patient)
        return health, why

    def _tell(self, patient: _Patient) -> None:
        """Put an instance's health on record where it has changed."""
        health, why = patient.record.verdict
        instance = self._instance(patient.route)
        if health is not Health.UNHEALTHY:
            patient.told = False
        if instance is not None and instance.health is not health:
            checked = replace(
                instance, health=health, health_message=why, health_time=self._clock.time()
            )
            self._registry.record(changed(checked, "HEALTH", {"why": why}))

    def _instance(self, route: Route) -> Instance | None:
        instance = self._registry.decided.instance_of(route.model)
        same = instance is not None and instance.generation == route.generation
        return instance if same else None

    # --- what is done about it ------------------------------------------------------------------

    def _treat(self, patient: _Patient, now: float) -> None:
        """Reload an UNHEALTHY instance, or say why it is left as it is."""
        patient.told = True
        route, why = patient.route, patient.record.verdict[1]
        before = [t for t in self._reloads.get(route.model, ()) if now - t <= rules.RELOAD_WINDOW_S]
        details = {
            "why": why,
            "reloads": f"{len(before)} of {rules.RELOADS_MAX}",
            "windowSeconds": f"{rules.RELOAD_WINDOW_S:g}",
        }
        hindered = self._hindered(route, before, now)
        if hindered:
            instance = self._instance(route)
            if instance is not None:
                left = replace(instance, health_message=f"{why} {hindered}".strip())
                self._registry.record(
                    changed(left, "LEFT_UNHEALTHY", {**details, "left": hindered})
                )
            return
        self._reloads[route.model] = (*before, now)
        log.warning("an unhealthy instance is reloaded", model=route.model, why=why)
        self._residency.drain(route, "UNHEALTHY", details)
        self._residency.loads.want_for_queue(route.model, "health", lost=route)

    def _hindered(self, route: Route, before: Sequence[float], now: float) -> str:
        """Return why an instance is not reloaded; empty = nothing is in the way."""
        if not rules.may_reload(before, now):
            times = f"{rules.RELOADS_MAX} times in {rules.RELOAD_WINDOW_S:g} s"
            return f"It was reloaded {times} already; see the daemon's log, then ReloadModel."
        try:
            plan, _ = self._residency.loads.plan_model(self._registry.decided.model(route.model))
        except ModelhostError as error:
            return f"It cannot be loaded anew: {error.message}"
        return f"It cannot be loaded anew: {plan.error.message}" if isinstance(plan, Refuse) else ""

    def _published(self, events: Sequence[Event]) -> None:
        """Forget deleted models, and instances that are gone."""
        for event in events:
            if event.resource is None and event.kind is Kind.MODEL:
                self._reloads.pop(event.key, None)
                self._patients.pop(event.key, None)
