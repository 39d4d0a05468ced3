"""Whether a worker still gets on, from its heartbeats. Pure."""

from collections.abc import Sequence

from modelhostd.core.values import dataclass
from modelhostd.worker.v1 import worker_pb2


@dataclass(frozen=True, slots=True)
class Hang:
    """What stands still: ``model`` is what was executing, or empty when the whole process is silent."""

    sentence: str
    model: str


@dataclass(frozen=True, slots=True)
class _Seen:
    progress: int
    model: str
    since: float


class Liveness:
    """Heartbeats of one worker. Times are monotonic seconds of the daemon.

    A process that cannot run (stopped, interpreter held) sends no heartbeat; one whose thread is
    stuck sends them without progress. Loads are left out: they have a timeout of their own.
    """

    def __init__(self, hang_timeout_s: float, now: float) -> None:
        self._timeout_s = hang_timeout_s
        self._heard = now
        self._threads: dict[str, _Seen] = {}

    def beat(self, threads: Sequence[worker_pb2.ThreadState], now: float) -> None:
        """Take a heartbeat."""
        self._heard = now
        before = self._threads
        self._threads = {}
        for thread in threads:
            if not thread.model or thread.loading:
                continue
            seen = before.get(thread.name)
            if seen is None or seen.progress != thread.progress:
                seen = _Seen(thread.progress, thread.model, now)
            self._threads[thread.name] = seen

    def hang(self, now: float) -> Hang | None:
        """Return what has been standing still for longer than the timeout, if anything."""
        if now - self._heard > self._timeout_s:
            return Hang(f"hung: no heartbeat for {self._timeout_s:g} s", "")
        for seen in self._threads.values():
            if now - seen.since > self._timeout_s:
                return Hang(f"hung: no progress for {self._timeout_s:g} s", seen.model)
        return None
