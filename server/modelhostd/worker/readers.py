"""The two threads that read the data socket: one reads, and serves what is quick; the other looks after it.

Handing a request to another thread costs a wake-up, which is more than a quick model takes
(bench/RESULTS.md). So the thread that reads runs quick requests itself. The other one looks every
``TICK_S`` whether it is still at the same, and then takes its place: nothing waits longer for a request that turns
out slow. While there is nobody to look, nothing is run here.
"""

import enum
import threading
from collections.abc import Callable
from typing import Protocol

TICK_S = 0.01


class Received(enum.Enum):
    """What came of one look at the socket."""

    NOTHING = 0
    """Nothing for the caller to do."""
    QUICK = 1
    """Requests that the caller is to serve."""
    END = 2
    """The daemon closed the socket."""


class Receive(Protocol):
    """Takes what has come; see :class:`Readers`."""

    def __call__(self, *, wait: bool, serves: bool) -> Received:
        """Take a chunk, waiting for it or not; ``serves`` = the caller would run what is quick."""


class Readers:
    """Whose turn it is to read. ``call_others`` has other threads run what was left to a reader."""

    def __init__(self, call_others: Callable[[], None]) -> None:
        self._call_others = call_others
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._reader = 0
        self._ended = False
        self._looking = False
        """Whether the other thread is there to take over."""
        self._asleep = False
        self._turns = 0
        """Odd while the reader serves."""

    def run(self, index: int, receive: Receive, serve: Callable[[], bool]) -> None:
        """Read, serve and look after the other reader by turns, until the socket ends.

        ``serve`` runs quick requests for a bounded time and tells whether some are left.
        """
        try:
            while self._my_turn(index):
                self._read(index, receive, serve)
        finally:
            with self._lock:
                self._ended = True
                self._changed.notify_all()

    def _read(self, index: int, receive: Receive, serve: Callable[[], bool]) -> None:
        left = False
        while not self._ended:
            received = receive(wait=not left, serves=self._looking)
            if received is Received.END:
                self._ended = True
            elif left or received is Received.QUICK:
                with self._lock:
                    self._turns += 1
                    if self._asleep:
                        self._changed.notify()
                left = serve()
                with self._lock:
                    self._turns += 1
                    if self._reader != index:
                        if left:
                            # The other one was not told of it, and the others when they could not take it.
                            self._call_others()
                        return

    def _my_turn(self, index: int) -> bool:
        """Wait until this thread is the one to read; False at the end."""
        with self._lock:
            before = -1
            while self._reader != index and not self._ended:
                self._looking = True
                if self._turns & 1 and self._turns == before:
                    self._reader = index
                    self._looking = False
                    self._call_others()
                    break
                # Nothing was served since the last look: sleep until something is.
                self._asleep = self._turns == before
                before = self._turns
                self._changed.wait(None if self._asleep else TICK_S)
                self._asleep = False
            return not self._ended
