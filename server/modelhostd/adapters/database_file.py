"""The registry's SQLite file, synchronously: one connection, used by one thread at a time.

WAL with ``locking_mode=EXCLUSIVE`` keeps the log's index in this process (no -shm file) and shuts other
processes out; ``synchronous=FULL`` makes COMMIT return after fsync. There must never be a second
connection beside this one: SQLite before 3.51.3 can then corrupt the log.
"""

import contextlib
import logging
import os
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path

from modelhostd.adapters import database_errors as errors
from modelhostd.adapters import rows, schema
from modelhostd.adapters.codec import CodecError
from modelhostd.adapters.failpoints import hit
from modelhostd.core.resources import Event
from modelhostd.ports import Batch, Stored

log = logging.getLogger(__name__)

WAL_PAGES = 4096
"""16 MiB: the size of the write-ahead log at which a commit copies it into the database."""
MAX_REQUESTS = 10_000
EVENTS_PER_READ = 256

_MAGIC = b"SQLite format 3\0"


class DatabaseFile:
    """The database at one path. Every method raises ModelhostError; see :class:`ports.Database`."""

    def __init__(self, path: Path, *, fresh: bool = False) -> None:
        """``fresh``: make a new database though models lie beside it (a rebuild)."""
        self.path = path
        self._fresh = fresh
        self.dirty = False
        """Whether the write-ahead log holds commits that the database file does not."""
        self._connection: sqlite3.Connection | None = None
        self._last_sequence = 0

    @property
    def wal_path(self) -> Path:
        """Where SQLite keeps the write-ahead log."""
        return log_path(self.path)

    def open(self) -> Stored:
        """Open or create, migrate, and read everything but the events.

        What cannot be used is found by a look that writes nothing, so that it stays as it was.
        """
        stored = None
        if self.exists():
            stored = self._look()
        else:
            self._create_file()
        try:
            connection = self._connect()
            if schema.is_empty(connection):
                schema.create(connection)
            schema.migrate(connection)
            stored = stored or rows.read_stored(connection)
        except (sqlite3.Error, OSError, schema.SchemaError, CodecError) as error:
            self._close_connection()
            raise errors.opening(self.path, error) from error
        self._last_sequence = stored.last_sequence
        self.dirty = True
        return stored

    def commit(self, batch: Batch) -> None:
        """Write one batch durably, or nothing of it."""
        connection = self._required()
        rows.check_sequences(self.path, batch.events, self._last_sequence)
        try:
            encoded = rows.encode(batch)
        except CodecError as error:
            raise errors.not_storable(self.path, error) from error
        if encoded.is_empty:
            return
        committing = False
        try:
            connection.execute("BEGIN IMMEDIATE")
            rows.write(connection, encoded, batch.compact_before, MAX_REQUESTS)
            hit("database.before_commit")
            committing = True
            connection.execute("COMMIT")
        except BaseException as error:
            self._roll_back(connection, overwrite=committing)
            if isinstance(error, sqlite3.Error | OSError):
                raise errors.committing(self.path, error, encoded.size_bytes) from error
            raise
        self.dirty = True
        if batch.events:
            self._last_sequence = batch.events[-1].sequence
        hit("database.after_commit")

    def read_events(self, start_sequence: int, limit: int) -> Sequence[Event]:
        """Return up to ``limit`` (at most 256) events from ``start_sequence`` on, in order."""
        connection = self._required()
        try:
            return rows.read_events(connection, start_sequence, min(limit, EVENTS_PER_READ))
        except (sqlite3.Error, CodecError) as error:
            raise errors.reading(self.path, error) from error

    def checkpoint(self, mode: str = "PASSIVE") -> None:
        """Copy the write-ahead log into the database; a failure is logged and tried again later."""
        connection = self._required()
        self.dirty = False
        try:
            hit("database.before_checkpoint")
            connection.execute(f"PRAGMA wal_checkpoint({mode})").fetchall()
        except (sqlite3.Error, OSError) as error:
            log.warning("checkpoint of %s failed: %s", self.path, error)

    def close(self) -> None:
        """Copy the log into the database, empty it, and close. Idempotent."""
        if self._connection is not None:
            self.checkpoint("TRUNCATE")
            self._close_connection()

    def _required(self) -> sqlite3.Connection:
        if self._connection is None:
            raise errors.closed(self.path)
        return self._connection

    def exists(self) -> bool:
        """Tell whether there is a database to read. Raises for one whose parts are missing."""
        try:
            size = self.path.stat().st_size
        except FileNotFoundError:
            size = 0
        except OSError as error:
            raise errors.opening(self.path, error) from error
        with contextlib.suppress(OSError):
            if size == 0 and self.wal_path.stat().st_size > 0:
                raise errors.corrupt(self.path, f"it is gone, but {self.wal_path.name} is there")
        if size == 0 and not self._fresh:
            models = self.path.parent / "models"
            with contextlib.suppress(OSError):
                if any(models.iterdir()):
                    raise errors.corrupt(self.path, f"it is gone, but {models} has models")
        return size > 0

    def _create_file(self) -> None:
        """Make an empty database aside and show it by one rename.

        Until it is in WAL mode it has a rollback journal: a crash beside that would leave a file that no
        look could read without writing.
        """
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        aside = self.path.with_name(self.path.name + ".new")
        try:
            os.close(os.open(self.path, flags, 0o600))
            for left in (aside, log_path(aside), aside.with_name(aside.name + "-journal")):
                left.unlink(missing_ok=True)
            os.close(os.open(aside, flags | os.O_EXCL, 0o600))
            with contextlib.closing(sqlite3.connect(aside, isolation_level=None)) as connection:
                connection.execute("PRAGMA journal_mode=WAL").fetchall()
            _sync(aside, os.O_RDONLY)
            os.rename(aside, self.path)
            _sync(self.path.parent, os.O_RDONLY | os.O_DIRECTORY)
        except (OSError, sqlite3.Error) as error:
            raise errors.opening(self.path, error) from error

    def _look(self) -> Stored | None:
        """Read all through a read-only connection; None where the tables must be made first."""
        try:
            with self.path.open("rb") as file:
                if file.read(len(_MAGIC)) != _MAGIC:
                    raise errors.corrupt(self.path, "file is not a database")
            with read_only(self.path) as connection:
                if schema.is_empty(connection):
                    return None
                found = schema.version(connection)
                if found > schema.VERSION:
                    raise errors.newer(self.path, found, schema.VERSION)
                return rows.read_stored(connection) if found == schema.VERSION else None
        except (sqlite3.Error, OSError, schema.SchemaError, CodecError) as error:
            raise errors.opening(self.path, error) from error

    def _connect(self) -> sqlite3.Connection:
        self._connection = connection = sqlite3.connect(
            self.path, isolation_level=None, check_same_thread=False, timeout=0
        )
        connection.execute("PRAGMA locking_mode=EXCLUSIVE").fetchall()
        mode = connection.execute("PRAGMA journal_mode=WAL").fetchone()[0]
        if mode != "wal":
            raise sqlite3.OperationalError(f"journal mode is {mode}, not wal")
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute(f"PRAGMA wal_autocheckpoint={WAL_PAGES}").fetchall()
        return connection

    def _close_connection(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(sqlite3.Error):
                connection.close()

    def _roll_back(self, connection: sqlite3.Connection, *, overwrite: bool) -> None:
        try:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            if overwrite:
                # COMMIT failed, perhaps in its fsync: the transaction may be whole in the log, and a
                # crash now would bring it back. A commit of something else takes its place there.
                connection.execute("BEGIN IMMEDIATE")
                connection.execute(
                    "INSERT INTO meta VALUES ('failed_commits', '1') ON CONFLICT (key) "
                    "DO UPDATE SET value = value + 1"
                )
                connection.execute("COMMIT")
        except sqlite3.Error as error:
            log.warning("after a failed commit to %s: %s", self.path, error)
            with contextlib.suppress(sqlite3.Error):
                if connection.in_transaction:
                    connection.execute("ROLLBACK")


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def log_path(path: Path) -> Path:
    """Return where SQLite keeps the write-ahead log of a database."""
    return path.with_name(path.name + "-wal")


@contextlib.contextmanager
def read_only(path: Path) -> Iterator[sqlite3.Connection]:
    """Open a database that nobody else has open, its log included, and leave both as they are."""
    log_was_there = log_path(path).exists()
    connection = sqlite3.connect(
        path.absolute().as_uri() + "?mode=ro", uri=True, isolation_level=None
    )
    try:
        yield connection
    finally:
        connection.close()
        # A read-only connection makes its index and an empty log, and cannot take them away.
        with contextlib.suppress(OSError):
            path.with_name(path.name + "-shm").unlink()
            if not log_was_there:
                log_path(path).unlink()
