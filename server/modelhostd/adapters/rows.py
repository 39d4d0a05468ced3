"""Batches as rows of the tables in ``adapters/schema.py``, and rows as resources and events."""

import sqlite3
from collections.abc import Sequence
from pathlib import Path

from modelhostd.adapters import database_errors, schema
from modelhostd.adapters.codec import (
    CodecError,
    decode_details,
    decode_resource,
    encode_details,
    encode_resource,
)
from modelhostd.core.resources import Event, Kind, Resource
from modelhostd.core.values import dataclass
from modelhostd.ports import Batch, RequestRecord, Stored

_UPSERT = (
    "INSERT INTO resources (kind, key, json) VALUES (?, ?, ?) "
    "ON CONFLICT (kind, key) DO UPDATE SET json = excluded.json"
)
_EVENT = "INSERT INTO events VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"
_REQUEST = (
    "INSERT OR REPLACE INTO requests (request_id, fingerprint, answer, time) VALUES (?, ?, ?, ?)"
)


EventRow = tuple[int, float, str, str, str | None, str, str, str, int]


@dataclass(frozen=True, slots=True)
class EncodedBatch:
    """A batch as SQL parameters, made before the transaction begins."""

    puts: list[tuple[str, str, str]]
    deletes: list[tuple[str, str]]
    events: list[EventRow]
    requests: list[tuple[str, str, str, float]]
    compacts: bool

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to write."""
        return not (self.puts or self.deletes or self.events or self.requests or self.compacts)

    @property
    def size_bytes(self) -> int:
        """Return about how much text it holds."""
        return sum(
            len(cell) for row in (*self.puts, *self.events) for cell in row if isinstance(cell, str)
        )


def check_sequences(path: Path, events: Sequence[Event], last_sequence: int) -> None:
    """Raise STORAGE_ERROR unless ``events`` continue the log without a gap."""
    for expected, event in enumerate(events, start=last_sequence + 1):
        if event.sequence != expected:
            raise database_errors.gap(path, event.sequence, expected)


def encode(batch: Batch) -> EncodedBatch:
    """Return the rows of a batch. Raises CodecError for what could not be read back."""
    puts, deletes = [], []
    for change in batch.changes:
        if change.resource is None:
            deletes.append((change.kind.value, change.key))
        else:
            text = encode_resource(change.kind, change.resource)
            puts.append((change.kind.value, change.key, text))
    return EncodedBatch(
        puts=puts,
        deletes=deletes,
        events=[_event_row(event) for event in batch.events],
        requests=[(r.request_id, r.fingerprint, r.answer, r.time) for r in batch.requests],
        compacts=batch.compact_before > 0,
    )


def _event_row(event: Event) -> EventRow:
    resource = None if event.resource is None else encode_resource(event.kind, event.resource)
    return (
        event.sequence,
        event.time,
        event.kind.value,
        event.key,
        resource,
        event.reason,
        encode_details(event.details),
        event.principal,
        int(event.created),
    )


def write(
    connection: sqlite3.Connection, batch: EncodedBatch, compact_before: int, max_requests: int
) -> None:
    """Write a batch inside the transaction that is open."""
    connection.executemany(_UPSERT, batch.puts)
    connection.executemany("DELETE FROM resources WHERE kind = ? AND key = ?", batch.deletes)
    connection.executemany(_EVENT, batch.events)
    if batch.requests:
        connection.executemany(_REQUEST, batch.requests)
        connection.execute(
            "DELETE FROM requests WHERE id <= (SELECT max(id) FROM requests) - ?", (max_requests,)
        )
    if batch.compacts:
        # The number of an event must survive its row, or it would be used again.
        connection.execute(
            "UPDATE meta SET value = (SELECT max(sequence) FROM events) WHERE key = "
            "'last_sequence' AND EXISTS (SELECT 1 FROM events)"
        )
        connection.execute("DELETE FROM events WHERE sequence < ?", (compact_before,))


def read_stored(connection: sqlite3.Connection) -> Stored:
    """Read everything but the events. Raises CodecError, sqlite3.Error or SchemaError."""
    resources: dict[Kind, dict[str, Resource]] = {kind: {} for kind in Kind}
    for name, key, text in connection.execute("SELECT kind, key, json FROM resources ORDER BY id"):
        kind = as_kind(name)
        resources[kind][key] = decode_resource(kind, text)
    requests = connection.execute(
        "SELECT request_id, fingerprint, answer, time FROM requests ORDER BY id"
    )
    first, last = connection.execute(
        "SELECT (SELECT min(sequence) FROM events), (SELECT max(sequence) FROM events)"
    ).fetchone()
    try:
        last = max(last or 0, int(schema.meta(connection, "last_sequence")))
        store_id = schema.meta(connection, "store_id")
    except (LookupError, ValueError) as error:
        raise schema.SchemaError(str(error)) from error
    return Stored(
        store_id=store_id,
        resources=resources,
        requests=tuple(RequestRecord(*row) for row in requests),
        first_sequence=first if first is not None else last + 1,
        last_sequence=last,
    )


def read_events(connection: sqlite3.Connection, start_sequence: int, limit: int) -> Sequence[Event]:
    """Return up to ``limit`` events from ``start_sequence`` on. Raises CodecError."""
    found = connection.execute(
        "SELECT sequence, time, kind, key, resource, reason, details, principal, created "
        "FROM events WHERE sequence >= ? ORDER BY sequence LIMIT ?",
        (start_sequence, max(limit, 0)),
    )
    return [_event(row) for row in found]


def _event(row: EventRow) -> Event:
    sequence, time, name, key, resource, reason, details, principal, created = row
    kind = as_kind(name)
    return Event(
        sequence=sequence,
        time=time,
        kind=kind,
        key=key,
        resource=None if resource is None else decode_resource(kind, resource),
        reason=reason,
        details=decode_details(details),
        principal=principal,
        created=bool(created),
    )


def as_kind(name: str) -> Kind:
    """Return the kind called ``name``. Raises CodecError."""
    try:
        return Kind(name)
    except ValueError as error:
        raise CodecError(f"no kind is called {name!r}") from error
