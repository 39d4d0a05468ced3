"""Events as bytes: each is encoded once for all watchers, and batches are shared by those who read alike.

``repeated Event events = 1`` of WatchEventsResponse and of ListEventsResponse have the same encoding: each
event is its key, its length and its bytes, so that messages are made by joining what is encoded already.
"""

from collections import OrderedDict
from collections.abc import Hashable, Iterable, Iterator
from typing import Generic, TypeVar

from modelhost.v1 import event_service_pb2
from modelhostd.api import convert
from modelhostd.api.encoding import entry, key
from modelhostd.core.event_filter import EventFilter
from modelhostd.core.resources import Event, Resource
from modelhostd.core.values import dataclass
from modelhostd.host.journal import Journal

MESSAGE_BYTES_MAX = 32 * 1024
"""Of one message, unless one event or resource alone is larger. gRPC copies a message that is not read, and
the window of the stream holds another 64 KiB: together what a reader that never reads costs."""
EVENTS_CACHED_BYTES = 8 * 1024 * 1024
BATCHES_CACHED_BYTES = 4 * 1024 * 1024

_Response = event_service_pb2.WatchEventsResponse
_EVENTS = key(_Response.EVENTS_FIELD_NUMBER)
_SNAPSHOT = key(_Response.SNAPSHOT_FIELD_NUMBER)
_RESOURCES = key(event_service_pb2.Snapshot.RESOURCES_FIELD_NUMBER)

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


@dataclass(slots=True)
class EventFigures:
    """What watching and listing have done so far; counts never fall."""

    watches: int = 0
    events_encoded: int = 0
    batches_encoded: int = 0
    batches_sent: int = 0
    events_sent: int = 0


@dataclass(frozen=True, slots=True)
class Batch:
    """The events from one sequence up to before ``next_sequence``; ``data`` is empty when none is wanted."""

    data: bytes
    count: int
    next_sequence: int


class _Cache(Generic[K, V]):
    """The values used last, up to a sum of bytes."""

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self._values: OrderedDict[K, tuple[V, int]] = OrderedDict()
        self._bytes = 0

    def get(self, key: K) -> V | None:
        found = self._values.get(key)
        if found is None:
            return None
        self._values.move_to_end(key)
        return found[0]

    def put(self, key: K, value: V, size: int) -> None:
        _, before = self._values.pop(key, (None, 0))
        self._values[key] = value, size
        self._bytes += size - before
        while self._bytes > self._bytes_max and len(self._values) > 1:
            _, (_, gone) = self._values.popitem(last=False)
            self._bytes -= gone


class Batches:
    """Encoded events and batches of one journal. Reading never waits for a watcher."""

    def __init__(self, figures: EventFigures) -> None:
        self._figures = figures
        self._events: _Cache[int, bytes] = _Cache(EVENTS_CACHED_BYTES)
        self._batches: _Cache[tuple[EventFilter, int], Batch] = _Cache(BATCHES_CACHED_BYTES)

    async def read(self, journal: Journal, wanted: EventFilter, start: int) -> Batch:
        """Return the next batch from ``start``, which must not be after the last event.

        Raises SEQUENCE_COMPACTED when history has overtaken the reader.
        """
        place = wanted, start
        batch = self._batches.get(place)
        if batch is None:
            batch = self._make(wanted, await journal.read(start))
            # What it takes beside its bytes, so that empty batches are bounded too.
            self._batches.put(place, batch, len(batch.data) + 256)
        return batch

    def encoded(self, event: Event) -> bytes:
        """Return one event as an entry of ``events``."""
        data = self._events.get(event.sequence)
        if data is None:
            data = entry(_EVENTS, convert.event(event).SerializeToString())
            self._figures.events_encoded += 1
            self._events.put(event.sequence, data, len(data))
        return data

    def _make(self, wanted: EventFilter, events: Iterable[Event]) -> Batch:
        parts: list[bytes] = []
        size = after = 0
        for event in events:
            if wanted.everything or wanted.passes(event):
                data = self.encoded(event)
                if parts and size + len(data) > MESSAGE_BYTES_MAX:
                    break
                parts.append(data)
                size += len(data)
            after = event.sequence + 1
        self._figures.batches_encoded += 1
        return Batch(b"".join(parts), len(parts), after)


def snapshot_messages(resources: Iterable[Resource]) -> Iterator[bytes]:
    """Yield resources as encoded messages with a ``snapshot`` each; encodes only what is asked for."""
    parts: list[bytes] = []
    size = 0
    for resource in resources:
        data = entry(_RESOURCES, convert.resource(resource).SerializeToString())
        if parts and size + len(data) > MESSAGE_BYTES_MAX:
            yield entry(_SNAPSHOT, b"".join(parts))
            parts, size = [], 0
        parts.append(data)
        size += len(data)
    if parts:
        yield entry(_SNAPSHOT, b"".join(parts))
