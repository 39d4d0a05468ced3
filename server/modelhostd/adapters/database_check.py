"""Looks at a database that no daemon has open, and changes nothing."""

import sqlite3
from collections.abc import Sequence
from pathlib import Path

from modelhostd.adapters import database_errors, rows, schema
from modelhostd.adapters.codec import CodecError
from modelhostd.adapters.database_file import DatabaseFile, read_only
from modelhostd.core.errors import ModelhostError
from modelhostd.core.findings import FindingKind
from modelhostd.core.values import dataclass
from modelhostd.ports import StorageFinding, Stored

LINES_MAX = 20
PAGE = 256


@dataclass(frozen=True, slots=True)
class DatabaseReport:
    """What a look found. ``stored`` is None where the database cannot be used at all."""

    stored: Stored | None
    findings: Sequence[StorageFinding] = ()
    whole_from: int = 0
    """The first sequence from which on the log is whole; 0 = it is whole."""


def look(path: Path, *, deep: bool) -> DatabaseReport:
    """Check the file, its rows and the numbers of its events; ``deep`` also reads every event.

    A database that is not there, in a home without models, is as sound as a new one. Raises
    ModelhostError where the disk or its rights are at fault: then nothing is known of the database.
    """
    try:
        if not DatabaseFile(path).exists():
            return DatabaseReport(_nothing())
        with read_only(path) as connection:
            if schema.is_empty(connection):
                return DatabaseReport(_nothing())
            found = schema.version(connection)
            if found != schema.VERSION:
                return DatabaseReport(None, [_other_version(path, found)])
            stored = rows.read_stored(connection)
            broken = _integrity(connection)
            if broken:
                raise database_errors.corrupt(path, "; ".join(broken))
            return _log(connection, stored, deep=deep)
    except database_errors.CorruptDatabaseError as error:
        return _unusable(path, error)
    except (sqlite3.Error, CodecError, schema.SchemaError, OSError) as error:
        why = database_errors.opening(path, error)
        if isinstance(why, database_errors.CorruptDatabaseError):
            return _unusable(path, why)
        raise why from error


def _nothing() -> Stored:
    return Stored(store_id="", resources={}, requests=(), first_sequence=1, last_sequence=0)


def _unusable(path: Path, error: ModelhostError) -> DatabaseReport:
    finding = StorageFinding(FindingKind.DATABASE_BROKEN, path.name, error.message)
    return DatabaseReport(None, [finding])


def _other_version(path: Path, found: int) -> StorageFinding:
    message = (
        database_errors.newer(path, found, schema.VERSION).message
        if found > schema.VERSION
        else f"the database {path} has schema version {found}; start modelhostd once, which brings "
        f"it to {schema.VERSION}, and check again"
    )
    return StorageFinding(FindingKind.DATABASE_VERSION, path.name, message)


def _integrity(connection: sqlite3.Connection) -> Sequence[str]:
    found = connection.execute(f"PRAGMA integrity_check({LINES_MAX})").fetchall()
    return [str(row[0]) for row in found if row[0] != "ok"]


def _log(connection: sqlite3.Connection, stored: Stored, *, deep: bool) -> DatabaseReport:
    findings, whole_from = [], 0
    gaps = connection.execute(
        "SELECT sequence, before FROM (SELECT sequence, lag(sequence) OVER (ORDER BY sequence) "
        "AS before FROM events) WHERE sequence <> before + 1"
    ).fetchall()
    (highest,) = connection.execute("SELECT max(sequence) FROM events").fetchone()
    if highest is not None and highest < stored.last_sequence:
        gaps.append((stored.last_sequence + 1, highest))
    for sequence, before in gaps:
        whole_from = sequence
        findings.append(
            StorageFinding(
                FindingKind.SEQUENCE_GAP,
                f"events/{before + 1}",
                f"the log has event {before} and then {sequence}; a subscriber would miss "
                f"{sequence - before - 1}",
                repairable=True,
            )
        )
    if deep:
        for sequence, why in _unreadable(connection, stored.last_sequence):
            whole_from = max(whole_from, sequence + 1)
            findings.append(
                StorageFinding(
                    FindingKind.BROKEN_EVENT,
                    f"events/{sequence}",
                    f"event {sequence} cannot be read: {why}",
                    repairable=True,
                )
            )
    return DatabaseReport(stored, findings[:LINES_MAX], whole_from)


def _unreadable(connection: sqlite3.Connection, last: int) -> Sequence[tuple[int, str]]:
    """Return the events that cannot be decoded, with why."""
    found, start = [], 0
    while start <= last:
        try:
            page = rows.read_events(connection, start, PAGE)
            if not page:
                break
            start = page[-1].sequence + 1
        except CodecError:
            # One by one, to find which of the page it is.
            numbers = connection.execute(
                "SELECT sequence FROM events WHERE sequence >= ? ORDER BY sequence LIMIT ?",
                (start, PAGE),
            ).fetchall()
            for (sequence,) in numbers:
                try:
                    rows.read_events(connection, sequence, 1)
                except CodecError as error:
                    found.append((sequence, str(error)))
            start = numbers[-1][0] + 1
    return found
