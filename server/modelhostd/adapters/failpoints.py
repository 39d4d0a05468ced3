"""Named points where a test makes this process die, slow down or see a failing disk.

Inert unless ``MODELHOST_FAILPOINTS`` is set (read once, at import): then one dictionary look-up per
point. The text is ``name=action;name2=action``, each action one of

    kill          SIGKILL this process
    enospc        OSError(ENOSPC)
    eio           OSError(EIO)
    edquot        OSError(EDQUOT)
    delay:MS      block the thread for MS milliseconds

with ``@N`` = only the Nth time the point is reached (from 1), ``@N+`` = from the Nth time on, nothing =
every time: ``database.before_commit=enospc@3``. Idea: etcd's gofail, containerd's failpoint.
"""

import errno
import os
import re
import signal
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

VARIABLE = "MODELHOST_FAILPOINTS"

NAMES: dict[str, str] = {
    "database.before_commit": "rows and events are written, COMMIT has not run",
    "database.after_commit": "COMMIT has run, nobody was told (kill and delay only)",
    "database.before_checkpoint": "the write-ahead log is about to be copied into the database",
    "database.before_migration": "an older schema is about to be migrated",
    "database.before_migration_commit": "the migrations have run, COMMIT has not",
}
"""Every failpoint and what is true there. A name that is armed but not listed here is an error."""

_ERRNO = {"enospc": errno.ENOSPC, "eio": errno.EIO, "edquot": errno.EDQUOT}
_ACTION = re.compile(r"(kill|enospc|eio|edquot|delay:(\d{1,6}))(?:@([1-9]\d{0,8})(\+)?)?")


@dataclass
class _Armed:
    action: str
    delay_s: float
    first: int
    last: int | None
    hits: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def due(self) -> bool:
        with self.lock:
            self.hits += 1
            return self.hits >= self.first and (self.last is None or self.hits <= self.last)


def parse(text: str) -> Mapping[str, _Armed]:
    """Return what ``text`` arms. Raises ValueError naming the part that is wrong."""
    armed = {}
    for part in filter(None, (piece.strip() for piece in text.split(";"))):
        name, separator, action = part.partition("=")
        if name not in NAMES:
            raise ValueError(
                f"{VARIABLE}: no failpoint '{name}'; there are {', '.join(sorted(NAMES))}"
            )
        match = _ACTION.fullmatch(action)
        if not separator or match is None:
            raise ValueError(
                f"{VARIABLE}: '{part}': expected name=kill|enospc|eio|edquot|delay:MS, "
                "with @N or @N+ behind it or nothing"
            )
        nth = int(match[3] or 1)
        armed[name] = _Armed(
            action=match[1].partition(":")[0],
            delay_s=int(match[2] or 0) / 1000,
            first=nth,
            last=nth if match[3] and not match[4] else None,
        )
    return armed


_armed: dict[str, _Armed] = dict(parse(os.environ.get(VARIABLE, "")))


def arm(text: str) -> None:
    """Replace what is armed by ``text`` (empty: nothing), counting from zero; for tests."""
    armed = parse(text)
    _armed.clear()
    _armed.update(armed)


def failpoint(name: str) -> None:
    """Do what is armed at ``name``: nothing, usually. Raises OSError for the failing-disk actions."""
    if _armed and (point := _armed.get(name)) is not None and point.due():
        _act(name, point)


def _act(name: str, point: _Armed) -> None:
    if point.action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif point.action == "delay":
        time.sleep(point.delay_s)
    else:
        number = _ERRNO[point.action]
        raise OSError(number, os.strerror(number), f"failpoint {name}")
