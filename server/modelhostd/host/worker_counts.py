"""How many workers started and how many ended unasked, beside whoever else is told of it."""

from collections import Counter

from modelhostd.ports import WorkerExit, WorkerListener

CODE, SIGNAL, HUNG, OTHER = "exit code", "signal", "hung", "other"


class WorkerCounts:
    """Passes on what workers tell, and counts it. Implements ``ports.WorkerListener``."""

    def __init__(self, listener: WorkerListener) -> None:
        self._listener = listener
        self.starts: Counter[str] = Counter()
        """Workers that came to take commands, by device; all after the first are replacements, or for
        models with a worker of their own."""
        self.crashes: Counter[tuple[str, str, str]] = Counter()
        """Workers that ended unasked, by (device, model that was executing or empty, kind of end)."""

    def worker_ready(self, device: str, pid: int) -> None:
        """See :class:`modelhostd.ports.WorkerListener`."""
        self.starts[device] += 1
        self._listener.worker_ready(device, pid)

    def worker_exited(self, exit: WorkerExit) -> None:
        """See :class:`modelhostd.ports.WorkerListener`."""
        self.crashes[exit.device, exit.blamed, kind_of(exit.exit)] += 1
        self._listener.worker_exited(exit)


def kind_of(exit: str) -> str:
    """Return which kind of end it was: ``signal SIGKILL`` -> ``signal``; one of four words."""
    return next((kind for kind in (CODE, SIGNAL, HUNG) if exit.startswith(kind)), OTHER)
