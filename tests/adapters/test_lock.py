"""One daemon a home."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from modelhostd.adapters.lock import HomeHeldError, HomeLock
from modelhostd.core.errors import ModelhostError, Reason
from tests.adapters.database_support import ROOT

HOLDER = """
import sys
from pathlib import Path
from modelhostd.adapters.lock import HomeHeldError, HomeLock
try:
    lock = HomeLock(Path(sys.argv[1]))
    lock.acquire()
except HomeHeldError as error:
    print(error, flush=True)
    sys.exit(error.exit_code)
print("held", flush=True)
{more}
sys.stdin.read()
"""


def holder(home: Path, more: str = "") -> subprocess.Popen[str]:
    """Start a process that takes the lock and keeps it until its stdin ends."""
    return subprocess.Popen(
        [sys.executable, "-c", HOLDER.format(more=more), str(home)],
        env={**os.environ, "PYTHONPATH": str(ROOT / "server")},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def said(process: subprocess.Popen[str]) -> str:
    """Return the first line that a process prints."""
    assert process.stdout is not None
    return process.stdout.readline().strip()


def finish(*processes: subprocess.Popen[str]) -> None:
    """End processes and close what they held."""
    for process in processes:
        process.communicate(timeout=200)


def test_the_second_ends_and_the_first_is_unharmed(tmp_path: Path) -> None:
    """Whoever comes second exits 75 with one line that names home and holder."""
    first = holder(tmp_path)
    assert said(first) == "held"
    second = holder(tmp_path)
    line = said(second)
    assert str(tmp_path) in line
    assert str(first.pid) in line
    finish(second)
    assert second.returncode == 75
    assert first.poll() is None
    with pytest.raises(HomeHeldError) as caught:
        HomeLock(tmp_path).acquire()
    assert caught.value.pid == first.pid
    finish(first)
    assert first.returncode == 0


def test_a_restart_right_after_a_kill_works(tmp_path: Path) -> None:
    """However often the holder is killed, the next one has the lock at once."""
    for _ in range(5):
        process = holder(tmp_path)
        assert said(process) == "held"
        process.send_signal(signal.SIGKILL)
        with HomeLock(tmp_path):
            pass
        finish(process)


def test_a_child_that_was_started_does_not_hold_the_lock_on(tmp_path: Path) -> None:
    """A worker outliving its killed daemon keeps no lock: the descriptor is closed at exec."""
    more = (
        "import subprocess\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import sys; sys.stdin.read()'], "
        "stdin=subprocess.PIPE, close_fds=False, stdout=subprocess.DEVNULL)\n"
        "print(child.pid, flush=True)"
    )
    process = holder(tmp_path, more)
    assert said(process) == "held"
    child = int(said(process))
    os.kill(child, 0)
    process.kill()
    with HomeLock(tmp_path):
        pass
    finish(process)


def test_the_home_is_made_and_is_private(tmp_path: Path) -> None:
    """A home that does not exist is made with its parents, for its owner only."""
    home = tmp_path / "a" / "b"
    with HomeLock(home) as lock:
        assert home.stat().st_mode & 0o777 == 0o700
        assert (home / "lock").stat().st_mode & 0o777 == 0o600
        assert (home / "lock").read_text() == f"{os.getpid()}\n"
        lock.acquire()
    lock.release()
    assert (home / "lock").exists()


def test_the_lock_can_be_taken_again_after_release(tmp_path: Path) -> None:
    """Release is enough; the file stays."""
    first = HomeLock(tmp_path)
    first.acquire()
    with pytest.raises(HomeHeldError):
        HomeLock(tmp_path).acquire()
    first.release()
    with HomeLock(tmp_path):
        pass


@pytest.mark.parametrize("content", ["", "nonsense", "9" * 40, "99999999"])
def test_a_holder_that_cannot_be_told_is_another_process(tmp_path: Path, content: str) -> None:
    """An empty or odd lock file costs no more than the name of the holder."""
    with HomeLock(tmp_path):
        (tmp_path / "lock").write_text(content)
        with pytest.raises(HomeHeldError) as caught:
            HomeLock(tmp_path).acquire()
    assert caught.value.pid == (99999999 if content == "99999999" else 0)
    assert str(tmp_path) in str(caught.value)


def test_a_home_that_cannot_be_used_is_a_typed_error(tmp_path: Path) -> None:
    """A file in the home's place, or a link in the lock's, is refused with the path."""
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelhostError) as caught:
        HomeLock(tmp_path / "file" / "home").acquire()
    assert caught.value.reason is Reason.STORAGE_ERROR
    assert caught.value.metadata["path"] == str(tmp_path / "file" / "home")
    (tmp_path / "lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ModelhostError):
        HomeLock(tmp_path).acquire()
    assert not (tmp_path / "elsewhere").exists()


def test_a_read_only_place_is_a_permission_error() -> None:
    """Where nothing can be made the error says whose the home must be."""
    with pytest.raises(ModelhostError) as caught:
        HomeLock(Path("/proc/modelhost")).acquire()
    assert caught.value.reason in {Reason.PERMISSION_DENIED_ON_DISK, Reason.STORAGE_ERROR}
    assert "/proc/modelhost" in caught.value.message
