"""What one download has done so far, counted by its threads, read by the loop."""

import threading
from dataclasses import dataclass

from modelhostd.core.resources import Phase, Progress
from modelhostd.core.transfer import RateMeter


@dataclass
class _FileCount:
    size: int
    position: int = 0
    done: bool = False


class Meter:
    """Counts bytes and files; never goes back, whatever a restarted file does. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._files: dict[str, _FileCount] = {}
        self._phase = Phase.PLANNING
        self._done = 0
        self._total = 0
        self._done_files = 0
        self._reused = 0
        self._file = ""
        self._attempts: dict[str, int] = {}
        self._rate = RateMeter()

    def begin(self, sizes: dict[str, int]) -> None:
        """Set what there is to do."""
        with self._lock:
            self._files = {path: _FileCount(size) for path, size in sizes.items()}
            self._total = sum(sizes.values())

    def enter(self, phase: Phase) -> None:
        """Go to the next phase."""
        with self._lock:
            self._phase = phase
            self._attempts.clear()

    def reuse(self, path: str, count: int) -> None:
        """Count the first ``count`` bytes of a file as there from before."""
        with self._lock:
            self._reused += self._advance(path, count)

    def advance(self, path: str, position: int) -> None:
        """Count a file's bytes up to ``position``."""
        with self._lock:
            self._advance(path, position)
            self._file = path

    def finish(self, path: str) -> None:
        """Count a file as done."""
        with self._lock:
            entry = self._files[path]
            self._advance(path, entry.size)
            self._done_files += not entry.done
            entry.done = True
            self._attempts.pop(path, None)

    def retrying(self, path: str, attempt: int) -> None:
        """Show that a file (or the plan: ``""``) is tried again; attempt 0 = it goes on."""
        with self._lock:
            if attempt:
                self._attempts[path] = attempt
            else:
                self._attempts.pop(path, None)

    @property
    def reused_bytes(self) -> int:
        """Bytes that did not have to be fetched."""
        with self._lock:
            return self._reused

    @property
    def left_bytes(self) -> int:
        """Bytes still to fetch."""
        with self._lock:
            return self._total - self._done

    def snapshot(self, now: float) -> Progress:
        """Return the progress at monotonic time ``now``; call it some 10 times a second at most."""
        with self._lock:
            moving = self._phase is Phase.DOWNLOADING
            rate = self._rate.sample(now, self._done) if moving else 0.0
            return Progress(
                phase=self._phase,
                done_bytes=self._done,
                total_bytes=self._total,
                done_files=self._done_files,
                total_files=len(self._files),
                bytes_per_second=rate,
                eta_s=RateMeter.eta_s(rate, self._total - self._done) if moving else None,
                reused_bytes=self._reused,
                file=self._file if moving else "",
                attempt=max(self._attempts.values(), default=0),
            )

    def _advance(self, path: str, position: int) -> int:
        entry = self._files[path]
        gained = max(0, min(position, entry.size) - entry.position)
        entry.position += gained
        self._done += gained
        return gained
