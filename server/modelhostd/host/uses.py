"""When models were last used, kept over restarts, and how often what was needed was on disk.

A use is a request or a load. It is known in memory; once a minute and at the end all of them are stored, in
one file: a row or an event for each request, or each minute, would cost more than it tells.
"""

from collections.abc import Mapping, Sequence

from modelhostd.core.resources import (
    Event,
    Instance,
    InstanceState,
    Kind,
    Operation,
    OperationKind,
    OperationState,
    Tier,
)
from modelhostd.host.registry import Registry
from modelhostd.host.routes import Routes
from modelhostd.ports import Files


class Uses:
    """The last use of each model, and the tallies of the disk as a cache."""

    def __init__(self, registry: Registry, routes: Routes, files: Files) -> None:
        self._registry = registry
        self._routes = routes
        self._files = files
        self._known: dict[str, float] = {}
        self._stored: Mapping[str, float] = {}
        self.hit_count = 0
        """Loads, and downloads that had nothing to fetch, since the daemon started."""
        self.miss_count = 0
        """Downloads that had something to fetch."""
        self.fetched_bytes = 0
        registry.subscribe(self._published)

    async def open(self) -> None:
        """Take up what the last run stored."""
        self._stored = dict(await self._files.read_uses())
        self._known = {**self._stored, **self._known}

    def last(self) -> Mapping[str, float]:
        """Return when each model was last used; those that never were are not there."""
        self._collect()
        return dict(self._known)

    async def store(self) -> None:
        """Store what is not stored yet. Raises the disk's reasons."""
        self._collect()
        uses = {m: t for m, t in self._known.items() if m in self._registry.committed.models}
        if uses != self._stored:
            await self._files.write_uses(uses)
            self._stored = uses

    def _collect(self) -> None:
        asked = dict(self._routes.last_used_time)
        asked.update((r.model, r.last_used_time) for r in self._routes if r.last_used_time)
        for model, time in asked.items():
            self._note(model, time)

    def _note(self, model: str, time: float) -> None:
        self._known[model] = max(time, self._known.get(model, 0.0))

    def _published(self, events: Sequence[Event]) -> None:
        for event in events:
            found = event.resource
            if isinstance(found, Instance):
                if event.reason == "READY" and found.state is InstanceState.READY:
                    self._note(found.model, event.time)
                    # What comes back from host memory reads no file.
                    self.hit_count += event.details.get("sourceTier") != Tier.HOST.value
            elif isinstance(found, Operation):
                self._count(found)
            elif event.kind is Kind.MODEL and found is None:
                self._known.pop(event.key, None)

    def _count(self, operation: Operation) -> None:
        ended_well = operation.state is OperationState.SUCCEEDED
        if not ended_well or operation.kind is not OperationKind.DOWNLOAD:
            return
        result = operation.result
        fetched = int(result.get("size_bytes", 0)) - int(result.get("reused_bytes", 0))
        if fetched > 0:
            self.miss_count += 1
            self.fetched_bytes += fetched
        else:
            self.hit_count += 1
