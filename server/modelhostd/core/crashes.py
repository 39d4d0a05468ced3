"""What a model's crashes lead to: a process of its own, then a block. Pure.

A crash counts for ``WINDOW_S`` seconds. A model that took a worker down that it shared with others
``ISOLATED_AT`` times gets a process of its own; one that took any down ``BLOCKED_AT`` times is blocked.
"""

from dataclasses import replace

from modelhostd.core.values import dataclass

WINDOW_S = 600.0
ISOLATED_AT = 2
BLOCKED_AT = 5
STDERR_MAX = 2000
"""Characters of a worker's standard error that an event and an error carry."""
_REPORT = "Fatal Python error"
"""How faulthandler's report begins; the thread that crashed comes first in it."""


@dataclass(frozen=True, slots=True)
class Crash:
    """When a model took its worker down, in monotonic seconds, and whether it shared it."""

    time: float
    shared: bool


@dataclass(frozen=True, slots=True)
class Crashes:
    """One model's crashes, the last at most ``BLOCKED_AT``, and what came of them.

    ``isolated`` and ``blocked`` stay until they are lifted, however old the crashes are by then.
    """

    recent: tuple[Crash, ...] = ()
    isolated: bool = False
    blocked: bool = False

    def crashed(self, now: float, *, shared: bool) -> "Crashes":
        """Return the state after one more crash, at ``now``."""
        recent = (*(c for c in self.recent if now - c.time <= WINDOW_S), Crash(now, shared))
        return Crashes(
            recent[-BLOCKED_AT:],
            isolated=self.isolated or sum(c.shared for c in recent) >= ISOLATED_AT,
            blocked=self.blocked or len(recent) >= BLOCKED_AT,
        )

    def count(self, now: float) -> int:
        """Return how many of the crashes count at ``now``."""
        return sum(now - c.time <= WINDOW_S for c in self.recent)

    def shared_again(self) -> "Crashes":
        """Return the state in which the model shares a worker again: what it did to one is forgiven.

        Its crashes go on to count towards a block.
        """
        return replace(
            self, isolated=False, recent=tuple(replace(c, shared=False) for c in self.recent)
        )


def last_words(stderr: str) -> str:
    """Return what a worker's standard error says of its end: faulthandler's report from its beginning, else the end."""
    start = stderr.rfind(_REPORT)
    return stderr[start:][:STDERR_MAX] if start >= 0 else stderr[-STDERR_MAX:]
