"""Which events a watcher wants, and the full names of resources that filters speak of.

The rule holds for one event by itself, whatever came before it: what a filtered watcher sees is what an
unfiltered one sees, less the events that do not pass.
"""

from collections.abc import Mapping, Sequence

from modelhostd.core import names
from modelhostd.core.errors import invalid
from modelhostd.core.resources import Event, Kind, Model, Resource
from modelhostd.core.values import dataclass

ENTRIES_MAX = 100
MODEL_DETAIL = "model"
"""Key of an event's details that names the model (its id) where the resource is gone and can no longer."""

_COLLECTIONS = frozenset(kind.value for kind in Kind) - {Kind.SETTINGS.value, Kind.INSTANCE.value}


def resource_name(kind: Kind, key: str) -> str:
    """Return the full name of a resource: ``models/minilm``, ``models/minilm/instances/3``, ``settings``."""
    if kind is Kind.INSTANCE:
        model, _, instance = key.partition("/")
        return f"models/{model}/instances/{instance}"
    return kind.value if kind is Kind.SETTINGS else f"{kind.value}/{key}"


@dataclass(frozen=True, slots=True)
class EventFilter:
    """What passes: the sets narrow each other, in one set any match is enough, an empty one lets all pass.

    ``names`` are full names and stand for all names below them too; ``models`` are ids.
    """

    kinds: frozenset[Kind] = frozenset()
    names: frozenset[str] = frozenset()
    models: frozenset[str] = frozenset()
    reasons: frozenset[str] = frozenset()

    @property
    def everything(self) -> bool:
        """Whether all events pass."""
        return not (self.kinds or self.names or self.models or self.reasons)

    def passes(self, event: Event) -> bool:
        """Whether an event is wanted."""
        if self.reasons and event.reason not in self.reasons:
            return False
        return self._wanted(event.kind, event.key, event.resource, event.details)

    def passes_resource(self, kind: Kind, key: str, resource: Resource) -> bool:
        """Whether a resource belongs in the snapshot; reasons are of events, not of resources."""
        return self._wanted(kind, key, resource, {})

    def _wanted(
        self, kind: Kind, key: str, resource: Resource | None, details: Mapping[str, str]
    ) -> bool:
        if self.kinds and kind not in self.kinds:
            return False
        if self.models and model_of(kind, key, resource, details) not in self.models:
            return False
        return not self.names or self._named(resource_name(kind, key))

    def _named(self, name: str) -> bool:
        while name not in self.names:
            name, slash, _ = name.rpartition("/")
            if not slash:
                return False
        return True


def model_of(kind: Kind, key: str, resource: Resource | None, details: Mapping[str, str]) -> str:
    """Return the id of the model that a resource belongs to; empty for what belongs to the whole host."""
    if kind is Kind.MODEL:
        return key
    if kind is Kind.INSTANCE:
        return key.partition("/")[0]
    if resource is None or isinstance(resource, Model):
        return details.get(MODEL_DETAIL, "")
    return getattr(resource, "model", "")


def make_filter(
    kinds: Sequence[Kind], paths: Sequence[str], models: Sequence[str], reasons: Sequence[str]
) -> EventFilter:
    """Return the filter of four lists as a client wrote them; ``models`` are full names.

    Raises INVALID_ARGUMENT for a name that no resource can have, an empty reason, or too many entries.
    """
    lists: Mapping[str, Sequence[str]] = {
        "kinds": kinds,
        "names": paths,
        "models": models,
        "reasons": reasons,
    }
    for field, entries in lists.items():
        if len(entries) > ENTRIES_MAX:
            raise invalid(f"filter.{field}", f"at most {ENTRIES_MAX} entries", len(entries))
    for i, path in enumerate(paths):
        if not _is_name(path):
            raise invalid(f"filter.names[{i}]", "a resource name, like models/{model}", path)
    for i, reason in enumerate(reasons):
        if not reason:
            raise invalid(f"filter.reasons[{i}]", "a reason, like EVICTED", reason)
    ids = [names.parse("models", f"filter.models[{i}]", name) for i, name in enumerate(models)]
    return EventFilter(frozenset(kinds), frozenset(paths), frozenset(ids), frozenset(reasons))


def _is_name(path: str) -> bool:
    collection, _, rest = path.partition("/")
    if collection not in _COLLECTIONS:
        return path == Kind.SETTINGS.value
    parts = rest.split("/")
    if collection == Kind.MODEL.value and len(parts) == 3 and parts[1] == Kind.INSTANCE.value:
        parts = [parts[0], parts[2]]
    elif len(parts) != 1:
        return False
    return all(names.ID.fullmatch(part) for part in parts)
