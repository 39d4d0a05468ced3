"""Which models took their worker down, how often, and which have a process of their own or are blocked for it."""

from dataclasses import field

from modelhostd.core import crashes as rules
from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.registry import needs_reload
from modelhostd.core.resources import Model, ModelConfig
from modelhostd.core.values import dataclass
from modelhostd.ports import Clock, WorkerExit


@dataclass(slots=True)
class _Record:
    """One model's crashes, and what is told of them."""

    crashes: rules.Crashes = field(default_factory=rules.Crashes)
    config: ModelConfig = field(default_factory=ModelConfig)
    """The model's when it was isolated."""
    exit: str = ""
    blocked: ModelhostError | None = None


class Crashes:
    """Counts crashes by the model that was executing; see :mod:`modelhostd.core.crashes`."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._records: dict[str, _Record] = {}

    def note(self, exit: WorkerExit, model: Model | None) -> None:
        """Count a worker's exit against the model that bears the blame, if any does."""
        if model is None or model.id != exit.blamed:
            return
        now = self._clock.monotonic()
        record = self._records.setdefault(model.id, _Record())
        before = self._shared_again(record, model)
        record.crashes = before.crashed(now, shared=not exit.model)
        if record.crashes.isolated and not before.isolated:
            record.config, record.exit = model.config, exit.exit
        if record.crashes.blocked:
            record.blocked = _blocked(exit, record.crashes.count(now))

    def count(self, model: str) -> int:
        """Return the model's crashes within the window."""
        record = self._records.get(model)
        return 0 if record is None else record.crashes.count(self._clock.monotonic())

    def blocked(self, model: str) -> ModelhostError | None:
        """Return why the model is blocked, or None."""
        record = self._records.get(model)
        return None if record is None else record.blocked

    def isolated(self, model: Model) -> dict[str, str] | None:
        """Return why the model's next load gets a process of its own, as an event tells it, or None.

        It does until UnblockModel, or until the model's config changes in a field that needs a reload.
        """
        record = self._records.get(model.id)
        if record is None:
            return None
        record.crashes = self._shared_again(record, model)
        if not record.crashes.isolated:
            return None
        return {
            "why": f"took the worker that it shared down {rules.ISOLATED_AT} times",
            "windowSeconds": f"{rules.WINDOW_S:g}",
            "exit": record.exit,
        }

    def forget(self, model: str) -> None:
        """Unblock a model, let it share a worker again and start counting anew."""
        self._records.pop(model, None)

    def _shared_again(self, record: _Record, model: Model) -> rules.Crashes:
        if record.crashes.isolated and needs_reload(record.config, model.config):
            return record.crashes.shared_again()
        return record.crashes


def _blocked(exit: WorkerExit, count: int) -> ModelhostError:
    return ModelhostError(
        Reason.MODEL_BLOCKED,
        f"model '{exit.blamed}' took its worker down {count} times in {rules.WINDOW_S:g} s "
        f"(last: {exit.exit}); fix the cause, then UnblockModel",
        {
            "model": exit.blamed,
            "crashes": str(count),
            "stderr": rules.last_words(exit.stderr_tail),
        },
    )
