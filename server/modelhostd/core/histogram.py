"""How often something took how long."""

from bisect import bisect_left
from collections.abc import Sequence


class Histogram:
    """Counts values by upper bound, which rise; values may be anything that is measured.

    ``counts`` has one place for each bound (values at most it and above the one before) and one for the
    rest; ``total`` is the sum of all values.
    """

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def add(self, value: float) -> None:
        """Count a value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    @property
    def count(self) -> int:
        """How many values were counted."""
        return sum(self.counts)
