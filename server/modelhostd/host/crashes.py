"""Which models took their worker down, how often, and which of them are blocked for it."""

from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.ports import Clock, WorkerExit

CRASHES_MAX = 5
CRASH_WINDOW_S = 600.0
STDERR_MAX = 2000


class Crashes:
    """Counts crashes by the model that was executing; five in ten minutes block it."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._times: dict[str, list[float]] = {}
        self._blocked: dict[str, ModelhostError] = {}

    def note(self, exit: WorkerExit) -> None:
        """Count a worker's exit against the model that bears the blame, if any does."""
        if not exit.blamed:
            return
        now = self._clock.monotonic()
        recent = [t for t in self._times.get(exit.blamed, ()) if now - t <= CRASH_WINDOW_S]
        self._times[exit.blamed] = [*recent, now]
        if len(recent) + 1 >= CRASHES_MAX:
            self._blocked[exit.blamed] = _blocked(exit, len(recent) + 1)

    def count(self, model: str) -> int:
        """Return the model's crashes within the window."""
        now = self._clock.monotonic()
        return sum(now - t <= CRASH_WINDOW_S for t in self._times.get(model, ()))

    def blocked(self, model: str) -> ModelhostError | None:
        """Return why the model is blocked, or None."""
        return self._blocked.get(model)

    def forget(self, model: str) -> None:
        """Unblock a model and start counting anew."""
        self._times.pop(model, None)
        self._blocked.pop(model, None)


def _blocked(exit: WorkerExit, count: int) -> ModelhostError:
    return ModelhostError(
        Reason.MODEL_BLOCKED,
        f"model '{exit.blamed}' took its worker down {count} times in {CRASH_WINDOW_S:g} s "
        f"(last: {exit.exit}); fix the cause, then UnblockModel",
        {
            "model": exit.blamed,
            "crashes": str(count),
            "stderr": exit.stderr_tail[-STDERR_MAX:],
        },
    )
