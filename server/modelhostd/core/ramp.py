"""How many connections one file gets: doubled while that makes it faster. Pure: time comes in.

One connection is often limited by its distance or by the server (a CDN gives some 500 Mbit/s to each), so
more of them help; where the line, the disk or the processor is the limit they only cost.
"""

from modelhostd.core.values import dataclass

MEASURE_S = 0.3
"""How long a number of connections is measured."""
BEGIN_S = 2.0
"""How long a new one may bring nothing before that counts: far away connecting, TLS and asking take a second."""
GAIN = 1.25
"""How much faster twice the connections must be to stay."""
FAST = 150e6
"""Bytes a second: a connection that brings them is not what limits. More of them were no faster on loopback
and took some 10 to 15 % more processor time."""
AGAIN_FIRST_S, AGAIN_S = 2.0, 15.0
"""When another try is made after one that did not help: soon after the first, which anything may have held up,
later after each further one. Lines change."""


@dataclass
class Ramp:
    """The number of connections wanted, between 1 and ``limit``."""

    limit: int
    wanted: int = 1
    _best: float = 0.0
    _before: int = 0
    _added: float = 0.0
    _since: float | None = None
    _bytes: int = 0
    _quiet_until: float = 0.0
    _again_s: float = AGAIN_FIRST_S

    def sample(self, now: float, done_bytes: int, *, all_bring: bool = True) -> int:
        """Take the bytes done at monotonic time ``now``; return how many connections there should be.

        ``all_bring`` is False while some of those that there are have brought nothing yet.
        """
        late = not all_bring and self._before and now < self._added + BEGIN_S
        if self._since is None or late:
            self._since, self._bytes = now, done_bytes
        elapsed = now - self._since
        if elapsed < MEASURE_S:
            return self.wanted
        rate = (done_bytes - self._bytes) / elapsed
        self._since, self._bytes = now, done_bytes
        if self._before:
            if rate < self._best * GAIN:
                self.wanted, self._before = self._before, 0
                self._quiet_until = now + self._again_s
                self._again_s = min(AGAIN_S, 2 * self._again_s)
                return self.wanted
            self._before, self._again_s = 0, AGAIN_FIRST_S
        self._best = rate
        slow = 0 < rate < FAST * self.wanted
        if now >= self._quiet_until and slow and self.wanted < self.limit:
            self._before, self.wanted = self.wanted, min(self.limit, self.wanted * 2)
            self._added = now
        return self.wanted

    def failed(self, now: float) -> None:
        """Take notice that a connection failed: one less, and no more for a while."""
        self.wanted = max(1, self.wanted - 1)
        self.enough(now)

    def enough(self, now: float) -> None:
        """Stay with what there is for a while."""
        self._before, self._since = 0, None
        self._quiet_until = now + AGAIN_S
