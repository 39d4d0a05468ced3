"""How long to wait before something that failed is started again. Pure."""

from modelhostd.core.values import dataclass

FIRST_DELAY_S = 0.5
LONGEST_DELAY_S = 60.0
RESET_AFTER_S = 600.0


@dataclass(frozen=True, slots=True)
class Backoff:
    """Failures in a row. The delays before the next starts are 0, then up to 0.5, 1, 2, 4 ... 60 s.

    Full jitter (https://aws.amazon.com/builders-library/timeouts-retries-and-backoff-with-jitter):
    a delay is drawn evenly from 0 to its bound, so that workers that died together do not start together.
    """

    failures: int = 0

    def failed(self, alive_s: float) -> "Backoff":
        """Return the state after one more failure of something that had run for ``alive_s`` seconds.

        After ``RESET_AFTER_S`` of running it counts as the first failure again.
        """
        return Backoff(1 if alive_s >= RESET_AFTER_S else self.failures + 1)

    @property
    def longest_delay_s(self) -> float:
        """The bound of the next delay, in seconds."""
        if self.failures < 2:
            return 0.0
        # The exponent is bounded too: 2.0 ** 1100 is an OverflowError.
        doublings = min(self.failures - 2, 10)
        return min(FIRST_DELAY_S * 2.0**doublings, LONGEST_DELAY_S)

    def delay_s(self, jitter: float) -> float:
        """Return the next delay in seconds for ``jitter`` drawn evenly from 0 to 1."""
        return self.longest_delay_s * jitter
