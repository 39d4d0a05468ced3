"""What the programs that kill are given: a hub, a place for a home."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.loopback_hub import LoopbackHub
from tests.kill.programs import serving

MEMORY = Path("/dev/shm")


@pytest.fixture
def hub() -> Iterator[LoopbackHub]:
    """A hub with small repositories that share a file, each in two revisions."""
    with serving() as hub:
        yield hub


@pytest.fixture
def root() -> Iterator[Path]:
    """A short path, in memory where there is room: SIGKILL takes nothing of it, and syncs cost nothing."""
    memory = MEMORY if os.access(MEMORY, os.W_OK) else None
    path = Path(tempfile.mkdtemp(prefix="mh-kill-", dir=memory))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def disk(root: Path) -> Iterator[Path]:
    """A folder for images and a mount; skips where a file cannot be mounted."""
    if os.geteuid() != 0:
        pytest.skip("a loop mount needs root")
    image, mounted = root / "probe", root / "probed"
    mounted.mkdir()
    with image.open("wb") as file:
        file.truncate(8 << 20)
    for command in (
        ["mkfs.ext4", "-q", "-F", str(image)],
        ["mount", "-o", "loop", str(image), str(mounted)],
        ["umount", str(mounted)],
    ):
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=30)
        except FileNotFoundError:
            pytest.skip(f"{command[0]} is not present")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no loop mounts here: {command[0]}: {error.stderr.strip()}")
    yield root / "power"
    # A program that was ended from outside leaves its disk mounted.
    subprocess.run(["umount", str(root / "power" / "disk")], check=False, capture_output=True)
