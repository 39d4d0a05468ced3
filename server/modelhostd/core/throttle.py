"""Bytes a second for everything and for each of several lines, shared fairly. Pure: time comes in.

A bucket fills at its rate up to what flows in ``BURST_S``; whoever finds something in it may take more
than there is, and the debt keeps the next one waiting: so the mean holds whatever the sizes are, and a new
rate acts at once. Of the lines that want something each gets its turn: equal pieces, equal shares.
"""

from collections import deque
from dataclasses import field

from modelhostd.core.values import dataclass

BURST_S = 0.1
LINE_BURST_S = 0.3
"""The same of one line: more, or one with a small rate would lose what comes in between its turns."""
QUANTUM_S = 0.01
"""A turn is what flows in so long (within the bounds below), so that a change is felt soon."""
QUANTUM_MIN = 1 << 10
QUANTUM_MAX = 256 << 10


@dataclass
class Bucket:
    """``rate`` in bytes a second; 0 = no limit."""

    rate: int = 0
    burst_s: float = BURST_S
    _level: float = 0.0
    _filled: float = 0.0

    def set_rate(self, rate: int, now: float) -> None:
        """Change the rate; what was borrowed at the old one is paid back at the new one."""
        self._fill(now)
        if not self.rate:
            self._level = 0.0
        self.rate = rate

    def delay(self, now: float) -> float:
        """Return seconds until something may be taken; 0 = now."""
        if not self.rate:
            return 0.0
        self._fill(now)
        return 0.0 if self._level > 0 else max(-self._level / self.rate, 1e-6)

    def level(self, now: float) -> float:
        """Return what may be taken without a debt."""
        self._fill(now)
        return max(0.0, self._level)

    def take(self, count: int, now: float) -> None:
        """Take bytes (negative: give back)."""
        if self.rate:
            self._fill(now)
            self._level -= count

    def _fill(self, now: float) -> None:
        elapsed = max(0.0, now - self._filled)
        # At most a burst is kept, and never less than a byte: or a rate of 1 would let nothing through.
        self._level = min(self._level + elapsed * self.rate, max(1.0, self.rate * self.burst_s))
        self._filled = now


@dataclass(eq=False)
class Line:
    """One of those that share: a download."""

    bucket: Bucket = field(default_factory=lambda: Bucket(burst_s=LINE_BURST_S))


class Shares:
    """The common bucket, and whose turn it is."""

    def __init__(self) -> None:
        self.bucket = Bucket()
        self._turns: deque[Line] = deque()

    def ask(self, line: Line, wanted: int, now: float) -> tuple[int, float]:
        """Return (bytes granted, 0.0), or (0, seconds after which to ask again) with a place in the turns.

        Ask again soon, or ``leave``: a turn that nobody takes holds up the others.
        """
        if not (self.bucket.rate or line.bucket.rate):
            self.leave(line)
            return wanted, 0.0
        delay = line.bucket.delay(now)
        if delay > 0:
            self.leave(line)
            return 0, delay
        if line not in self._turns:
            self._turns.append(line)
        delay = self.bucket.delay(now)
        if self._turns[0] is not line or delay > 0:
            return 0, max(delay, 0.001)
        self._turns.popleft()
        granted = wanted
        for bucket in (self.bucket, line.bucket):
            if bucket.rate:
                granted = min(granted, _turn(bucket.rate * QUANTUM_S))
        if line.bucket.rate and self.bucket.rate:
            # What came in while it waited for its turn, up to a turn of the common limit.
            most = _turn(self.bucket.rate * QUANTUM_S)
            granted = min(wanted, most, max(granted, int(line.bucket.level(now))))
        self.bucket.take(granted, now)
        line.bucket.take(granted, now)
        return granted, 0.0

    def give_back(self, line: Line, count: int, now: float) -> None:
        """Return what was granted and not used."""
        self.bucket.take(-count, now)
        line.bucket.take(-count, now)

    def leave(self, line: Line) -> None:
        """Give up one's turn."""
        if line in self._turns:
            self._turns.remove(line)


def _turn(count: float) -> int:
    return int(min(max(count, QUANTUM_MIN), QUANTUM_MAX))
