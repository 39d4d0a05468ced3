"""The worker processes: :class:`ProcessWorkers` implements :class:`modelhostd.ports.Workers`."""

from modelhostd.adapters.workers.config import WorkersConfig
from modelhostd.adapters.workers.supervisor import ProcessWorkers

__all__ = ["ProcessWorkers", "WorkersConfig"]
