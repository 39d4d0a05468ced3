"""Which bytes of a file are there: half-open spans of offsets, merged, in order. Pure.

A file that comes in by several connections is never just "so far": it has a finished prefix, and pieces
beyond it. Pieces are handed out from the front, so that only a few spans exist at a time.
"""

import itertools
import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator

Span = tuple[int, int]
_TEXT = re.compile(r"(?:\d{1,19}-\d{1,19}(?: \d{1,19}-\d{1,19})*)?", re.ASCII)


class Spans:
    """A set of offsets as disjoint spans ``[start, end)`` that do not touch, sorted."""

    def __init__(self, spans: Iterable[Span] = ()) -> None:
        self._spans: list[Span] = []
        for start, end in spans:
            self.add(start, end)

    def __iter__(self) -> Iterator[Span]:
        return iter(self._spans)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Spans) and self._spans == other._spans

    def __hash__(self) -> int:
        raise TypeError("spans change")

    def __repr__(self) -> str:
        return f"Spans({self._spans})"

    def copy(self) -> "Spans":
        """Return the same spans, to be changed apart."""
        other = Spans()
        other._spans = list(self._spans)
        return other

    def add(self, start: int, end: int) -> None:
        """Add the offsets from ``start`` to before ``end``."""
        assert 0 <= start <= end, (start, end)
        if start == end:
            return
        spans = self._spans
        # The first that ends at or behind our start touches us, if it begins before our end.
        first = bisect_left(spans, start, key=lambda span: span[1])
        last = first
        while last < len(spans) and spans[last][0] <= end:
            start, end = min(start, spans[last][0]), max(end, spans[last][1])
            last += 1
        spans[first:last] = [(start, end)]

    @property
    def total(self) -> int:
        """How many offsets there are."""
        return sum(end - start for start, end in self._spans)

    @property
    def prefix(self) -> int:
        """The end of the span that begins at 0; 0 when there is none."""
        return self._spans[0][1] if self._spans and self._spans[0][0] == 0 else 0

    @property
    def end(self) -> int:
        """The end of the last span; 0 when there is none."""
        return self._spans[-1][1] if self._spans else 0

    def within(self, limit: int) -> "Spans":
        """Return what is before ``limit``."""
        return Spans((start, min(end, limit)) for start, end in self._spans if start < limit)

    def gaps(self, size: int) -> Iterator[Span]:
        """Yield what is missing of ``[0, size)``, in order."""
        at = 0
        for start, end in self._spans:
            if start >= size:
                break
            if at < start:
                yield at, start
            at = end
        if at < size:
            yield at, size

    def text(self) -> str:
        """Return the spans as ``0-100 200-300``."""
        return " ".join(f"{start}-{end}" for start, end in self._spans)


def parse_spans(text: str) -> Spans | None:
    """Return the spans of ``Spans.text``, or None for anything else."""
    if _TEXT.fullmatch(text) is None:
        return None
    pairs = [part.split("-") for part in text.split()]
    spans = [(int(start), int(end)) for start, end in pairs]
    flat = [offset for span in spans for offset in span]
    # Written in order, merged: whatever is not so was written by somebody else.
    if any(a >= b for a, b in itertools.pairwise(flat)):
        return None
    return Spans(spans)


def next_piece(done: Spans, taken: Iterable[Span], size: int, piece: int) -> Span | None:
    """Return the first piece of ``[0, size)`` that is neither there nor taken; None = nothing is left.

    At most ``piece`` bytes; from the front, so that what hashes in order never waits long.
    """
    assert piece > 0, piece
    busy = done.copy()
    for start, end in taken:
        busy.add(start, end)
    for start, end in busy.gaps(size):
        return start, min(end, start + piece)
    return None
