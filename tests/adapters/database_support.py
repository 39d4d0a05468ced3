"""What the tests of the database share."""

import os
import sqlite3
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from modelhostd.core.resources import Event, Kind, Model, Source
from modelhostd.ports import Batch, Change

ROOT = Path(__file__).resolve().parent.parent.parent
MODEL = Model("minilm", "uid", Source("hf://o/m"), 1.0, 2.0)


def numbered(sequence: int, text: str = "") -> Batch:
    """Return a batch of one row and one event."""
    model = replace(MODEL, edit=sequence, description=text)
    return Batch(
        (Change(Kind.MODEL, model.id, model),),
        (Event(sequence, 1.0, Kind.MODEL, model.id, model),),
    )


def edit_directly(path: Path, *statements: str) -> None:
    """Run SQL on a database that nobody has open."""
    with sqlite3.connect(path, isolation_level=None) as connection:
        for statement in statements:
            connection.execute(statement)
    connection.close()


def run(program: str, *arguments: str) -> str:
    """Run a Python program with the same sources and return what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "server"), str(ROOT)])},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
