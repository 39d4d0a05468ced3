"""The SQLite database: what the contract of the port does not say."""

import asyncio
import contextlib
import json
import os
import platform
import sqlite3
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from modelhostd.adapters import database_file, failpoints, schema
from modelhostd.adapters.database import FILE_NAME, SqliteDatabase
from modelhostd.adapters.database_file import DatabaseFile
from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.resources import Event, Kind, Model, Settings, Source
from modelhostd.ports import Batch, Change, RequestRecord
from tests.support import wait_until, wait_until_async

ROOT = Path(__file__).resolve().parent.parent.parent
MODEL = Model("minilm", "uid", Source("hf://o/m"), 1.0, 2.0)


def numbered(sequence: int, text: str = "") -> Batch:
    """Return a batch of one row and one event."""
    model = replace(MODEL, edit=sequence, description=text)
    return Batch(
        (Change(Kind.MODEL, model.id, model),),
        (Event(sequence, 1.0, Kind.MODEL, model.id, model),),
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Return where the database of a test is."""
    return tmp_path / FILE_NAME


@pytest.fixture
async def database(path: Path) -> AsyncIterator[SqliteDatabase]:
    """Yield an open database."""
    opened = SqliteDatabase(path, idle_s=0.01)
    await opened.open()
    yield opened
    await opened.close()


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
    failpoints.arm("")


def open_files() -> list[str]:
    """Return what the descriptors of this process point to."""
    found = []
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the descriptor of the listing itself is gone
            found.append(os.readlink(f"/proc/self/fd/{number}"))
    return found


def edit_directly(path: Path, *statements: str) -> None:
    """Run SQL on a database that nobody has open."""
    with sqlite3.connect(path, isolation_level=None) as connection:
        for statement in statements:
            connection.execute(statement)
    connection.close()


def contents(directory: Path) -> dict[str, bytes]:
    """Return every file below a directory."""
    return {
        str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()
    }


def run(program: str, *arguments: str) -> str:
    """Run a Python program with the same sources and return what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "server"), str(ROOT)])},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def refused(path: Path) -> ModelhostError:
    """Return the error of opening a database, which must leave all files as they are."""
    before = contents(path.parent)
    with pytest.raises(ModelhostError) as caught:
        DatabaseFile(path).open()
    assert contents(path.parent) == before
    return caught.value


# one process, one connection


async def test_the_database_is_two_open_files(database: SqliteDatabase, path: Path) -> None:
    """One descriptor for the database, one for its log, and no shared memory: one connection."""
    await database.commit(numbered(1))
    ours = sorted(name for name in open_files() if name.startswith(str(path.parent)))
    assert ours == [str(path), f"{path}-wal"]
    assert not path.with_name(FILE_NAME + "-shm").exists()


async def test_another_process_is_shut_out(database: SqliteDatabase, path: Path) -> None:
    """While it is open no other process can read the database, not even before the first commit."""
    program = (
        "import sqlite3, sys\n"
        "try: sqlite3.connect(sys.argv[1], timeout=0).execute('SELECT * FROM meta').fetchall()\n"
        "except sqlite3.OperationalError as error: print(error)\n"
    )
    assert run(program, str(path)) == "database is locked\n"


def test_settings_of_the_connection(file: DatabaseFile, path: Path) -> None:
    """A commit is written through to the disk: WAL, synchronous=FULL, exclusive, owner only."""
    connection = file._connection
    assert connection is not None
    read = [
        connection.execute(f"PRAGMA {name}").fetchone()[0]
        for name in ("journal_mode", "synchronous", "locking_mode")
    ]
    assert read == ["wal", 2, "exclusive"]
    assert path.stat().st_mode & 0o777 == 0o600


async def test_opening_twice_is_refused(database: SqliteDatabase) -> None:
    """A database object is opened once."""
    with pytest.raises(ModelhostError):
        await database.open()


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
    failpoints.arm("database.before_migration_commit=enospc@1")
    with pytest.raises(ModelhostError) as caught:
        DatabaseFile(path).open()
    assert caught.value.reason is Reason.INSUFFICIENT_DISK_SPACE
    stored = (again := DatabaseFile(path)).open()
    assert stored.resources[Kind.MODEL]["minilm"] == replace(MODEL, edit=1)
    assert again._connection is not None
    assert schema.version(again._connection) == schema.VERSION
    again.close()


# commits that fail


