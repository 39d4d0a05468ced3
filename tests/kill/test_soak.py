"""The soak: it ends when its time is up, says what it has seen, and fails at a finding with its seed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kill import programs
from tests.kill.planting import copied, plant


def soak(source: Path, *options: str) -> "subprocess.CompletedProcess[str]":
    """Run the soak of a checkout with seed 7."""
    paths = [str(source / name) for name in ("server", "client")]
    return subprocess.run(
        [sys.executable, str(source / "bench" / "soak.py"), "--seed", "7", *options],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


@pytest.mark.timeout(1050)
def test_it_counts_what_it_has_seen() -> None:
    """Some seconds of it are a run of each program that was asked for, and the sums."""
    done = soak(programs.ROOT, "--minutes", "0.15", "--only", "kill_loop.py")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "kill_loop.py 7000: " in done.stdout
    for counted in ("kills", "acknowledged changes checked", "clients were told, validated"):
        (line,) = (x for x in done.stdout.splitlines() if f" {counted} (" in x)
        assert int(line.split()[0].replace(",", "")) > 0, line
    assert done.stdout.endswith("nothing found\n")


@pytest.mark.timeout(1050)
def test_a_finding_ends_it_with_its_seed() -> None:
    """The first broken promise ends it long before the time is up, with exit code 1."""
    with copied() as source:
        plant(source, "publish_before_commit")
        done = soak(source, "--minutes", "60", "--only", "kill_loop.py")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "FOUND: kill_loop.py, seed 7000: " in done.stderr
    assert "nothing found" not in done.stdout
