"""Space on disk: what is free, what the budget leaves, and what is promised to whom. Thread-safe, blocking.

A promise is taken off as its bytes are written. What is promised is read before what is there: bytes
written in between count twice, never not at all, so two downloads cannot promise the same space.
"""

import os
import stat
import threading
from collections.abc import Callable
from contextlib import suppress

from modelhostd.adapters.layout import BLOBS, PARTS, QUARANTINE, VERIFIED, Home
from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.ports import Room

BLOCK_BYTES = 512


class SpaceLedger:
    """The space below one home directory. ``reserve_bytes`` nobody may promise himself."""

    def __init__(
        self,
        home: Home,
        reserve_bytes: int,
        free_bytes: Callable[[], tuple[int, int]] | None = None,
    ) -> None:
        self._home = home
        self._reserve_bytes = reserve_bytes
        self._free_bytes = free_bytes or home.free_bytes
        self._budget_bytes = 0
        self._state = threading.Lock()
        self._promising = threading.Lock()
        self._promised: dict[str, int] = {}

    def limit(self, budget_bytes: int) -> None:
        """Let files take so many bytes from now on; 0 = as many as the disk has."""
        self._budget_bytes = budget_bytes

    def free_bytes(self) -> tuple[int, int]:
        """Return (free, total) bytes of the disk."""
        return self._free_bytes()

    def room(self) -> Room:
        """Return what may be promised now."""
        with self._state:
            promised = sum(self._promised.values())
        free, total = self.free_bytes()
        available, most = free - self._reserve_bytes, total - self._reserve_bytes
        over = 0
        if budget := self._budget_bytes:
            left = budget - self.used_bytes()
            available, most, over = min(available, left), min(most, budget), max(0, -left)
        return Room(max(0, available - promised), max(0, most), promised, over)

    def promise(
        self, owner: str, needed: int, cancelled: Callable[[], bool] = lambda: False
    ) -> Callable[[int], None]:
        """Promise space to one download; returns a function that takes off what was written.

        ``release`` ends it. Raises INSUFFICIENT_DISK_SPACE with the numbers. Once ``cancelled`` nothing
        is promised any more: nobody might be left to release it.
        """
        with self._promising:
            room = self.room()
            if needed > room.available_bytes:
                raise self._short(needed, room)
            with self._state:
                if not cancelled():
                    self._promised[owner] = needed

        def written(count: int) -> None:
            with self._state:
                if owner in self._promised:
                    self._promised[owner] = max(0, self._promised[owner] - count)

        return written

    def release(self, owner: str) -> None:
        """End a promise; what was written is on disk."""
        with self._state:
            self._promised.pop(owner, None)

    def used_bytes(self) -> int:
        """Return the bytes that count against the budget: blobs, downloads on their way, quarantine."""
        return sum(self._below(segments) for segments in (BLOBS, PARTS, VERIFIED, QUARANTINE))

    def _below(self, segments: tuple[str, ...]) -> int:
        total = 0
        with suppress(FileNotFoundError), self._home.directory(*segments) as directory:
            with os.scandir(directory) as entries:
                names = [entry.name for entry in entries]
            for name in names:
                # What was listed may be gone.
                with suppress(FileNotFoundError):
                    found = os.stat(name, dir_fd=directory, follow_symlinks=False)
                    if stat.S_ISDIR(found.st_mode):
                        total += self._below((*segments, name))
                    elif found.st_nlink == 1 or segments[0] == BLOBS[0]:
                        # A part may have holes, where nothing has come yet.
                        total += min(found.st_size, found.st_blocks * BLOCK_BYTES)
        return total

    def _short(self, needed: int, room: Room) -> ModelhostError:
        path, available = str(self._home.path), room.available_bytes
        bound = f"{available} are free for downloads"
        if self.free_bytes()[0] - self._reserve_bytes < needed <= self.free_bytes()[0]:
            bound += f" (the disk's last {self._reserve_bytes} stay free)"
        advice = f"free {needed - available} bytes (modelhost rm, prune)"
        if budget := self._budget_bytes:
            bound += f" within the budget of {budget}"
            advice += " or raise settings.disk_budget_bytes"
        after = "a download that waits goes on by itself then, all else is to be asked for again"
        if needed > self.free_bytes()[1] - self._reserve_bytes:
            advice, after = "it needs a larger disk", "free room would not be enough"
        elif needed > room.most_bytes:
            advice = f"raise settings.disk_budget_bytes to at least {needed}"
            after = "then ask again, free room alone would not be enough"
        return ModelhostError(
            Reason.INSUFFICIENT_DISK_SPACE,
            f"{needed} bytes are needed below {path} and {bound}; {advice}: {after}",
            {"path": path, "neededBytes": str(needed), "freeBytes": str(available)},
        )