@pytest.mark.parametrize(
    ("action", "reason"),
    [
        ("enospc", Reason.INSUFFICIENT_DISK_SPACE),
        ("edquot", Reason.INSUFFICIENT_DISK_SPACE),
        ("eio", Reason.STORAGE_ERROR),
    ],
)
async def test_a_failed_commit_leaves_nothing_and_the_next_works(
    database: SqliteDatabase, path: Path, armed: None, action: str, reason: Reason
) -> None:
    """A commit that the disk refuses is typed, stores nothing, and its numbers are used again."""
    await database.commit(numbered(1))
    failpoints.arm(f"database.before_commit={action}@1")
    with pytest.raises(ModelhostError) as caught:
        await database.commit(numbered(2))
    assert caught.value.reason is reason
    assert caught.value.metadata["path"] == str(path)
    assert [event.sequence for event in await database.read_events(1, 10)] == [1]
    await database.commit(numbered(2, "again"))
    assert [event.sequence for event in await database.read_events(1, 10)] == [1, 2]


def test_a_full_disk_says_what_was_needed_and_what_is_free(file: DatabaseFile) -> None:
    """SQLite's own "database is full" becomes INSUFFICIENT_DISK_SPACE with numbers."""
    connection = file._connection
    assert connection is not None
    pages = connection.execute("PRAGMA page_count").fetchone()[0]
    connection.execute(f"PRAGMA max_page_count = {pages}").fetchall()
    with pytest.raises(ModelhostError) as caught:
        file.commit(numbered(1, "x" * 100_000))
    assert caught.value.reason is Reason.INSUFFICIENT_DISK_SPACE
    assert int(caught.value.metadata["neededBytes"]) > 200_000
    assert int(caught.value.metadata["freeBytes"]) > 0
    assert list(file.read_events(0, 10)) == []
    file.commit(numbered(1))


def test_a_write_that_fails_inside_commit_leaves_nothing(path: Path) -> None:
    """When the kernel refuses the log's bytes, a killed daemon does not find the commit later."""
    program = (
        "import os, resource, signal, sys; from pathlib import Path\n"
        "from modelhostd.adapters.database_file import DatabaseFile\n"
        "from modelhostd.core.errors import ModelhostError\n"
        "from tests.adapters.test_database import numbered\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "path = Path(sys.argv[1]); file = DatabaseFile(path); file.open(); file.commit(numbered(1))\n"
        "soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (file.wal_path.stat().st_size + 20000, hard))\n"
        "try: file.commit(numbered(2, 'x' * 100000))\n"
        "except ModelhostError as error: print(error.reason, error.metadata['cause'])\n"
        "file.commit(numbered(2, 'small'))\n"
        "os._exit(0)\n"
    )
    assert run(program, str(path)).startswith("STORAGE_ERROR")
    file = DatabaseFile(path)
    stored = file.open()
    assert stored.resources[Kind.MODEL]["minilm"] == replace(MODEL, edit=2, description="small")
    assert stored.last_sequence == 2
    assert file.integrity_errors() == []
    file.close()


# Makes every later fsync of the process fail, as a dying disk does: a filter on system calls that
# answers EIO (struct sock_filter; numbers of x86_64 and aarch64).
NO_FSYNC = """
import ctypes, errno, platform, struct
numbers = {"x86_64": (74, 75), "aarch64": (82, 83)}[platform.machine()]
rules = [(0x20, 0, 0, 0)]
rules += [(0x15, 0, 1, n) if k == 0 else (0x06, 0, 0, 0x50000 | errno.EIO)
          for n in numbers for k in (0, 1)]
rules += [(0x06, 0, 0, 0x7FFF0000)]
code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *rule) for rule in rules))
program = struct.pack("HxxxxxxP", len(rules), ctypes.addressof(code))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, ctypes.create_string_buffer(program), 0, 0) == 0, ctypes.get_errno()
"""


@pytest.mark.skipif(platform.machine() not in {"x86_64", "aarch64"}, reason="system call numbers")
def test_a_commit_whose_fsync_failed_does_not_come_back_after_a_kill(path: Path) -> None:
    """The failed commit is whole in the log; it is overwritten there, so a restart finds it not."""
    done = run(
        "import os, sys; from pathlib import Path\n"
        "from modelhostd.adapters.database_file import DatabaseFile\n"
        "from modelhostd.core.errors import ModelhostError\n"
        "from tests.adapters.test_database import NO_FSYNC, numbered\n"
        "file = DatabaseFile(Path(sys.argv[1])); file.open(); file.commit(numbered(1))\n"
        "exec(NO_FSYNC)\n"
        "try: file.commit(numbered(2))\n"
        "except ModelhostError as error: print(error.reason, error.metadata['cause'])\n"
        "os._exit(0)\n",
        str(path),
    )
    assert done.startswith("STORAGE_ERROR disk I/O error (SQLITE_IOERR_FSYNC)")
    file = DatabaseFile(path)
    assert file.open().last_sequence == 1
    file.close()


