"""How fast something may come that nobody asked for. Pure."""


class Pace:
    """Lets ``rate`` a second pass, and ``burst`` at once. Times are monotonic seconds."""

    def __init__(self, rate: float, burst: float, now: float) -> None:
        self._rate = rate
        self._burst = burst
        self._allowance = burst
        self._since = now

    def passes(self, now: float) -> bool:
        """Count one; whether it is within the pace."""
        more = (now - self._since) * self._rate
        self._since = now
        self._allowance = min(self._burst, self._allowance + more) - 1
        return self._allowance >= 0
