"""Named points where a test makes this process die, wait, or see a failing disk.

Inert unless ``MODELHOST_FAILPOINTS`` is set (read once, at import): then a dictionary look-up at each
point. The text is ``name=action;name2=action``, each action one of

    kill          SIGKILL to this process, as a power cut would look to it
    enospc        OSError(ENOSPC)
    eio           OSError(EIO)
    edquot        OSError(EDQUOT)
    delay:MS      the thread waits for MS milliseconds

and happens at the first visit, with ``@N`` at the Nth (from 1), with ``@N+`` at the Nth and every later
one: ``database.before_commit=enospc@3``. Idea: etcd's gofail, containerd's failpoint.
"""

import errno
import os
import re
import signal
import threading
import time

from modelhostd.core.values import dataclass

VARIABLE = "MODELHOST_FAILPOINTS"

NAMES = (
    # The way of a commit: rows are written, COMMIT has run (kill and delay only), the log is copied.
    "database.before_commit",
    "database.after_commit",
    "database.before_checkpoint",
    "database.before_migration",
    "database.before_migration_commit",
    # The way of a download, in its order.
    "part.journal",
    "part.opened",
    "part.written",
    "part.marked",
    "part.synced",
    "part.complete",
    "verified.renamed",
    "verified.dir_synced",
    "publish.begin",
    "publish.blob_renamed",
    "publish.blobs_synced",
    "publish.tree_linked",
    "publish.manifest_synced",
    "publish.tree_synced",
    "publish.tree_renamed",
    "publish.done",
    "delete.begin",
    "delete.renamed",
    "delete.unlinked",
    "delete.done",
)

_ERRNO = {"enospc": errno.ENOSPC, "eio": errno.EIO, "edquot": errno.EDQUOT}
_ACTION = re.compile(r"(kill|enospc|eio|edquot|delay:(\d{1,6}))(?:@([1-9]\d{0,8})(\+)?)?")


@dataclass
class _Armed:
    action: str
    delay_s: float
    first: int
    last: int | None
    visits: int = 0


def _parse(text: str) -> dict[str, _Armed]:
    armed = {}
    for part in filter(None, (piece.strip() for piece in text.split(";"))):
        name, _, action = part.partition("=")
        match = _ACTION.fullmatch(action)
        if name not in NAMES:
            raise ValueError(f"{VARIABLE}: no failpoint {name!r}; there are {', '.join(NAMES)}")
        if match is None:
            raise ValueError(
                f"{VARIABLE}: {part!r}: expected NAME=kill|enospc|eio|edquot|delay:MS, and behind it "
                "nothing, @N or @N+"
            )
        first = int(match[3] or 1)
        armed[name] = _Armed(
            action=match[1].partition(":")[0],
            delay_s=int(match[2] or 0) / 1000,
            first=first,
            last=None if match[4] else first,
        )
    return armed


_lock = threading.Lock()
_armed = _parse(os.environ.get(VARIABLE, ""))


def configure(text: str) -> None:
    """Replace what happens by ``text`` (empty: nothing), counting from zero.

    Raises ValueError for an unknown name or action.
    """
    armed = _parse(text)
    with _lock:
        _armed.clear()
        _armed.update(armed)


def hit(name: str) -> None:
    """Pass a failpoint: nothing, unless it was configured. Raises OSError for a failing disk."""
    if not _armed:
        return
    assert name in NAMES, name
    with _lock:
        point = _armed.get(name)
        if point is None:
            return
        point.visits += 1
        if point.visits < point.first or (point.last is not None and point.visits > point.last):
            return
    if point.action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif point.action == "delay":
        time.sleep(point.delay_s)
    else:
        raise OSError(_ERRNO[point.action], f"failpoint {name}")
