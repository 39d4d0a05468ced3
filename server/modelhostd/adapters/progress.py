"""What one download has done so far, counted by its threads, read by the loop."""

import threading

from modelhostd.core.resources import Phase, Progress, Retry
from modelhostd.core.transfer import RateMeter
from modelhostd.core.values import dataclass
from modelhostd.ports import FileProgress


@dataclass
class _FileCount:
    size: int
    done_bytes: int = 0
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
        self._restarted = 0
        self._file = ""
        self._active: set[str] = set()
        self._retries: dict[str, Retry] = {}
        self._rate = RateMeter()

    def begin(self, sizes: dict[str, int]) -> None:
        """Set what there is to do."""
        with self._lock:
            self._files = {path: _FileCount(size) for path, size in sizes.items()}
            self._total = sum(sizes.values())

    def add(self, path: str, size: int, total: int) -> None:
        """Add a file to what there is to do, which is ``total`` bytes as far as is known."""
        with self._lock:
            self._files[path] = _FileCount(size)
            self._total = max(self._total, total)

    def enter(self, phase: Phase) -> None:
        """Go to the next phase."""
        with self._lock:
            self._phase = phase
            self._retries.clear()

    def reuse(self, path: str, count: int) -> None:
        """Count the first ``count`` bytes of a file as there from before."""
        with self._lock:
            self._reused += self._advance(path, count)

    def start(self, path: str) -> None:
        """Note that a file is being fetched."""
        with self._lock:
            self._active.add(path)

    def advance(self, path: str, count: int) -> None:
        """Count ``count`` bytes of a file as there."""
        with self._lock:
            self._advance(path, count)
            self._file = path

    def finish(self, path: str) -> None:
        """Count a file as done."""
        with self._lock:
            entry = self._files[path]
            self._advance(path, entry.size)
            self._done_files += not entry.done
            entry.done = True
            self._active.discard(path)
            self._retries.pop(path, None)

    def retrying(self, path: str, retry: Retry | None) -> None:
        """Show that a file (or the plan: ``""``) waits for its next try; None = it goes on."""
        with self._lock:
            if retry is not None:
                self._retries[path] = retry
            else:
                self._retries.pop(path, None)

    def restarted(self) -> None:
        """Count a file that changed at the source while it was fetched."""
        with self._lock:
            self._restarted += 1

    def files(self) -> list[FileProgress]:
        """Return how far each file is, by path."""
        with self._lock:
            return [FileProgress(p, f.done_bytes, f.size) for p, f in sorted(self._files.items())]

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
            # What was found here is no news of the line.
            rate = self._rate.sample(now, self._done - self._reused) if moving else 0.0
            retry = max(self._retries.values(), key=lambda r: r.attempt, default=None)
            waiting = retry is not None and len(self._retries) >= len(self._active)
            return Progress(
                phase=Phase.WAITING if waiting else self._phase,
                done_bytes=self._done,
                total_bytes=self._total,
                done_files=self._done_files,
                total_files=len(self._files),
                bytes_per_second=rate,
                eta_s=RateMeter.eta_s(rate, self._total - self._done) if moving else None,
                reused_bytes=self._reused,
                file=self._file if moving else "",
                attempt=retry.attempt if retry is not None else 0,
                retry=retry,
                restarted_files=self._restarted,
            )

    def _advance(self, path: str, count: int) -> int:
        entry = self._files[path]
        gained = max(0, min(count, entry.size) - entry.done_bytes)
        entry.done_bytes += gained
        self._done += gained
        return gained
