"""Space on disk as the settings want it: artifacts that leave by themselves, to make room or past their time.

Rules:
1. What goes is decided in ``core.storage``, on the state of this moment, and staged in the same step.
2. One clearance at a time: the next one sees what the one before has freed.
3. A clearance that has begun is carried to its end, whoever asked for it goes away meanwhile.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TypeVar

import structlog

from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.registry import model_edit
from modelhostd.core.resources import Event, Kind, Model
from modelhostd.core.state import Edit
from modelhostd.core.storage import (
    Clearance,
    StoredArtifact,
    clearance,
    kept_by,
    stored_artifacts,
    without_artifact,
)
from modelhostd.host.departures import Departures
from modelhostd.host.registry import Registry
from modelhostd.host.routes import Routes
from modelhostd.host.uses import Uses
from modelhostd.ports import Files, Holdings, Room

log = structlog.get_logger(__name__)

CLEARANCES_MAX = 3
"""How often room is made for one piece of work before it is refused: what is freed may go to another one."""
KEPT_TOLD_MAX = 20
STOP_S = 5.0

T = TypeVar("T")


class Space:
    """Makes room by the storage policy, and keeps files within their budget and their time."""

    def __init__(
        self,
        registry: Registry,
        routes: Routes,
        files: Files,
        uses: Uses,
        departures: Departures,
    ) -> None:
        self._registry = registry
        self._routes = routes
        self._files = files
        self._uses = uses
        self._departures = departures
        self._one = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        registry.subscribe(self._published)

    def _published(self, events: Sequence[Event]) -> None:
        if any(event.kind is Kind.SETTINGS for event in events):
            self.settings_changed()

    def settings_changed(self) -> None:
        """Act on the budget from now on."""
        self._files.limit_bytes(self._registry.committed.settings.disk_budget_bytes)

    @property
    def clears(self) -> bool:
        """Whether anything leaves by itself."""
        return self._registry.decided.settings.storage_policy != "off"

    async def with_room(
        self, work: Callable[[], Awaitable[T]], model: str, missing: Callable[[], int]
    ) -> T:
        """Do ``work``; where it finds no room, have it made as the policy says, and do it again.

        ``model`` is whose files it brings; ``missing`` tells their bytes where a refusal does not. Raises
        INSUFFICIENT_DISK_SPACE with what is needed.
        """
        clearances = 0
        while True:
            try:
                return await work()
            except ModelhostError as error:
                if error.reason is not Reason.INSUFFICIENT_DISK_SPACE:
                    raise
                needed = error.metadata.get("neededBytes") or str(max(1, missing()))
                clearances += 1
                made = (
                    self.clears
                    and clearances <= CLEARANCES_MAX
                    and await self.make_room(int(needed), model)
                )
                if not made:
                    told = {"freeBytes": "0", **error.metadata, "neededBytes": needed}
                    raise ModelhostError(error.reason, error.message, told) from error

    async def could_make_room(self, needed_bytes: int, model: str) -> bool:
        """Tell whether room for a model's files would be made, without making any."""
        room, holdings = await self._files.room(), await self._files.holdings()
        found, _, missing = self._found(room, holdings, needed_bytes, model)
        return found.freed_bytes >= missing

    async def make_room(self, needed_bytes: int, cause: str) -> bool:
        """Return whether a download may take so many bytes, once the policy has done what it may.

        ``cause`` is told in the events of what goes for it. Raises STORAGE_ERROR.
        """
        if needed_bytes <= (await self._files.room()).available_bytes:
            return True
        if not self.clears:
            return False
        await self._carried_out(needed_bytes, cause)
        return needed_bytes <= (await self._files.room()).available_bytes

    async def enforce(self) -> None:
        """Take away what is past its time, or beyond the budget. Raises STORAGE_ERROR."""
        settings = self._registry.decided.settings
        if settings.storage_policy == "ttl":
            await self._carried_out(0, "TTL")
        elif settings.storage_policy == "off" or not settings.disk_budget_bytes:
            return
        elif (await self._files.room()).over_bytes:
            await self._carried_out(0, "OVER_BUDGET")

    async def stop(self) -> None:
        """Let what has begun come to its end; the next start takes away what is left of it."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=STOP_S)
        for task in self._tasks:
            task.cancel()

    def kept_by(self) -> Mapping[str, str]:
        """Return the models whose files may not go by themselves now, and why in one word."""
        kept = dict(kept_by(self._registry.decided))
        # An instance that is on its way, or requests that will bring one.
        kept |= dict.fromkeys(self._routes.waited_for(), "LOADED")
        kept |= {route.model: "LOADED" for route in self._routes}
        return kept

    async def _carried_out(self, needed_bytes: int, cause: str) -> None:
        task = asyncio.create_task(self._clear(needed_bytes, cause), name="clear disk")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        await asyncio.shield(task)

    async def _clear(self, needed_bytes: int, cause: str) -> None:
        async with self._one:
            room, holdings = await self._files.room(), await self._files.holdings()
            # From here to the staging nothing waits: what is decided holds.
            found, stored, missing = self._found(room, holdings, needed_bytes)
            if not found.victims:
                return
            decided = self._registry.decided
            details = {
                "policy": decided.settings.storage_policy,
                "cause": cause,
                "neededBytes": str(missing),
                "kept": _told(stored),
            }
            with self._departures.leaving(v.model for v in found.victims):
                await self._registry.stage(_edits(decided.models, found, details))
                for victim in found.victims:
                    await self._delete(victim)

    def _found(
        self, room: Room, holdings: Holdings, needed_bytes: int, busy: str = ""
    ) -> tuple[Clearance, Sequence[StoredArtifact], int]:
        """Return what would go, all that is stored, and the bytes that are missing; ``busy`` stays."""
        decided, settings = self._registry.decided, self._registry.decided.settings
        missing = max(needed_bytes - room.available_bytes, 0) + room.over_bytes
        kept = {busy: "BUSY", **self.kept_by()}
        stored = stored_artifacts(decided, holdings.artifacts, self._uses.last(), kept)
        found = clearance(
            stored,
            holdings.held,
            settings.storage_policy,
            needed_bytes=missing,
            now=self._registry.clock.time(),
            ttl_s=settings.storage_ttl_s,
        )
        return found, stored, missing

    async def _delete(self, victim: StoredArtifact) -> None:
        try:
            freed = await self._files.delete_artifact(victim.model, victim.version)
            log.info("left the disk", model=victim.model, version=victim.version, freed_bytes=freed)
        except ModelhostError as error:
            # Its row is gone all the same; CheckStorage and the next start find the files.
            log.error("files could not be deleted", model=victim.model, message=error.message)


def _edits(
    models: Mapping[str, Model], found: Clearance, details: Mapping[str, str]
) -> Sequence[Edit]:
    """Return an edit, and so an event, for each artifact that goes."""
    changed: dict[str, Model] = {}
    edits = []
    for victim, freed in zip(found.victims, found.freed, strict=True):
        model = without_artifact(changed.get(victim.model, models[victim.model]), victim.version)
        changed[victim.model] = model
        told = {"version": str(victim.version), "freedBytes": str(freed), **details}
        edits.append(model_edit(model, "EVICTED_FROM_DISK", **told))
    return edits


def _told(stored: Sequence[StoredArtifact]) -> str:
    """Return what was kept and why, for people: ``a=LOADED b=PINNED``."""
    kept = sorted({f"{a.model}={a.kept_by}" for a in stored if a.kept_by})
    more = len(kept) - KEPT_TOLD_MAX
    return " ".join([*kept[:KEPT_TOLD_MAX], *([f"and {more} more"] if more > 0 else [])])
