"""What happened so far, counted from events: evictions, loads, downloads.

Counts rise only, for as long as their model exists; what concerns a model that the registry does not know
(any more) is counted under one name, so that making and deleting models does not make labels for ever.
"""

from collections import Counter
from collections.abc import Iterable, Sequence

from modelhostd.core.histogram import Histogram
from modelhostd.core.resources import (
    Event,
    Instance,
    InstanceState,
    Kind,
    Model,
    Operation,
    OperationKind,
    OperationState,
    Phase,
    Progress,
)

UNKNOWN = "_unknown"
"""Stands for every model that the registry does not know."""

EVICTIONS = frozenset({"EVICTED", "EVICTED_WHEN_IDLE", "OVER_BUDGET", "KEEP_ALIVE"})
"""Why an instance left its device without anybody asking for that: reasons of DRAINING."""

LOAD_BOUNDS_S = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)

READY, FAILED, CANCELLED = "ready", "failed", "cancelled"
_LOAD_ENDS = {
    "READY": READY,
    "LOAD_FAILED": FAILED,
    "CANCELLED": CANCELLED,
    "SHUTTING_DOWN": CANCELLED,
}
_NOTHING_FETCHED = frozenset({Phase.WAITING, Phase.PLANNING})


class Tallies:
    """Folds events into counts. Feed it every published batch, in order, from ``models`` on."""

    def __init__(self, models: Iterable[Model] = ()) -> None:
        self._schemes = {model.id: _scheme(model) for model in models}
        self._fetched: dict[str, int] = {}
        self.evictions: Counter[tuple[str, str]] = Counter()
        """Instances that were evicted, by (model, reason)."""
        self.loads: Counter[tuple[str, str]] = Counter()
        """Loads that ended, by (model, READY | FAILED | CANCELLED)."""
        self.load_seconds: dict[str, Histogram] = {}
        """How long loads that ended well took, by model."""
        self.download_bytes: Counter[tuple[str, str]] = Counter()
        """Bytes that sources sent, by (model, scheme of the source)."""
        self.download_failures: Counter[str] = Counter()
        """Downloads that failed, by reason of their error."""

    def fold(self, events: Sequence[Event]) -> None:
        """Count a batch of events."""
        for event in events:
            if event.kind is Kind.MODEL:
                self._model(event)
            elif event.kind is Kind.INSTANCE:
                self._instance(event)
            elif event.kind is Kind.OPERATION and isinstance(event.resource, Operation):
                self._operation(event.resource)

    def label(self, model: str) -> str:
        """Return a model's id if the registry knows it, else ``_unknown``."""
        return model if model in self._schemes else UNKNOWN

    def sample(self, operation: Operation, progress: Progress) -> None:
        """Take note of how far a running download is: what it got since the last time is counted.

        ``done - reused`` is what the source sent since the download last began; a sample that is still
        the one from before a pause says that it plans.
        """
        before = self._fetched.get(operation.id)
        if before is None or progress.phase in _NOTHING_FETCHED:
            return
        fetched = progress.done_bytes - progress.reused_bytes
        if fetched > before:
            self._fetched[operation.id] = fetched
            scheme = self._schemes.get(operation.model, UNKNOWN)
            self.download_bytes[self.label(operation.model), scheme] += fetched - before

    # --- one kind each --------------------------------------------------------------------------

    def _model(self, event: Event) -> None:
        if isinstance(event.resource, Model):
            self._schemes[event.key] = _scheme(event.resource)
            return
        self._schemes.pop(event.key, None)
        self.load_seconds.pop(event.key, None)
        for counts in (self.evictions, self.loads, self.download_bytes):
            for key in [k for k in counts if k[0] == event.key]:
                del counts[key]

    def _instance(self, event: Event) -> None:
        instance = event.resource
        model = self.label(event.key.partition("/")[0])
        if not isinstance(instance, Instance):
            # An instance that is gone as its load was cancelled; FAILED ones are still there.
            if _LOAD_ENDS.get(event.reason) == CANCELLED:
                self.loads[model, CANCELLED] += 1
            return
        if instance.state is InstanceState.DRAINING and event.reason in EVICTIONS:
            self.evictions[model, event.reason] += 1
        end = _LOAD_ENDS.get(event.reason)
        if end is not None:
            self.loads[model, end] += 1
        if end == READY:
            self.load_seconds.setdefault(model, Histogram(LOAD_BOUNDS_S)).add(instance.load_s)

    def _operation(self, operation: Operation) -> None:
        if operation.kind is not OperationKind.DOWNLOAD:
            return
        if operation.state is OperationState.RUNNING:
            # Told again when its priority changes; its progress may be the one from before a pause.
            self._fetched.setdefault(operation.id, 0)
            return
        self.sample(operation, operation.progress)
        self._fetched.pop(operation.id, None)
        if operation.state is OperationState.FAILED and operation.error is not None:
            self.download_failures[operation.error.reason] += 1


def running_downloads(operations: Iterable[Operation]) -> Sequence[Operation]:
    """Return the downloads that have begun and not ended."""
    return [
        o
        for o in operations
        if o.kind is OperationKind.DOWNLOAD and o.state is OperationState.RUNNING
    ]


def _scheme(model: Model) -> str:
    return model.source.uri.partition(":")[0] or UNKNOWN
