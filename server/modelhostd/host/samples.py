"""Progress as samples: the latest of each operation, numbered over all of them, never committed."""

from collections.abc import Mapping

from modelhostd.core.resources import Progress
from modelhostd.host.journal import Signal


class Samples:
    """The newest progress of every unfinished operation."""

    def __init__(self) -> None:
        self._newest: dict[str, tuple[int, Progress]] = {}
        self.count = 0
        """How many samples there were; the number of the newest one."""
        self.changed = Signal()

    def report(self, key: str, progress: Progress) -> None:
        """Put a sample in place of the one before it."""
        self.count += 1
        self._newest[key] = self.count, progress
        self.changed.notify()

    def get(self, key: str) -> Progress | None:
        """Return the newest sample of an operation."""
        found = self._newest.get(key)
        return found[1] if found is not None else None

    def number(self, key: str) -> int:
        """Return the number of an operation's newest sample; 0 = it has none."""
        found = self._newest.get(key)
        return found[0] if found is not None else 0

    def after(self, number: int) -> tuple[int, Mapping[str, Progress]]:
        """Return the number of the newest sample, and the progress that is newer than ``number``."""
        return self.count, {k: p for k, (n, p) in self._newest.items() if n > number}

    def drop(self, key: str) -> None:
        """Forget an operation that has ended."""
        self._newest.pop(key, None)
