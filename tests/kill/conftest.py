"""What the programs that kill are given: a hub, a place for a home."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.loopback_hub import LoopbackHub
from tests.kill import mounting
from tests.kill.programs import memory, serving


@pytest.fixture
def hub() -> Iterator[LoopbackHub]:
    """A hub with small repositories that share a file, each in two revisions."""
    with serving() as hub:
        yield hub


@pytest.fixture
def root() -> Iterator[Path]:
    """A short path, in memory where there is room: SIGKILL takes nothing of it, and syncs cost nothing."""
    with memory() as path:
        yield path


@pytest.fixture
def disk(root: Path) -> Iterator[Path]:
    """A folder for images and a mount; skips where a file cannot be mounted."""
    if why := mounting.why_not(root):
        pytest.skip(why)
    yield root / "power"
    mounting.take_out(root / "power" / "disk")
