"""Addresses of an arena: which are taken, which have memory that nobody uses, which are free. Pure: ranges in, ranges out.

All lengths are of whole pages.
"""

from bisect import insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, order=True)
class Span:
    """Addresses that follow each other."""

    start: int
    length: int

    @property
    def end(self) -> int:
        """The first address behind it."""
        return self.start + self.length


class Space:
    """The addresses from 0 to ``size``. What is given back stays ready as long as all that has memory is at most ``limit``."""

    def __init__(self, size: int, limit: int, taken: Iterable[Span] = ()) -> None:
        self._size = size
        self._limit = limit
        self._taken = sorted(taken)
        self._ready: list[Span] = []

    @property
    def taken_bytes(self) -> int:
        """Bytes that are taken."""
        return sum(taken.length for taken in self._taken)

    @property
    def ready_bytes(self) -> int:
        """Bytes that have memory and are in nobody's hands."""
        return sum(ready.length for ready in self._ready)

    @property
    def missing_bytes(self) -> int:
        """Bytes that have no memory yet and shall be ready; below 0 where more is taken than that."""
        return self._limit - self.ready_bytes - self.taken_bytes

    def take(self, length: int, *, fresh: bool = False) -> tuple[Span, int, Sequence[Span]]:
        """Take ``length`` bytes; unless ``fresh``, of what is ready as much as there is.

        Return where, how many of the first bytes have memory, and whose memory is to go. Raises ``MemoryError`` where
        there are no addresses left.
        """
        start, ready = self._choose(length, [] if fresh else self._ready)
        taken = Span(start, length)
        insort(self._taken, taken)
        self._ready = [part for old in self._ready for part in _without(old, taken)]
        return taken, ready, self._trim()

    def give_back(self, taken: Span, *, keep: bool = True) -> Sequence[Span]:
        """Free what was taken; return whose memory is to go: all of it, or what is beyond the limit where some is to be kept."""
        self._taken.remove(taken)
        if not keep:
            return [taken]
        self._ready = _merge([*self._ready, taken])
        return self._trim()

    # --- inside ---------------------------------------------------------------------------------

    def _choose(self, length: int, offered: Sequence[Span]) -> tuple[int, int]:
        """Return where ``length`` bytes go, and how many of the first are ready there.

        The start of an offered range with enough free addresses behind it, the smallest that suffices or
        else the largest; without one, the first addresses that are neither taken nor ready.
        """
        fitting = [ready for ready in offered if self._free_at(ready.start) >= length]
        whole = [ready for ready in fitting if ready.length >= length]
        best = min(whole, key=lambda ready: ready.length, default=None)
        best = best or max(fitting, key=lambda ready: ready.length, default=None)
        if best is not None:
            return best.start, min(best.length, length)
        for start in (0, *(held.end for held in _merge([*self._taken, *self._ready]))):
            if self._free_at(start) >= length and not self._ready_in(start, length):
                return start, 0
        raise MemoryError(f"no addresses for {length} bytes of an image")

    def _trim(self) -> Sequence[Span]:
        """Have no more be ready than the limit allows; return what that leaves out."""
        over = -self.missing_bytes
        left_out = []
        while over > 0 and self._ready:
            last = self._ready.pop()
            kept = max(0, last.length - over)
            left_out.append(Span(last.start + kept, last.length - kept))
            over -= last.length - kept
            if kept:
                self._ready.append(Span(last.start, kept))
        return left_out

    def _free_at(self, start: int) -> int:
        for taken in self._taken:
            if taken.start <= start < taken.end:
                return 0
            if taken.start >= start:
                return taken.start - start
        return self._size - start

    def _ready_in(self, start: int, length: int) -> bool:
        end = start + length
        return any(ready.start < end and ready.end > start for ready in self._ready)


def _without(whole: Span, part: Span) -> list[Span]:
    """Return what is left of ``whole`` without ``part``."""
    if part.end <= whole.start or part.start >= whole.end:
        return [whole]
    left = Span(whole.start, max(0, part.start - whole.start))
    right = Span(part.end, max(0, whole.end - part.end))
    return [rest for rest in (left, right) if rest.length]


def _merge(spans: list[Span]) -> list[Span]:
    """Return spans in order, those that touch as one."""
    merged: list[Span] = []
    for part in sorted(spans):
        if merged and merged[-1].end == part.start:
            merged[-1] = Span(merged[-1].start, merged[-1].length + part.length)
        else:
            merged.append(part)
    return merged
