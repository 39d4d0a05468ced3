"""Scratch folders for daemons that end."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A scratch folder whose path leaves room for a socket's name (107 bytes in all)."""
    path = Path(tempfile.mkdtemp(prefix="mh-"))
    yield path
    shutil.rmtree(path, ignore_errors=True)
