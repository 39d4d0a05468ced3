"""Databases that cannot be used, are not there yet, or come from another version."""

import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from modelhostd.adapters import failpoints, schema
from modelhostd.adapters.database import FILE_NAME, SqliteDatabase
from modelhostd.adapters.database_file import DatabaseFile
from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.resources import Kind, Settings
from modelhostd.ports import Batch, Change
from tests.adapters.database_support import MODEL, ROOT, edit_directly, numbered, run
from tests.support import wait_until


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Return where the database of a test is."""
    return tmp_path / FILE_NAME


@pytest.fixture
def file(path: Path) -> Iterator[DatabaseFile]:
    """Yield an open database file."""
    opened = DatabaseFile(path)
    opened.open()
    yield opened
    opened.close()


@pytest.fixture
def garbage(path: Path) -> Path:
    """Return the path of a file that is no database."""
    path.write_bytes(b"garbage" * 100)
    return path


@pytest.fixture
def armed() -> Iterator[None]:
    """Disarm all failpoints when the test is over."""
    yield
    failpoints.configure("")


def contents(directory: Path) -> dict[str, bytes]:
    """Return every file below a directory."""
    return {
        str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()
    }


def refused(path: Path) -> ModelhostError:
    """Return the error of opening a database, which must leave all files as they are."""
    before = contents(path.parent)
    with pytest.raises(ModelhostError) as caught:
        DatabaseFile(path).open()
    assert contents(path.parent) == before
    return caught.value


# opening what cannot be used


def test_a_newer_schema_is_refused_and_left_alone(path: Path) -> None:
    """A database of a newer daemon is named with both versions and the next step; no byte changes."""
    file = DatabaseFile(path)
    file.open()
    file.close()
    edit_directly(path, "UPDATE meta SET value = '99' WHERE key = 'schema_version'")
    error = refused(path)
    assert error.reason is Reason.STORAGE_ERROR
    assert str(path) in error.message
    assert "schema version 99" in error.message
    assert f"up to {schema.VERSION}" in error.message
    assert "newer modelhostd" in error.message


def test_a_newer_schema_in_the_log_is_refused_and_left_alone(path: Path) -> None:
    """The same when the newer version stands only in the log of a daemon that was killed."""
    program = (
        "import os, sys; from pathlib import Path\n"
        "from modelhostd.adapters.database_file import DatabaseFile\n"
        "file = DatabaseFile(Path(sys.argv[1])); file.open()\n"
        "file._connection.execute(\"UPDATE meta SET value = '99' WHERE key = 'schema_version'\")\n"
        "os._exit(0)\n"
    )
    run(program, str(path))
    assert path.with_name(FILE_NAME + "-wal").stat().st_size > 0
    assert "schema version 99" in refused(path).message


@pytest.mark.parametrize("damage", ["garbage", "header", "pages", "truncated", "foreign", "row"])
def test_a_corrupt_database_is_refused_and_left_alone(path: Path, damage: str) -> None:
    """Whatever is broken, the error names the file and `modelhostd fsck --rebuild`."""
    file = DatabaseFile(path)
    file.open()
    for number in range(1, 40):
        model = replace(MODEL, id=f"m{number}", description="x" * 2000)
        file.commit(Batch((Change(Kind.MODEL, model.id, model),), ()))
    file.close()
    data = bytearray(path.read_bytes())
    if damage == "garbage":
        path.write_bytes(b"this is no database\n" * 500)
    elif damage == "header":
        path.write_bytes(b"\0" * 100 + data[100:])
    elif damage == "pages":
        path.write_bytes(data[:4096] + b"\xff" * (len(data) - 4096))
    elif damage == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "foreign":
        path.unlink()
        edit_directly(path, "CREATE TABLE other (a)")
    else:
        edit_directly(path, "UPDATE resources SET json = '{\"id\": 5}' WHERE key = 'm7'")
    error = refused(path)
    assert error.reason is Reason.STORAGE_ERROR
    assert str(path) in error.message
    assert "modelhostd fsck --rebuild" in error.message


def test_a_database_that_is_gone_is_not_replaced_in_silence(path: Path) -> None:
    """Where models lie beside it, or its log, a missing database is an error, not a new one."""
    (path.parent / "models" / "minilm").mkdir(parents=True)
    error = refused(path)
    assert "modelhostd fsck --rebuild" in error.message
    (path.parent / "models" / "minilm").rmdir()
    path.with_name(FILE_NAME + "-wal").write_bytes(b"x" * 100)
    assert "-wal is there" in refused(path).message
    assert not path.exists()


def test_an_interrupted_creation_is_no_corruption(path: Path) -> None:
    """A file without a byte, or without a table, is what a kill during creation leaves."""
    path.touch()
    DatabaseFile(path).open()
    path.unlink()
    for leftover in path.parent.glob(FILE_NAME + "-*"):
        leftover.unlink()
    edit_directly(path, "PRAGMA journal_mode = WAL")
    assert path.stat().st_size > 0
    file = DatabaseFile(path)
    assert file.open().last_sequence == 0
    file.close()


@pytest.mark.parametrize("what", ["directory", "file", "not a directory"])
def test_an_unwritable_home_is_a_permission_error(tmp_path: Path, what: str) -> None:
    """A home that the user may not write is PERMISSION_DENIED_ON_DISK with the path."""
    home = tmp_path / "home"
    home.mkdir()
    tmp_path.chmod(0o755)
    if what == "file":
        DatabaseFile(home / FILE_NAME).open()
        home.chmod(0o777)
        (home / FILE_NAME).chmod(0o444)
    elif what == "directory":
        home.chmod(0o555)
    else:
        home.rmdir()
        home.write_text("")
    program = (
        "import os, sys; from pathlib import Path\n"
        "from modelhostd.adapters.database_file import DatabaseFile\n"
        "from modelhostd.core.errors import ModelhostError\n"
        "if os.geteuid() == 0: os.setgid(65534); os.setgroups([]); os.setuid(65534)\n"
        "try: DatabaseFile(Path(sys.argv[1])).open()\n"
        "except ModelhostError as error: print(error.reason, error.metadata['path'])\n"
    )
    # The test's own directories are private, so the child enters through a descriptor.
    directory = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        done = subprocess.run(
            [sys.executable, "-c", program, f"/proc/self/fd/{directory}/home/{FILE_NAME}"],
            capture_output=True,
            text=True,
            check=True,
            pass_fds=[directory],
            env={**os.environ, "PYTHONPATH": str(ROOT / "server")},
        )
    finally:
        os.close(directory)
    expected = "STORAGE_ERROR" if what == "not a directory" else "PERMISSION_DENIED_ON_DISK"
    assert done.stdout.split() == [expected, f"/proc/self/fd/{directory}/home/{FILE_NAME}"]


async def test_after_a_failed_open_nothing_is_left_running(garbage: Path) -> None:
    """The thread ends, and closing is nothing."""
    database = SqliteDatabase(garbage)
    with pytest.raises(ModelhostError):
        await database.open()
    thread = database._thread
    assert thread is not None
    wait_until(lambda: not thread.is_alive())
    await database.close()


# other versions


def test_rows_of_an_older_version_load(file: DatabaseFile, path: Path) -> None:
    """Fields that are unknown are ignored, and those that are missing have their defaults."""
    file.commit(Batch((Change(Kind.SETTINGS, "host", Settings(queue_limit=7)),), ()))
    file.close()
    row = {"queue_limit": 8, "of_a_later_version": [1, 2]}
    edit_directly(path, f"UPDATE resources SET json = '{json.dumps(row)}'")
    again = DatabaseFile(path)
    assert again.open().resources[Kind.SETTINGS]["host"] == Settings(queue_limit=8)
    again.close()


def test_migrations_run_in_order_and_together(path: Path) -> None:
    """From version 1 to 3 both steps run; when the second fails neither has."""
    file = DatabaseFile(path)
    file.open()
    file.close()
    connection = sqlite3.connect(path, isolation_level=None)

    def first(c: sqlite3.Connection) -> None:
        c.execute("CREATE TABLE added (a)")

    def second(c: sqlite3.Connection) -> None:
        c.execute("INSERT INTO added VALUES (1)")

    def broken(c: sqlite3.Connection) -> None:
        c.execute("INSERT INTO nowhere VALUES (1)")

    with pytest.raises(sqlite3.OperationalError):
        schema.migrate(connection, {1: first, 2: broken}, 3)
    connection.execute("ROLLBACK")
    assert schema.version(connection) == 1
    assert connection.execute("SELECT * FROM sqlite_master WHERE name = 'added'").fetchall() == []
    schema.migrate(connection, {1: first, 2: second}, 3)
    assert schema.version(connection) == 3
    assert connection.execute("SELECT * FROM added").fetchall() == [(1,)]
    connection.close()


def test_an_older_database_is_migrated_when_opened(
    path: Path, monkeypatch: pytest.MonkeyPatch, armed: None
) -> None:
    """Opening migrates; a migration that the disk refuses leaves the old version usable."""
    file = DatabaseFile(path)
    file.open()
    file.commit(numbered(1))
    file.close()

    def step(connection: sqlite3.Connection) -> None:
        connection.execute("CREATE TABLE added (a)")

    monkeypatch.setattr(schema, "VERSION", schema.VERSION + 1)
    monkeypatch.setattr(
        schema.migrate, "__defaults__", ({schema.VERSION - 1: step}, schema.VERSION)
    )
    failpoints.configure("database.before_migration_commit=enospc@1")
    with pytest.raises(ModelhostError) as caught:
        DatabaseFile(path).open()
    assert caught.value.reason is Reason.INSUFFICIENT_DISK_SPACE
    stored = (again := DatabaseFile(path)).open()
    assert stored.resources[Kind.MODEL]["minilm"] == replace(MODEL, edit=1)
    assert again._connection is not None
    assert schema.version(again._connection) == schema.VERSION
    again.close()


KILLED_AT = """
import os, resource, signal, sys
from pathlib import Path
from modelhostd.adapters.database_check import look
from modelhostd.adapters.database_file import DatabaseFile

def die_at(path, size):
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    DatabaseFile(path).open()

kills = 0
for size in (0, 1, 511, 512, 513, 4095, 4096, 4097, 8192, 12_345, 20_000):
    path = Path(sys.argv[1]) / str(size) / "modelhost.db"
    path.parent.mkdir()
    child = os.fork()
    if child == 0:
        try:
            die_at(path, size)
        finally:
            os._exit(0)
    kills += os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGXFSZ
    assert not look(path, deep=True).findings, size
    file = DatabaseFile(path)
    assert file.open().store_id, size
    file.close()
print(kills)
"""


def test_a_kill_at_any_write_of_the_first_start_is_got_over(tmp_path: Path) -> None:
    """However little of a new database was written when the daemon was killed, the next one starts."""
    assert int(run(KILLED_AT, str(tmp_path))) > 5
