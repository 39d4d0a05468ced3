"""The limits of bytes a second, kept by the threads that read: each asks before it reads."""

import threading
import time
from collections.abc import Callable
from typing import Self

from modelhostd.adapters.cancel import Canceller
from modelhostd.core.throttle import Line, Shares

LOOK_S = 0.05
"""How long a change of a rate, or a cancel, may go unnoticed."""


class Throttle:
    """The limit of the daemon and, beneath it, that of each download. Thread-safe."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._changed = threading.Condition()
        self._shares = Shares()
        self._lines: dict[str, Line] = {}
        self._rates: dict[str, int] = {}

    def limit(self, rate: int) -> None:
        """Let all downloads together fetch ``rate`` bytes a second; 0 = as many as come."""
        with self._changed:
            self._shares.bucket.set_rate(rate, self._clock())
            self._changed.notify_all()

    def limit_one(self, owner: str, rate: int) -> None:
        """The same for one download, if it is running."""
        with self._changed:
            if (line := self._lines.get(owner)) is not None:
                line.bucket.set_rate(rate, self._clock())
                self._changed.notify_all()

    def open(self, owner: str, rate: int = 0) -> "Tap":
        """Return the tap of a download that begins; close it."""
        with self._changed:
            line = self._lines[owner] = Line()
            line.bucket.set_rate(rate, self._clock())
        return Tap(self, owner, line)

    def take(self, line: Line, wanted: int, canceller: Canceller) -> int:
        """Wait until bytes may be read; return how many, at most ``wanted``. Raises Stopped."""
        if not (self._shares.bucket.rate or line.bucket.rate):
            return wanted
        with self._changed:
            while True:
                granted, delay = self._shares.ask(line, wanted, self._clock())
                if granted:
                    self._changed.notify_all()
                    return granted
                self._changed.wait(min(delay, LOOK_S))
                if canceller.cancelled:
                    self._shares.leave(line)
                    self._changed.notify_all()
                    canceller.check()

    def give_back(self, line: Line, count: int) -> None:
        """Return what was not read."""
        if count and (self._shares.bucket.rate or line.bucket.rate):
            with self._changed:
                self._shares.give_back(line, count, self._clock())

    def close(self, owner: str) -> None:
        """Forget a download that is over."""
        with self._changed:
            line = self._lines.pop(owner, None)
            if line is not None:
                self._shares.leave(line)
                self._changed.notify_all()


class Tap:
    """One download's way to the throttle."""

    def __init__(self, throttle: Throttle, owner: str, line: Line) -> None:
        self._throttle = throttle
        self._owner = owner
        self._line = line

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._throttle.close(self._owner)

    def take(self, wanted: int, canceller: Canceller) -> int:
        """Wait until bytes may be read; return how many, at most ``wanted``. Raises Stopped."""
        return self._throttle.take(self._line, wanted, canceller)

    def give_back(self, count: int) -> None:
        """Return what was not read."""
        self._throttle.give_back(self._line, count)
