"""The daemon as a process: one per home, ends when asked, comes back after a kill, says what is wrong."""

import contextlib
import os
import signal
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from modelhost import Client, ModelhostError
from tests.e2e.process import Daemon, DaemonFailed
from tests.support import DEADLINE_S, wait_until

Make = Callable[..., Daemon]


def _spawn(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "modelhostd", *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )


def test_a_second_daemon_exits_and_the_first_goes_on(daemon: Daemon) -> None:
    """The second daemon of a home exits 75 naming the first, whose socket keeps serving."""
    second = _spawn("--home", str(daemon.home), "--grpc", daemon.target)
    assert second.returncode == 75
    assert str(daemon.pid) in second.stderr
    with Client(daemon.target) as client:
        assert client.host().pid == daemon.pid


def test_sigterm_ends_it_with_zero(daemon: Daemon) -> None:
    """SIGTERM ends an idle daemon with exit code 0 and leaves no socket that answers."""
    assert daemon.stop() == 0
    with pytest.raises(OSError), socket.socket(socket.AF_UNIX) as probe:
        probe.connect(daemon.target.removeprefix("unix:"))


def test_what_was_acknowledged_survives_a_kill(make_daemon: Make) -> None:
    """A model that was created is there after kill -9, and the next daemon starts at once."""
    first = make_daemon().start()
    with Client(first.target) as client:
        client.add("hf://org/one")
    first.kill()
    with make_daemon() as again, Client(again.target) as client:
        assert [m.name for m in client.models()] == ["models/one"]


def test_fsck_waits_for_no_daemon(daemon: Daemon) -> None:
    """fsck of a home in use exits 75; of the same home after the daemon's end it finds it clean."""
    assert _spawn("fsck", "--home", str(daemon.home)).returncode == 75
    daemon.stop()
    checked = _spawn("fsck", "--home", str(daemon.home))
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_a_public_address_is_refused(short_path: Path) -> None:
    """Without TLS and authentication the daemon serves loopback and unix sockets only."""
    refused = _spawn("--home", str(short_path / "h"), "--grpc", "0.0.0.0:7411")
    assert refused.returncode == 78
    assert "0.0.0.0" in refused.stderr
    assert refused.stderr.count("\n") == 1


def test_a_typo_in_a_key_names_the_nearest_one(short_path: Path) -> None:
    """An unknown key is an error that names the key that was probably meant."""
    refused = _spawn("--home", str(short_path / "h"), "--set", "limits.max_conections=9")
    assert refused.returncode == 78
    assert "limits.max_connections" in refused.stderr


def test_a_home_that_cannot_be_written_is_named(short_path: Path) -> None:
    """A home below a file is one clear line, not a traceback."""
    (short_path / "file").write_text("")
    refused = _spawn("--home", str(short_path / "file" / "home"))
    assert refused.returncode in (1, 78)
    assert str(short_path / "file") in refused.stderr
    assert "Traceback" not in refused.stderr


def test_a_port_in_use_is_named(make_daemon: Make) -> None:
    """A port that another process serves is one clear line, and the home is left in order."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(DaemonFailed) as caught:
            make_daemon("--grpc", f"127.0.0.1:{port}").start()
    assert str(port) in str(caught.value)
    assert "Traceback" not in str(caught.value)
    with make_daemon() as daemon, Client(daemon.target) as client:
        assert client.host().pid == daemon.pid


@pytest.mark.parametrize("content", [b"not a database at all" * 100, b"SQLite format 3\x00garbage"])
def test_a_corrupt_database_is_named_and_left_alone(make_daemon: Make, content: bytes) -> None:
    """A broken database stops the start with the next step, and the file stays as it was."""
    daemon = make_daemon()
    daemon.home.mkdir()
    database = daemon.home / "modelhost.db"
    database.write_bytes(content)
    with pytest.raises(DaemonFailed) as caught:
        daemon.start()
    assert "fsck" in str(caught.value)
    assert "Traceback" not in str(caught.value)
    assert database.read_bytes() == content


def test_a_database_of_a_newer_daemon_is_named_and_left_alone(make_daemon: Make) -> None:
    """An older daemon never opens what it may not understand, and the newer one finds it as it was."""
    daemon = make_daemon()
    daemon.start()
    assert daemon.stop() == 0
    database = daemon.home / "modelhost.db"
    with contextlib.closing(sqlite3.connect(database)) as edited, edited:
        edited.execute("UPDATE meta SET value = '99' WHERE key = 'schema_version'")
    content = database.read_bytes()
    with pytest.raises(DaemonFailed) as caught:
        daemon.start()
    assert "newer modelhostd" in str(caught.value)
    assert "Traceback" not in str(caught.value)
    assert database.read_bytes() == content


def test_sighup_takes_up_what_can_change(make_daemon: Make, short_path: Path) -> None:
    """SIGHUP reads the file again: live keys act, and a broken file changes nothing."""
    file = short_path / "modelhostd.toml"
    file.write_text("[settings]\nqueue_limit = 5\n")
    daemon = make_daemon("--config", str(file)).start()
    with Client(daemon.target) as client:
        assert client.settings().queue_limit == 5
        watch = client.watch(snapshot=False)
        next(watch)
        file.write_text("[settings]\nqueue_limit = 6\n")
        os.kill(daemon.pid, signal.SIGHUP)
        event = next(watch)
        assert getattr(event, "name", "") == "settings"
        assert client.settings().queue_limit == 6
    assert daemon.stop() == 0


def test_a_hangup_before_it_is_ready_is_harmless(make_daemon: Make) -> None:
    """A reload that is asked for while the daemon starts neither ends it nor is an error."""
    daemon = make_daemon()
    process = daemon.spawn()
    wait_until(lambda: ignores(process.pid, signal.SIGHUP))
    os.kill(process.pid, signal.SIGHUP)
    with Client(daemon.target) as client:
        wait_until(lambda: serves(client))
    assert daemon.stop() == 0


def ignores(pid: int, number: int) -> bool:
    """Whether a process ignores a signal now."""
    status = Path(f"/proc/{pid}/status").read_text()
    mask = next(line.split()[1] for line in status.splitlines() if line.startswith("SigIgn"))
    return bool(int(mask, 16) >> (number - 1) & 1)


def serves(client: Client) -> bool:
    """Whether the daemon answers."""
    try:
        return bool(client.host().version)
    except ModelhostError:
        return False


@pytest.mark.parametrize("flag", ["--hom", "--log"])
def test_a_shortened_flag_is_refused(make_daemon: Make, flag: str) -> None:
    """A flag means what it says: a prefix of one would change its meaning with the next version."""
    daemon = make_daemon(flag, "x")
    assert daemon.spawn().wait(DEADLINE_S) == 2
    assert "unrecognized arguments" in daemon.log


def test_the_copy_of_the_registry_can_be_imported(make_daemon: Make) -> None:
    """What a daemon leaves in registry.json makes the same models in another home."""
    with make_daemon() as first, Client(first.target) as client:
        client.add("hf://org/one")
        client.add("hf://org/two", name="second")
    document = (first.home / "registry.json").read_bytes()
    with make_daemon(name="e") as other, Client(other.admin) as operator:
        operator.import_registry(document)
        assert [m.name for m in operator.models()] == ["models/one", "models/second"]
