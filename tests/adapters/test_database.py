"""The SQLite database: what the contract of the port does not say."""

import asyncio
import contextlib
import os
import platform
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from modelhostd.adapters import database_file, failpoints
from modelhostd.adapters.database import FILE_NAME, SqliteDatabase
from modelhostd.adapters.database_file import DatabaseFile
from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.resources import Kind
from modelhostd.ports import Batch, RequestRecord
from tests.adapters.database_support import MODEL, edit_directly, numbered, run
from tests.support import wait_until_async


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
def armed() -> Iterator[None]:
    """Disarm all failpoints when the test is over."""
    yield
    failpoints.configure("")


def open_files() -> list[str]:
    """Return what the descriptors of this process point to."""
    found = []
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the descriptor of the listing itself is gone
            found.append(os.readlink(f"/proc/self/fd/{number}"))
    return found


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
    failpoints.configure(f"database.before_commit={action}@1")
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
        "from tests.adapters.database_support import numbered\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "path = Path(sys.argv[1]); file = DatabaseFile(path); file.open(); file.commit(numbered(1))\n"
        "soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (file.wal_path.stat().st_size + 20000, hard))\n"
        "try: file.commit(numbered(2, 'x' * 100000))\n"
        "except ModelhostError as error: print(error.reason, error.metadata['cause'], flush=True)\n"
        "file.commit(numbered(2, 'small'))\n"
        "os._exit(0)\n"
    )
    assert run(program, str(path)).startswith("STORAGE_ERROR")
    file = DatabaseFile(path)
    stored = file.open()
    assert stored.resources[Kind.MODEL]["minilm"] == replace(MODEL, edit=2, description="small")
    assert stored.last_sequence == 2
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
        "from tests.adapters.database_support import numbered; from tests.adapters.test_database import NO_FSYNC\n"
        "file = DatabaseFile(Path(sys.argv[1])); file.open(); file.commit(numbered(1))\n"
        "exec(NO_FSYNC)\n"
        "try: file.commit(numbered(2))\n"
        "except ModelhostError as error: print(error.reason, error.metadata['cause'], flush=True)\n"
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
    failpoints.configure("database.before_checkpoint=eio@1")
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
