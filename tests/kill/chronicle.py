"""The history that survived, held against what everybody was told.

Fed after each kill with the events on disk, the rows on disk, the acknowledgements and the streams that
clients wrote down. Raises ViolationError at the first promise that is broken.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from modelhost.v1 import events_pb2, models_pb2, operations_pb2
from tests.event_validators import (
    Event,
    Resource,
    Stream,
    ViolationError,
    applied,
    check_contiguous,
    check_filtered,
    check_resumed,
    check_same,
    check_state,
    passes,
    take_apart,
)
from tests.kill.recording import WATCHERS, Ack, Connection, Recorded, Watcher

REQUESTS = "requests/"


def facts_of(event: Event) -> dict[str, Any]:
    """Return what an acknowledgement may refer to of an event."""
    facts: dict[str, Any] = {"change": Event.Change.Name(event.change), "reason": event.reason}
    match event.resource.WhichOneof("resource"):
        case "model":
            model = event.resource.model
            state = models_pb2.Artifact.State.Name(model.state)
            facts |= {"uid": model.uid, "display_name": model.display_name, "state": state}
        case "operation":
            operation = event.resource.operation
            facts["state"] = operations_pb2.Operation.State.Name(operation.state)
            facts["model"] = operation.model
            facts["error"] = operation.error.reason
        case "settings":
            facts["queue_limit"] = event.resource.settings.queue_limit
    return facts


class Chronicle:
    """All events so far, the state that they make, and the streams of each watcher."""

    def __init__(self, watchers: Sequence[Watcher] = WATCHERS) -> None:
        self._watchers = {w.name: w for w in watchers}
        self._facts: dict[str, list[dict[str, Any]]] = defaultdict(list)
        self.events: list[Event] = []
        self.state: dict[str, Resource] = {}
        self.streams: dict[str, list[Stream]] = {w.name: [] for w in watchers}
        self.store_id = ""
        self.acknowledged = 0
        self.refused = 0
        """Operations that failed since what came was not what was announced."""
        self.request = ("", "")
        """The last request id that was answered, and the operation it was answered with."""
        self.told = 0

    @property
    def last_sequence(self) -> int:
        """The newest event that is known to be on disk."""
        return self.events[-1].sequence if self.events else 0

    def position(self, watcher: str) -> int:
        """Return the last sequence that a watcher was told of, or the one it wants to be told after."""
        streams = self.streams[watcher]
        position = streams[-1].position if streams else 0
        return max(0, position - self._watchers[watcher].again)

    def take(
        self,
        store_id: str,
        new: Sequence[Event],
        rows: Mapping[str, Resource],
        recorded: Recorded,
        requests: Mapping[str, str] | None = None,
    ) -> None:
        """Take what is there after a kill.

        ``new`` are the events after ``last_sequence``, ``requests`` the answers by request id.
        """
        if self.store_id and store_id != self.store_id:
            raise ViolationError(f"another store: {store_id}, not {self.store_id}")
        self.store_id = store_id
        before = self.state
        check_contiguous(new, self.last_sequence + 1, self.last_sequence + len(new))
        self.state = applied(before, new)
        self.events.extend(new)
        for event in new:
            facts = facts_of(event)
            self.refused += facts.get("error") == "CHECKSUM_MISMATCH"
            self._facts[event.name].append(facts)
        _compare("rows and log", self.state, rows)
        for ack in recorded.acks:
            self._check_ack(ack, requests or {})
        for connection in recorded.connections:
            self._check_connection(connection, before, new)

    def check_all(self) -> None:
        """Hold everything that was ever told against all of history, at the end."""
        if self.streams["all"]:
            check_same(self.events, check_resumed(self.streams["all"]))
        for name, streams in self.streams.items():
            watcher = self._watchers[name]
            if watcher.snapshot or watcher.again or not streams:
                continue
            last = streams[-1].position
            first = streams[0].bookmarks[0].sequence
            covered = [e for e in self.events if first < e.sequence <= last]
            told = [event for stream in streams for event in stream.events]
            check_filtered(covered, told, watcher.wanted)

    def _check_ack(self, ack: Ack, requests: Mapping[str, str]) -> None:
        self.acknowledged += 1
        wanted = ack.facts.items()
        if ack.name.startswith(REQUESTS):
            self.request = ack.name.removeprefix(REQUESTS), ack.facts["answer"]
            if requests.get(self.request[0]) != self.request[1]:
                raise ViolationError(f"acknowledged and lost: {ack}")
        elif not any(wanted <= facts.items() for facts in self._facts[ack.name]):
            raise ViolationError(f"acknowledged and lost: {ack}")

    def _check_connection(
        self, connection: Connection, before: Mapping[str, Resource], new: Sequence[Event]
    ) -> None:
        stream = take_apart(connection.messages)
        watcher = self._watchers[connection.watcher]
        if not stream.bookmarks:
            return  # it was cut off before it was told anything
        self.told += len(stream.events)
        if stream.position > self.last_sequence:
            raise ViolationError(
                f"'{watcher.name}' was told of {stream.position}, the disk has {self.last_sequence}"
            )
        opening = stream.bookmarks[0].sequence
        if not watcher.snapshot and opening != connection.start - 1:
            raise ViolationError(
                f"'{watcher.name}' opened at {opening}, not {connection.start - 1}"
            )
        offset = self.events[0].sequence if self.events else 1
        told_of = self.events[opening + 1 - offset : stream.position + 1 - offset]
        check_filtered(told_of, stream.events, watcher.wanted)
        if watcher.snapshot:
            first = new[0].sequence if new else opening + 1
            since = opening + 1 - first
            truth = applied(before, new[:since])
            _compare_snapshot(stream, truth, watcher)
            truth = applied(truth, new[since : since + len(told_of)])
            check_state(stream, truth, lambda name: _wanted(watcher, name))
        self.streams[watcher.name].append(stream)


def _wanted(watcher: Watcher, name: str) -> bool:
    """Whether a resource of this name passes; for the filters that say it by the kind alone."""
    kinds = watcher.wanted.kinds
    if not kinds:
        return True
    if list(kinds) != [events_pb2.Resource.MODEL]:
        raise NotImplementedError(watcher)
    return name.startswith("models/") and name.count("/") == 1


def _compare_snapshot(stream: Stream, truth: Mapping[str, Resource], watcher: Watcher) -> None:
    expected = {name: r for name, r in truth.items() if _wanted(watcher, name)}
    _compare(f"the snapshot of '{watcher.name}' and the log", expected, stream.snapshot)


def _compare(what: str, expected: Mapping[str, Resource], found: Mapping[str, Resource]) -> None:
    if expected.keys() != found.keys():
        raise ViolationError(f"{what} differ in {expected.keys() ^ found.keys()}")
    for name, resource in expected.items():
        if found[name] != resource:
            raise ViolationError(f"{what}: {name} is {found[name]}, expected {resource}")


def named(resources: Iterable[Resource]) -> dict[str, Resource]:
    """Return resources by their names."""
    out = {}
    for resource in resources:
        kind = resource.WhichOneof("resource")
        assert kind is not None
        out[getattr(resource, kind).name or "settings"] = resource
    return out


__all__ = ["Chronicle", "ViolationError", "facts_of", "named", "passes"]
