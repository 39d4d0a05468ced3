"""What clients were told, written down so that it outlives them: one file, appended record by record.

A record is in the file when ``write`` returns, since the kernel has it: SIGKILL takes nothing of it back.
The last record of a killed writer may be cut off; then nobody was told.
"""

import json
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modelhost.v1 import event_service_pb2, events_pb2

Response = event_service_pb2.WatchEventsResponse

_HEAD = struct.Struct("<cI")
ACK, OPENED, MESSAGE = b"A", b"O", b"M"


@dataclass(frozen=True)
class Ack:
    """A change that somebody was told has happened: an event of ``name`` must tell of it for ever.

    ``facts`` are what that event says, as ``chronicle.facts_of`` takes it out of an event.
    """

    name: str
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Connection:
    """One stream of one watcher: from where it was opened, and every message that came."""

    watcher: str
    start: int
    messages: list[Response] = field(default_factory=list)


@dataclass
class Recorded:
    """What one file has: acknowledgements and streams, in the order they came."""

    acks: list[Ack] = field(default_factory=list)
    connections: list[Connection] = field(default_factory=list)


class Recorder:
    """Appends to one file."""

    def __init__(self, path: Path) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        self._fd = os.open(path, flags, 0o600)

    def ack(self, name: str, **facts: Any) -> None:
        """Note that a client was told of a change."""
        self._write(ACK, json.dumps([name, facts]).encode())

    def opened(self, watcher: str, start: int) -> None:
        """Note that a watcher begins a stream; its messages follow."""
        self._write(OPENED, json.dumps([watcher, start]).encode())

    def message(self, watcher: str, data: bytes) -> None:
        """Note one encoded message of a watcher's stream."""
        name = watcher.encode()
        self._write(MESSAGE, bytes([len(name)]) + name + data)

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)

    def _write(self, tag: bytes, payload: bytes) -> None:
        os.write(self._fd, _HEAD.pack(tag, len(payload)) + payload)


def read(path: Path) -> Recorded:
    """Return what a file has; a record that was cut off is left out."""
    found = Recorded()
    last: dict[str, Connection] = {}
    for tag, payload in _records(path):
        if tag == ACK:
            name, facts = json.loads(payload)
            found.acks.append(Ack(name, facts))
        elif tag == OPENED:
            watcher, start = json.loads(payload)
            last[watcher] = Connection(watcher, start)
            found.connections.append(last[watcher])
        else:
            size = payload[0] + 1
            message = Response.FromString(payload[size:])
            last[payload[1:size].decode()].messages.append(message)
    return found


def _records(path: Path) -> Iterator[tuple[bytes, bytes]]:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return
    at = 0
    while at + _HEAD.size <= len(data):
        tag, size = _HEAD.unpack_from(data, at)
        at += _HEAD.size
        if at + size > len(data):
            return
        yield tag, data[at : at + size]
        at += size


@dataclass(frozen=True)
class Watcher:
    """What a watcher asks for. One with ``snapshot`` begins anew each time, the others resume, with
    ``again`` so many events before the place where they were.
    """

    name: str
    wanted: events_pb2.EventFilter = field(default_factory=events_pb2.EventFilter)
    snapshot: bool = False
    progress: bool = False
    again: int = 0

    def request(self, start: int) -> event_service_pb2.WatchEventsRequest:
        """Return the request of a stream that begins at ``start`` (unused with a snapshot)."""
        return event_service_pb2.WatchEventsRequest(
            start_sequence=0 if self.snapshot else start,
            filter=self.wanted,
            include_snapshot=self.snapshot,
            include_progress=self.progress,
        )


WATCHERS = (
    Watcher("all"),
    Watcher("again", again=40),
    Watcher("models", events_pb2.EventFilter(kinds=[events_pb2.Resource.MODEL])),
    Watcher("one", events_pb2.EventFilter(models=["models/m1"])),
    Watcher("state", snapshot=True, progress=True),
    Watcher(
        "state of models",
        events_pb2.EventFilter(kinds=[events_pb2.Resource.MODEL]),
        snapshot=True,
    ),
)
"""Who watches during every round: with and without filter, resuming and beginning with the state."""
