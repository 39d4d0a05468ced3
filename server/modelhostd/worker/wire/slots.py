"""Who has which part of an arena. Pure bookkeeping over offsets; it never touches the memory."""

import bisect

GRANULE_BYTES = 4096
"""Slots start and end on pages, so that two of them never share a cache line or a page."""


class Slots:
    """First fit over free ranges, neighbours merged when a slot is given back.

    First fit keeps reusing the lowest addresses, which are the ones still in the caches.
    """

    def __init__(self, size: int) -> None:
        """Manage ``size`` bytes; what is beyond the last whole page is not used."""
        self.size = size // GRANULE_BYTES * GRANULE_BYTES
        self._starts: list[int] = [0] if self.size else []
        self._ends: list[int] = [self.size] if self.size else []
        self._taken: dict[int, int] = {}

    @property
    def free_bytes(self) -> int:
        """Bytes in no slot, which may lie apart."""
        return sum(self._ends) - sum(self._starts)

    @property
    def taken(self) -> dict[int, int]:
        """Offset -> length of each slot, the length rounded up to whole pages."""
        return dict(self._taken)

    def extend(self, size: int) -> None:
        """Manage ``size`` bytes from now on, at least as many as before."""
        old, self.size = self.size, size // GRANULE_BYTES * GRANULE_BYTES
        if self._ends and self._ends[-1] == old:
            self._ends[-1] = self.size
        elif old < self.size:
            self._starts.append(old)
            self._ends.append(self.size)

    def allocate(self, length: int) -> int | None:
        """Return the offset of a new slot of at least ``length`` (> 0) bytes; None = no room now."""
        need = -(-length // GRANULE_BYTES) * GRANULE_BYTES
        for index, start in enumerate(self._starts):
            if self._ends[index] - start >= need:
                if self._ends[index] - start == need:
                    del self._starts[index], self._ends[index]
                else:
                    self._starts[index] = start + need
                self._taken[start] = need
                return start
        return None

    def free(self, offset: int) -> None:
        """Give the slot at ``offset`` back. Raises ``KeyError`` when there is none."""
        length = self._taken.pop(offset)
        end = offset + length
        index = bisect.bisect_left(self._starts, offset)
        joins_next = index < len(self._starts) and self._starts[index] == end
        joins_previous = index > 0 and self._ends[index - 1] == offset
        if joins_previous and joins_next:
            self._ends[index - 1] = self._ends[index]
            del self._starts[index], self._ends[index]
        elif joins_previous:
            self._ends[index - 1] = end
        elif joins_next:
            self._starts[index] = offset
        else:
            self._starts.insert(index, offset)
            self._ends.insert(index, end)
