"""Copies of the source with one bug planted, and what of the harness is let loose on them."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.kill.programs import ROOT

PATCHES = Path(__file__).resolve().parent / "planted"
COPIED = ("server", "client", "bench", "tests")


class StalePatch(AssertionError):
    """A patch does not apply any more: the code around its bug has changed, and it must be made again."""


@dataclass(frozen=True)
class Bug:
    """A bug by its patch, the program that must find it within so many rounds, and what that says."""

    patch: str
    program: str
    rounds: int
    says: str


BUGS = (
    Bug("publish_before_commit", "kill_loop.py", 200, "was told of|acknowledged and lost"),
    Bug("resume_off_by_one", "kill_loop.py", 200, "opened at"),
    Bug("filter_drops_event", "kill_loop.py", 200, "the filter is wrong about event"),
    Bug("snapshot_ahead_of_its_bookmark", "kill_loop.py", 400, "the snapshot of '.*' and the log"),
    Bug("leftovers_stay", "kill_loop.py", 400, "a start left behind"),
    Bug("cancellation_swallowed", "kill_loop.py", 60, "cancelled and not gone"),
    Bug("unchecked_bytes_published", "kill_loop.py", 200, "half a model is visible"),
    Bug("journal_claims_more", "download_loop.py", 100, "claims wrong bytes|child ended by itself"),
    Bug("directory_not_synced", "durable.py", 20, "a power cut could take .*its name"),
    Bug("commit_not_synced", "power_cut.py", 60, "acknowledged and lost|was told of"),
    Bug("lock_outlives_its_daemon", "daemon_loop.py", 5, "is in use by process"),
)


@contextmanager
def copied() -> Iterator[Path]:
    """Give a copy of what the harness runs, outside of any repository."""
    place = Path(tempfile.mkdtemp(prefix="mh-planted-"))
    try:
        for name in COPIED:
            ignored = shutil.ignore_patterns("__pycache__", "gpu")
            shutil.copytree(ROOT / name, place / name, ignore=ignored)
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


def plant(source: Path, patch: str) -> None:
    """Change a copy of the source by a patch; raises StalePatch unless it fits exactly."""
    done = subprocess.run(
        ["git", "apply", "--verbose", str(PATCHES / f"{patch}.patch")],
        cwd=source,
        env={**os.environ, "GIT_CEILING_DIRECTORIES": str(source.parent)},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    # Inside a repository git would skip files that it does not know, and say that all is well.
    if done.returncode != 0 or "Applied patch" not in done.stderr:
        raise StalePatch(
            f"tests/kill/planted/{patch}.patch: {done.stderr.strip()}; plant the bug again"
        )
