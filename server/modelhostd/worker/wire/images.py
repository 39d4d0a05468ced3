"""The memory for images of one place of a worker: a sealed memfd that outlives its workers.

The daemon makes and holds it, and never maps it: what a worker writes there cannot harm it. Its size is fixed by seals, so
nobody can truncate it under a reader (that would be a SIGBUS); a hole reads as zeros. It is sparse and far larger
than any memory: addresses, of which only what is written takes RAM.
"""

import ctypes
import mmap
import os
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from modelhostd.core.values import dataclass
from modelhostd.worker.wire import arena

SPACE_BYTES = 2**42
"""Addresses, not memory: 4 TiB, from which ranges are taken."""
PAGE_BYTES = mmap.PAGESIZE
DESCRIPTION_MAX_BYTES = 64 * 2**20
"""Of 100 bytes for each tensor: no model comes near it."""
CHECKSUM_MAX_BYTES = 64

_KEEP_SIZE, _PUNCH_HOLE = 0x01, 0x02


class Range(NamedTuple):
    """Bytes of the memory; ``start`` is at the begin of a page."""

    start: int
    length: int

    @property
    def page_end(self) -> int:
        """Where the next page begins."""
        return -(-(self.start + self.length) // PAGE_BYTES) * PAGE_BYTES


@dataclass(frozen=True, slots=True)
class Kept:
    """An image that was whole, read-only and hashed: its weights, what lies where among them, and the checksum of both."""

    weights: Range
    description: Range
    checksum: bytes

    @property
    def ranges(self) -> tuple[Range, Range]:
        """Both ranges."""
        return self.weights, self.description

    def sound(self, weights_max_bytes: int) -> bool:
        """Whether these numbers can be of an image of at most so many bytes: they come from the other end."""
        return (
            0 < self.weights.length <= weights_max_bytes
            and 0 < self.description.length <= DESCRIPTION_MAX_BYTES
            and 0 < len(self.checksum) <= CHECKSUM_MAX_BYTES
            and all(r.start % PAGE_BYTES == 0 and r.page_end <= SPACE_BYTES for r in self.ranges)
            and not overlap(self.ranges)
        )


def create(name: str) -> int:
    """Return the descriptor of new memory, close-on-exec and sealed. Raises ``OSError``."""
    return arena.create(name, SPACE_BYTES)


def punch_all_but(fd: int, kept: Iterable[Range]) -> None:
    """Give all memory back but that of ``kept``. Takes up to a second per GiB: call it in a thread. Raises ``OSError``."""
    for gap in gaps(kept):
        punch(fd, gap)


def punch(fd: int, whole: Range) -> None:
    """Give the memory of whole pages back; they read as zeros. In a thread, as above. Raises ``OSError``."""
    libc = ctypes.CDLL(None, use_errno=True)
    start, length = ctypes.c_int64(whole.start), ctypes.c_int64(whole.page_end - whole.start)
    if libc.fallocate(fd, _KEEP_SIZE | _PUNCH_HOLE, start, length) != 0:
        raise OSError(ctypes.get_errno(), "no hole could be punched into the memory for images")


def gaps(kept: Iterable[Range]) -> Iterator[Range]:
    """Yield what lies between the pages of ``kept``, before and behind them."""
    end = 0
    for part in sorted(kept):
        if part.start > end:
            yield Range(end, part.start - end)
        end = max(end, part.page_end)
    if end < SPACE_BYTES:
        yield Range(end, SPACE_BYTES - end)


def overlap(ranges: Iterable[Range]) -> bool:
    """Whether any two share a page."""
    end = 0
    for part in sorted(ranges):
        if part.start < end:
            return True
        end = part.page_end
    return False


def held_bytes(fd: int) -> int:
    """Return how much RAM all of it takes now, as the kernel counts it."""
    return os.fstat(fd).st_blocks * 512
