"""What the programs that kill are given: a hub, a place for a home."""

import os
import shutil
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