# the thread


async def test_commits_go_before_reads_that_wait(database: SqliteDatabase, armed: None) -> None:
    """A read asked for first is answered after the commits that came while the thread was busy."""
    order: list[str] = []

    async def read() -> None:
        await database.read_events(1, 10)
        order.append("read")

    async def commit(number: int) -> None:
        await database.commit(numbered(number))
        order.append(f"commit {number}")

    busy = threading.Event()
    database._put(database._commits, busy.wait)
    tasks = [asyncio.create_task(read()), *(asyncio.create_task(commit(n)) for n in (1, 2, 3))]
    await asyncio.sleep(0)
    busy.set()
    await asyncio.gather(*tasks)
    assert order == ["commit 1", "commit 2", "commit 3", "read"]


async def test_waiting_calls_are_bounded(
    database: SqliteDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many commits are asked for, only so many lie before the thread; all are stored."""
    monkeypatch.setattr(database, "_commit_slots", asyncio.Semaphore(4))
    busy = threading.Event()
    database._put(database._commits, busy.wait)
    tasks = [asyncio.create_task(database.commit(numbered(n))) for n in range(1, 21)]
    for _ in range(10):
        await asyncio.sleep(0)
    assert len(database._commits) <= 5
    busy.set()
    await asyncio.gather(*tasks)
    assert len(await database.read_events(1, 100)) == 20


async def test_the_log_is_copied_when_nothing_is_to_do(
    database: SqliteDatabase, path: Path
) -> None:
    """After a short idle time the database file itself holds what was committed."""
    await database.commit(numbered(1, "a text that can be found"))
    await wait_until_async(lambda: b"a text that can be found" in path.read_bytes())


async def test_a_checkpoint_that_fails_is_no_failure(
    database: SqliteDatabase, armed: None, caplog: pytest.LogCaptureFixture
) -> None:
    """A failed checkpoint is logged and the database goes on; the data are in the log."""
    failpoints.arm("database.before_checkpoint=eio@1")
    await database.commit(numbered(1))
    await wait_until_async(lambda: "checkpoint" in caplog.text)
    await database.commit(numbered(2))
    assert len(await database.read_events(1, 10)) == 2


async def test_close_leaves_one_file(path: Path) -> None:
    """A clean end leaves the database alone, without a log."""
    database = SqliteDatabase(path)
    await database.open()
    await database.commit(numbered(1))
    await database.close()
    assert [p.name for p in path.parent.iterdir()] == [FILE_NAME]


def test_the_log_is_bounded_without_an_idle_moment(
    file: DatabaseFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Commits without a pause let the log grow to its bound and not beyond."""
    assert file._connection is not None
    file._connection.execute("PRAGMA wal_autocheckpoint = 50").fetchall()
    sizes = []
    for number in range(1, 200):
        file.commit(numbered(number, "x" * 5000))
        sizes.append(file.wal_path.stat().st_size)
    assert max(sizes) < 100 * 4200


def test_only_the_newest_requests_are_kept(
    file: DatabaseFile, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The table of request ids has a bound; the oldest go."""
    monkeypatch.setattr(database_file, "MAX_REQUESTS", 5)
    for number in range(12):
        file.commit(Batch((), (), (RequestRecord(f"r{number}", "f", "a", 1.0),)))
    file.close()
    stored = (again := DatabaseFile(path)).open()
    assert [record.request_id for record in stored.requests] == [f"r{n}" for n in range(7, 12)]
    again.close()


def test_opening_reads_no_events(file: DatabaseFile, path: Path) -> None:
    """An event that cannot be read costs its page of the history, not the start of the daemon."""
    for number in range(1, 4):
        file.commit(numbered(number))
    file.close()
    edit_directly(path, "UPDATE events SET resource = 'not json' WHERE sequence = 2")
    again = DatabaseFile(path)
    assert again.open().last_sequence == 3
    with pytest.raises(ModelhostError) as caught:
        again.read_events(1, 10)
    assert caught.value.reason is Reason.STORAGE_ERROR
    assert [event.sequence for event in again.read_events(3, 10)] == [3]
    again.close()
