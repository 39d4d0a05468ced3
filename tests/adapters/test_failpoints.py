"""Failpoints: what a text arms, and that nothing happens without one."""

import errno
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from modelhostd.adapters import failpoints
from tests.adapters.database_support import ROOT

NAME = "database.before_commit"


@pytest.fixture(autouse=True)
def _disarmed() -> Iterator[None]:
    yield
    failpoints.configure("")


def outcomes(action: str, visits: int) -> list[int]:
    """Return the error number of each visit, 0 for none."""
    failpoints.configure(f"{NAME}={action}")
    found = []
    for _ in range(visits):
        try:
            failpoints.hit(NAME)
        except OSError as error:
            found.append(error.errno or -1)
        else:
            found.append(0)
    return found


def test_nothing_happens_by_default() -> None:
    """A point that is not armed does nothing, whatever else is."""
    failpoints.hit(NAME)
    failpoints.configure("database.after_commit=eio")
    failpoints.hit(NAME)


def test_a_process_without_the_variable_has_nothing_armed() -> None:
    """What is not asked for in the environment is not there, at any of the points."""
    program = (
        "from modelhostd.adapters import failpoints as f\n"
        "assert not f._armed\n"
        "for name in f.NAMES: f.hit(name)\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != failpoints.VARIABLE}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**environment, "PYTHONPATH": str(ROOT / "server")},
        check=False,
        timeout=200,
    )
    assert done.returncode == 0


def test_a_point_costs_one_look_while_nothing_is_armed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing armed: no lock is taken, no name looked up, no visit counted."""
    monkeypatch.setattr(failpoints, "_lock", None)
    monkeypatch.setattr(failpoints, "NAMES", None)
    failpoints.hit(NAME)


def test_the_daemon_only_visits() -> None:
    """The source visits each point that there is, and arms none: that is the environment's alone."""
    others = (p for p in (ROOT / "server").rglob("*.py") if p.name != "failpoints.py")
    texts = [text for p in others if "failpoints" in (text := p.read_text())]
    imported = {line for t in texts for line in t.splitlines() if "failpoints" in line}
    assert imported == {"from modelhostd.adapters.failpoints import hit"}
    visited = {name for text in texts for name in re.findall(r'\bhit\("([^"]+)"\)', text)}
    assert visited == set(failpoints.NAMES)


@pytest.mark.parametrize(
    ("action", "expected"),
    [
        ("enospc", [errno.ENOSPC, 0, 0, 0]),
        ("eio@2", [0, errno.EIO, 0, 0]),
        ("edquot@3+", [0, 0, errno.EDQUOT, errno.EDQUOT]),
        ("delay:1", [0, 0, 0, 0]),
    ],
)
def test_an_action_happens_at_its_visits(action: str, expected: list[int]) -> None:
    """Once at the first visit, once at the Nth, or from the Nth on."""
    assert outcomes(action, 4) == expected


def test_kill_ends_the_process_at_once() -> None:
    """The variable arms a point of a child, which dies by SIGKILL there."""
    done = subprocess.run(
        [sys.executable, "-c", f"from modelhostd.adapters.failpoints import hit; hit({NAME!r})"],
        env={**os.environ, "PYTHONPATH": str(ROOT / "server"), failpoints.VARIABLE: f"{NAME}=kill"},
        check=False,
        timeout=200,
    )
    assert done.returncode == -signal.SIGKILL


@pytest.mark.parametrize(
    "text", ["x=kill", f"{NAME}", f"{NAME}=", f"{NAME}=explode", f"{NAME}=eio@0"]
)
def test_a_typo_is_an_error(text: str) -> None:
    """An unknown name or action would test nothing in silence."""
    with pytest.raises(ValueError, match=failpoints.VARIABLE):
        failpoints.configure(text)
