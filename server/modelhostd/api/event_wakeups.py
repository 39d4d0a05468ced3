"""Who watches events, and when each is woken: one task for all, so that publishing costs nobody anything.

All watchers are woken together and then read the same batch. After a round the task pauses for a time that
grows with their number: what is published meanwhile goes out as one batch, so that two hundred watchers of
a hundred events a second cost a third of the messages and none of the watchers waits longer than 30 ms for
it. A single watcher is woken at once.
"""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import field

from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.values import dataclass
from modelhostd.host.journal import Signal

TICK_S = 0.125
"""How often watchers are looked at that wait for a time, not for an event."""
PAUSE_PER_WATCHER_S = 0.000_15
"""Three times what a round costs for each: rounds take at most a quarter of the loop's time."""
PAUSE_MAX_S = 0.25


@dataclass(slots=True, eq=False)
class Watcher:
    """One open stream: it waits for ``wake``, which is set at each change, and from time ``due`` on.

    ``draining`` is the daemon's: set when it begins to stop. Times are the loop's.
    """

    draining: asyncio.Event
    due: float = 0.0
    wake: asyncio.Event = field(default_factory=asyncio.Event)


class Wakeups:
    """Every open stream, and the task that wakes them."""

    def __init__(self, watchers_max: int) -> None:
        self._watchers_max = watchers_max
        self._watchers: set[Watcher] = set()
        self._task: asyncio.Task[None] | None = None

    def __len__(self) -> int:
        return len(self._watchers)

    @contextmanager
    def watching(self, changed: Signal, draining: asyncio.Event) -> Iterator[Watcher]:
        """Count a watcher in for the block; raises QUEUE_FULL at the limit."""
        if len(self._watchers) >= self._watchers_max:
            raise ModelhostError(
                Reason.QUEUE_FULL,
                f"{len(self._watchers)} streams of events are open already (limit "
                f"{self._watchers_max}); close one, or try again in a few seconds",
                {"queue": str(len(self._watchers)), "limit": str(self._watchers_max)},
                retry_delay_s=5.0,
            )
        watcher = Watcher(draining)
        self._watchers.add(watcher)
        if self._task is None:
            self._task = asyncio.create_task(self._run(changed), name="event watchers")
        try:
            yield watcher
        finally:
            self._watchers.discard(watcher)
            if not self._watchers and self._task is not None:
                self._task.cancel()
                self._task = None

    async def _run(self, changed: Signal) -> None:
        loop = asyncio.get_running_loop()
        event = asyncio.Event()
        with changed.subscribed(event):
            while True:
                try:
                    async with asyncio.timeout(TICK_S):
                        await event.wait()
                except TimeoutError:
                    pass
                everybody = event.is_set()
                event.clear()
                now = loop.time()
                for watcher in self._watchers:
                    if everybody or now >= watcher.due or watcher.draining.is_set():
                        watcher.wake.set()
                pause = min(PAUSE_MAX_S, len(self._watchers) * PAUSE_PER_WATCHER_S)
                if everybody and pause >= 0.001:
                    await asyncio.sleep(pause)
