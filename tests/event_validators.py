"""What must hold of any recorded stream of events, whoever recorded it and however often it broke off.

Pure functions over messages of ``modelhost.v1``; each raises ViolationError with the numbers. A harness that
kills daemons records what each watcher was sent (one list of messages per connection) and calls these.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from modelhost.v1 import event_service_pb2, events_pb2

Response = event_service_pb2.WatchEventsResponse
Event = events_pb2.Event
Resource = events_pb2.Resource


class ViolationError(AssertionError):
    """A promise of the event stream was broken; the text says which and where."""


@dataclass
class Stream:
    """What one connection was sent, taken apart. ``snapshot`` is by resource name."""

    events: list[Event] = field(default_factory=list)
    snapshot: dict[str, Resource] = field(default_factory=dict)
    snapshot_sequence: int = 0
    bookmarks: list[events_pb2.Bookmark] = field(default_factory=list)
    samples: list[events_pb2.ProgressSample] = field(default_factory=list)

    @property
    def position(self) -> int:
        """The last sequence that is known to be covered; the next watch starts one after it."""
        last_bookmark = self.bookmarks[-1].sequence if self.bookmarks else 0
        return max(last_bookmark, self.events[-1].sequence if self.events else 0)


def name_of(resource: Resource) -> str:
    """Return the name of the resource that a Resource carries."""
    kind = resource.WhichOneof("resource")
    if kind is None:
        raise ViolationError("a resource without content")
    return str(getattr(resource, kind).name)


def take_apart(messages: Iterable[Response]) -> Stream:
    """Return what a connection was sent, checked for its form.

    Holds of each connection: every message has exactly one of its four parts; a snapshot comes first and
    once per resource; the first message after it (or the first at all) is a bookmark; bookmarks never
    fall behind what was sent and never go back; all come from one store.
    """
    stream = Stream()
    for number, message in enumerate(messages):
        parts = [f.name for f, _ in message.ListFields()]
        if len(parts) != 1:
            raise ViolationError(f"message {number} has {parts or 'nothing'}, not one part")
        if parts == ["snapshot"]:
            if stream.bookmarks:
                raise ViolationError(f"message {number}: a snapshot after the opening bookmark")
            _take_resources(stream, message.snapshot.resources)
        elif parts == ["bookmark"]:
            _take_bookmark(stream, message.bookmark)
        elif not stream.bookmarks:
            raise ViolationError(f"message {number}: {parts[0]} before the opening bookmark")
        stream.events.extend(message.events)
        stream.samples.extend(message.progress_samples)
    check_order(stream.events)
    return stream


def _take_resources(stream: Stream, resources: Iterable[Resource]) -> None:
    for resource in resources:
        name = name_of(resource)
        if name in stream.snapshot:
            raise ViolationError(f"the snapshot has {name} twice")
        stream.snapshot[name] = resource


def _take_bookmark(stream: Stream, bookmark: events_pb2.Bookmark) -> None:
    if not stream.bookmarks:
        stream.snapshot_sequence = bookmark.sequence
    elif bookmark.store_id != stream.bookmarks[0].store_id:
        raise ViolationError(f"the store changed in one stream, at {bookmark.sequence}")
    if bookmark.sequence < stream.position:
        raise ViolationError(f"a bookmark of {bookmark.sequence} after {stream.position}")
    stream.bookmarks.append(bookmark)


def check_order(events: Sequence[Event]) -> None:
    """Ordered and unique: each sequence is above the one before."""
    for before, after in itertools.pairwise(events):
        if after.sequence <= before.sequence:
            raise ViolationError(f"event {after.sequence} after {before.sequence}")


def check_contiguous(events: Sequence[Event], first: int, last: int) -> None:
    """No gap: the events are those from ``first`` to ``last``, each once."""
    check_order(events)
    found = [e.sequence for e in events]
    missing = sorted(set(range(first, last + 1)) - set(found))
    if missing:
        raise ViolationError(f"{len(missing)} events are missing, the first is {missing[0]}")
    if len(found) != last - first + 1:
        raise ViolationError(f"{len(found)} events where {first} to {last} were expected")


def check_resumed(streams: Sequence[Stream]) -> list[Event]:
    """Resumable: connections, each begun one after the position of the one before, join without a gap.

    Returns the joined events. For unfiltered streams.
    """
    joined: list[Event] = []
    position = streams[0].bookmarks[0].sequence
    for number, stream in enumerate(streams):
        if stream.bookmarks[0].sequence != position:
            raise ViolationError(
                f"connection {number} opens at {stream.bookmarks[0].sequence}, not at {position}"
            )
        if stream.events:
            check_contiguous(stream.events, position + 1, stream.events[-1].sequence)
        position = stream.position
        joined.extend(stream.events)
    if joined:
        check_contiguous(joined, streams[0].bookmarks[0].sequence + 1, joined[-1].sequence)
    return joined


def check_same(one: Sequence[Event], other: Sequence[Event]) -> None:
    """Two watchers are told the same: events of one sequence are equal, from memory or from disk."""
    known = {e.sequence: e for e in one}
    for event in other:
        same = known.get(event.sequence)
        if same is not None and same != event:
            raise ViolationError(f"event {event.sequence} is told in two ways")


def check_filtered(
    all_events: Sequence[Event], filtered: Sequence[Event], wanted: events_pb2.EventFilter
) -> None:
    """Filtered = unfiltered minus the filter, over the same range."""
    expected = [e for e in all_events if passes(wanted, e)]
    if [e.sequence for e in expected] != [e.sequence for e in filtered]:
        odd = {e.sequence for e in expected} ^ {e.sequence for e in filtered}
        raise ViolationError(f"the filter is wrong about event {min(odd)}: {wanted}")
    check_same(expected, filtered)


def passes(wanted: events_pb2.EventFilter, event: Event) -> bool:
    """Whether an event passes a filter, by the words of the contract alone."""
    if wanted.kinds and event.kind not in wanted.kinds:
        return False
    if wanted.reasons and event.reason not in wanted.reasons:
        return False
    if wanted.names and not any(
        event.name == name or event.name.startswith(name + "/") for name in wanted.names
    ):
        return False
    return not wanted.models or bool(_models_of(event) & set(wanted.models))


def _models_of(event: Event) -> set[str]:
    if event.name.startswith("models/"):
        return {"/".join(event.name.split("/")[:2])}
    kind = event.resource.WhichOneof("resource")
    if kind is None:
        return {f"models/{event.details['model']}"} if "model" in event.details else set()
    model = getattr(getattr(event.resource, kind), "model", "")
    return {model} if model else set()


def applied(state: Mapping[str, Resource], events: Iterable[Event]) -> dict[str, Resource]:
    """Return a state after events, as any consumer would keep it."""
    result = dict(state)
    for event in events:
        known = event.name in result
        match event.change:
            case Event.DELETED:
                if event.HasField("resource"):
                    raise ViolationError(f"event {event.sequence} deletes and carries a resource")
                result.pop(event.name, None)
            case Event.CREATED | Event.UPDATED:
                if name_of(event.resource) != event.name:
                    raise ViolationError(f"event {event.sequence} of {event.name} carries another")
                if known is (event.change == Event.CREATED):
                    raise ViolationError(
                        f"event {event.sequence}: {event.name} is said to be "
                        f"{Event.Change.Name(event.change)}, but was {'' if known else 'not '}known"
                    )
                result[event.name] = event.resource
            case _:
                raise ViolationError(f"event {event.sequence} says no change")
    return result


def check_state(
    stream: Stream,
    truth: Mapping[str, Resource],
    wanted: Callable[[str], bool] = lambda name: True,
) -> None:
    """Snapshot + deltas = state: what a watcher holds in the end is what there is."""
    held = applied(stream.snapshot, stream.events)
    expected = {name: r for name, r in truth.items() if wanted(name)}
    if held.keys() != expected.keys():
        raise ViolationError(f"held and true state differ in {held.keys() ^ expected.keys()}")
    for name, resource in expected.items():
        if held[name] != resource:
            raise ViolationError(f"{name} is held as {held[name]}, but is {resource}")
