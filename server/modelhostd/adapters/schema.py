"""The tables of the registry, and how a database of an older version becomes one of this version.

meta(key, value)         schema_version, store_id, last_sequence (set when the log is compacted)
resources(kind, key)     one row a resource, as JSON; ``id`` keeps the order in which they came
events(sequence)         the log; ``resource`` is the state after the event, NULL when it is gone
requests(request_id)     what a request id was used for; ``id`` keeps the order

A change that an older daemon could not read (a new table, column or enum value) raises VERSION and adds
a function to MIGRATIONS. What has a default does not: see ``adapters/codec.py``.
"""

import sqlite3
import uuid
from collections.abc import Callable, Mapping

from modelhostd.adapters.failpoints import hit

VERSION = 1

MIGRATIONS: Mapping[int, Callable[[sqlite3.Connection], None]] = {}
"""From version n (the key) to n + 1. All that are needed run in one transaction."""

TABLES = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE resources (
    id INTEGER PRIMARY KEY,
    kind TEXT NOT NULL,
    key TEXT NOT NULL,
    json TEXT NOT NULL,
    UNIQUE (kind, key)
);
CREATE TABLE events (
    sequence INTEGER PRIMARY KEY,
    time REAL NOT NULL,
    kind TEXT NOT NULL,
    key TEXT NOT NULL,
    resource TEXT,
    reason TEXT NOT NULL,
    details TEXT NOT NULL,
    principal TEXT NOT NULL,
    created INTEGER NOT NULL
);
CREATE TABLE requests (
    id INTEGER PRIMARY KEY,
    request_id TEXT NOT NULL UNIQUE,
    fingerprint TEXT NOT NULL,
    answer TEXT NOT NULL,
    time REAL NOT NULL
);
"""


class SchemaError(Exception):
    """The tables are not those of any version of modelhost."""


def is_empty(connection: sqlite3.Connection) -> bool:
    """Tell whether the database has no table at all: new, or its creation was interrupted."""
    found = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    return bool(found[0] == 0)


def version(connection: sqlite3.Connection) -> int:
    """Return the schema version. Raises SchemaError where there is none."""
    try:
        found = int(meta(connection, "schema_version"))
    except (sqlite3.OperationalError, LookupError, ValueError) as error:
        if isinstance(error, sqlite3.OperationalError) and "no such table" not in str(error):
            raise
        raise SchemaError(f"no schema version in it ({error})") from error
    if found < 1:
        raise SchemaError(f"schema version {found}")
    return found


def meta(connection: sqlite3.Connection, key: str) -> str:
    """Return one value of the meta table. Raises LookupError."""
    row = connection.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
    if row is None:
        raise LookupError(f"no '{key}' in table meta")
    return str(row[0])


def create(connection: sqlite3.Connection) -> None:
    """Create the tables and a new store_id in one transaction."""
    connection.execute("BEGIN IMMEDIATE")
    for statement in filter(str.strip, TABLES.split(";")):
        connection.execute(statement)
    connection.executemany(
        "INSERT INTO meta VALUES (?, ?)",
        [
            ("schema_version", str(VERSION)),
            ("store_id", str(uuid.uuid4())),
            ("last_sequence", "0"),
        ],
    )
    connection.execute("COMMIT")


def migrate(
    connection: sqlite3.Connection,
    migrations: Mapping[int, Callable[[sqlite3.Connection], None]] = MIGRATIONS,
    target: int = VERSION,
) -> None:
    """Bring an older database to ``target`` in one transaction; it is all done or not at all."""
    current = version(connection)
    if current >= target:
        return
    hit("database.before_migration")
    connection.execute("BEGIN IMMEDIATE")
    for number in range(current, target):
        migrations[number](connection)
    connection.execute("UPDATE meta SET value = ? WHERE key = 'schema_version'", (str(target),))
    hit("database.before_migration_commit")
    connection.execute("COMMIT")
