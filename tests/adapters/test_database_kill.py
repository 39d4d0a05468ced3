"""What is left of the database after ``kill -9``."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from modelhostd.adapters import failpoints
from modelhostd.adapters.database import FILE_NAME
from modelhostd.adapters.database_file import DatabaseFile
from modelhostd.core.resources import Event, Kind, Slot
from modelhostd.ports import Batch, Change

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent

COMMITTER = """
import sys
from pathlib import Path
from modelhostd.adapters.database_file import DatabaseFile
from modelhostd.core.resources import Event, Kind, Slot
from modelhostd.ports import Batch, Change

file = DatabaseFile(Path(sys.argv[1]))
last = file.open().last_sequence
for number in range(last + 1, last + 4):
    slot = Slot("image-gen", f"m{number}", 1.0)
    file.commit(Batch((Change(Kind.SLOT, slot.id, slot),), (Event(number, 1.0, Kind.SLOT, slot.id, slot),)))
    print(number, flush=True)
file.close()
"""


def environment(**extra: str) -> dict[str, str]:
    """Return the environment of a child that finds the same sources."""
    path = os.pathsep.join([str(ROOT / "server"), str(ROOT)])
    return {**os.environ, "PYTHONPATH": path, **extra}


def commit_three(path: Path, armed: str) -> tuple[int, list[int]]:
    """Let a child commit three events with failpoints; return its exit status and what it was told."""
    done = subprocess.run(
        [sys.executable, "-c", COMMITTER, str(path)],
        env=environment(**{failpoints.VARIABLE: armed}),
        stdout=subprocess.PIPE,
        text=True,
        check=False,
        timeout=200,
    )
    return done.returncode, [int(line) for line in done.stdout.split()]


def state(path: Path) -> tuple[int, str | None]:
    """Return the last sequence and the model of the slot, after checking that both agree."""
    file = DatabaseFile(path)
    stored = file.open()
    events = file.read_events(1, 256)
    file.close()
    assert [event.sequence for event in events] == list(range(1, stored.last_sequence + 1))
    slot = stored.resources[Kind.SLOT].get("image-gen")
    assert slot == (events[-1].resource if events else None)
    return stored.last_sequence, slot.model if isinstance(slot, Slot) else None


def test_every_acknowledged_commit_survives_a_hundred_kills(tmp_path: Path) -> None:
    """Children that commit are killed at random moments; nothing acknowledged is lost, no gap."""
    done = subprocess.run(
        [sys.executable, str(HERE / "database_kill_loop.py"), str(tmp_path), "100", "1"],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=250,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("armed", "told", "there"),
    [
        ("database.before_commit=kill@2", [1], 1),
        ("database.after_commit=kill@2", [1], 2),
        ("database.before_checkpoint=kill", [1, 2, 3], 3),
    ],
)
def test_a_kill_at_each_step_leaves_whole_commits(
    tmp_path: Path, armed: str, told: list[int], there: int
) -> None:
    """Before COMMIT nothing of a batch is left, after it everything, acknowledged or not."""
    path = tmp_path / FILE_NAME
    assert commit_three(path, armed) == (-signal.SIGKILL, told)
    assert state(path) == (there, f"m{there}")
    assert commit_three(path, "") == (0, [there + 1, there + 2, there + 3])
    assert state(path) == (there + 3, f"m{there + 3}")


def test_events_of_a_batch_are_all_there_or_none(tmp_path: Path) -> None:
    """A batch of many rows that dies before COMMIT leaves no row of it behind."""
    path = tmp_path / FILE_NAME
    file = DatabaseFile(path)
    file.open()
    slots = [Slot(f"s{n}", "m", 1.0) for n in range(100)]
    pid = os.fork()
    if pid == 0:
        failpoints.configure("database.before_commit=kill")
        file.commit(
            Batch(
                tuple(Change(Kind.SLOT, slot.id, slot) for slot in slots),
                tuple(Event(n, 1.0, Kind.SLOT, s.id, s) for n, s in enumerate(slots, start=1)),
            )
        )
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    file.close()
    assert state(path) == (0, None)
