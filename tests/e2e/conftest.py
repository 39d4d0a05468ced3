"""Daemons for end-to-end tests; each ends with its test."""

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.process import Daemon


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A scratch folder whose path leaves room for a socket's name (107 bytes in all)."""
    path = Path(tempfile.mkdtemp(prefix="mh-"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def make_daemon(short_path: Path) -> Iterator[Callable[..., Daemon]]:
    """Make daemons, not started yet; whatever still runs at the end of the test is killed."""
    made: list[Daemon] = []

    def make(*flags: str, name: str = "d", **environment: str) -> Daemon:
        daemon = Daemon(short_path / name, flags=flags, environment=environment)
        daemon.root.mkdir(exist_ok=True)
        made.append(daemon)
        return daemon

    yield make
    for daemon in made:
        if daemon.process is not None and daemon.process.poll() is None:
            daemon.kill()


@pytest.fixture
def daemon(make_daemon: Callable[..., Daemon]) -> Iterator[Daemon]:
    """A running daemon with defaults."""
    with make_daemon() as running:
        yield running
