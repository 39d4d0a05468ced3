"""Reading what others keep: opened segment by segment beneath a descriptor, links only within it.

For folders that the operator named and other programs fill. A symbolic link is followed while it stays
beneath the root (the snapshots of Hugging Face's cache are such links); one that leads out, and whatever
is neither a regular file nor a directory, is not opened at all.
"""

import errno
import os
import stat
from collections import deque
from collections.abc import Sequence

LINKS_MAX = 8

_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK


class LeadsOut(Exception):
    """A link on the way leads out of the root, or in a circle."""


class NotRegular(Exception):
    """It is a socket, a pipe or a device."""


def open_beneath(root: int, segments: Sequence[str]) -> int:
    """Open a regular file or a directory below an open directory, for reading; returns its descriptor.

    Raises LeadsOut, NotRegular, or OSError (ENOENT, EACCES, ENOTDIR ...).
    """
    pending = deque(segments)
    links = 0
    way = [os.dup(root)]
    try:
        while pending:
            segment = pending.popleft()
            if segment in {"", "."}:
                continue
            if segment == "..":
                # Only a link's target says this, and every directory on the way is a real one.
                if len(way) == 1:
                    raise LeadsOut
                os.close(way.pop())
                continue
            kind = os.stat(segment, dir_fd=way[-1], follow_symlinks=False).st_mode
            if stat.S_ISLNK(kind):
                links += 1
                target = os.readlink(segment, dir_fd=way[-1])
                if links > LINKS_MAX or target.startswith("/"):
                    raise LeadsOut
                pending.extendleft(reversed(target.split("/")))
            else:
                way.append(_open(segment, kind, way[-1]))
                if pending and not stat.S_ISDIR(kind):
                    raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        return os.dup(way[-1])
    finally:
        for fd in way:
            os.close(fd)


def open_regular_beneath(root: int, segments: Sequence[str]) -> int:
    """The same for a regular file only; raises NotRegular for a directory."""
    fd = open_beneath(root, segments)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise NotRegular
    return fd


def _open(segment: str, kind: int, directory: int) -> int:
    if not stat.S_ISREG(kind) and not stat.S_ISDIR(kind):
        raise NotRegular
    fd = os.open(segment, _FLAGS, dir_fd=directory)
    # It may have been exchanged since the look at it.
    if stat.S_IFMT(os.fstat(fd).st_mode) != stat.S_IFMT(kind):
        os.close(fd)
        raise NotRegular
    return fd
