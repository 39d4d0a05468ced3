"""The arithmetic of a transfer: rates, time left, when to try again. Pure: time comes in."""

from collections import deque
from email.utils import parsedate_to_datetime

from modelhostd.core.values import dataclass

RETRY_BASE_S = 0.5
RETRY_CAP_S = 30.0
RETRY_AFTER_CAP_S = 300.0
OFFLINE_CAP_S = 15.0
RETRY_TOLD_CAP_S = 366 * 86_400.0
"""What a server may say it wants; more would not fit into a Duration, which events carry it in."""


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often and how long a transfer is tried again.

    ``tries``: attempts in a row without a new byte before giving up. ``base_s`` doubles each time up
    to ``cap_s``; a Retry-After of the server counts up to ``retry_after_cap_s``, above that the
    transfer fails at once with the time it was told.
    """

    tries: int = 6
    base_s: float = RETRY_BASE_S
    cap_s: float = RETRY_CAP_S
    retry_after_cap_s: float = RETRY_AFTER_CAP_S

    def delay(self, attempt: int, retry_after_s: float | None, jitter: float) -> float | None:
        """Return seconds until the next try after failed attempt number ``attempt`` (1 = the first).

        None = give up. ``jitter`` is uniform in [0, 1): full jitter, so that many clients of one
        failing host do not come back together.
        """
        assert attempt >= 1, attempt
        assert 0 <= jitter < 1, jitter
        if attempt >= self.tries:
            return None
        if retry_after_s is not None:
            return None if retry_after_s > self.retry_after_cap_s else max(0.0, retry_after_s)
        return self._ceiling(attempt, self.cap_s) * jitter

    def offline_delay(self, look: int, jitter: float) -> float:
        """Return seconds until look number ``look`` (from 1) whether there is a network again.

        Never None: no server is asked, so nothing is spent, and a network may be away for days.
        """
        return self._ceiling(look, min(self.cap_s, OFFLINE_CAP_S)) * (0.5 + jitter / 2)

    def _ceiling(self, attempt: int, cap_s: float) -> float:
        # The exponent is bounded too: 2.0 ** 1100 is an OverflowError.
        return min(cap_s, self.base_s * 2.0 ** min(attempt - 1, 60))


def retry_after_seconds(value: str | None, now: float) -> float | None:
    """Return the seconds a Retry-After header asks for (a number or an HTTP date), or None.

    RFC 9110 section 10.2.3. ``now`` is seconds since the epoch. At most ``RETRY_TOLD_CAP_S``; garbage
    and negative numbers: None.
    """
    if value is None or len(value) > 64:
        return None
    value = value.strip()
    if value.isascii() and value.isdigit():
        return min(float(value), RETRY_TOLD_CAP_S)
    try:
        wait_s = parsedate_to_datetime(value).timestamp() - now
        return min(max(0.0, wait_s), RETRY_TOLD_CAP_S)
    except (ValueError, TypeError, OverflowError):
        return None


class RateMeter:
    """Bytes per second over the last seconds, and the time left at that rate.

    The rate of the last ``window_s`` says how fast it is now; an average since the start would still
    show the first minute's stall after an hour.
    """

    def __init__(self, window_s: float = 4.0) -> None:
        self._window_s = window_s
        self._samples: deque[tuple[float, int]] = deque()

    def sample(self, now: float, done_bytes: int) -> float:
        """Take one sample (not more often than some 10 times a second) and return bytes per second."""
        self._samples.append((now, done_bytes))
        while len(self._samples) > 2 and self._samples[1][0] <= now - self._window_s:
            self._samples.popleft()
        started, bytes_then = self._samples[0]
        return max(0.0, (done_bytes - bytes_then) / (now - started)) if now > started else 0.0

    @staticmethod
    def eta_s(rate: float, left_bytes: int) -> float | None:
        """Return seconds left, None while nothing moves."""
        if left_bytes <= 0:
            return 0.0
        return left_bytes / rate if rate > 0 else None
