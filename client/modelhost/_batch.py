"""Several operations at once: what became of each, and which are still under way."""

from collections.abc import Callable
from dataclasses import dataclass

from modelhost._errors import ModelhostError
from modelhost._status import error_from_operation
from modelhost.v1 import operations_pb2

SAMPLE_S = 0.25
"""How often each is looked at."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one of several: its operation as it was last seen, and what it failed with."""

    asked: str
    """What it was asked by: a source, a model or an operation."""
    operation: operations_pb2.Operation | None = None
    error: ModelhostError | None = None

    @property
    def ok(self) -> bool:
        """Whether it ended well."""
        return self.error is None


def ended(asked: str, operation: operations_pb2.Operation) -> Outcome:
    """Return what became of an operation that has ended."""
    return Outcome(asked, operation, error_from_operation(operation))


class Changed:
    """Passes on the states of operations that differ from the ones before."""

    def __init__(self, report: Callable[[operations_pb2.Operation], None]) -> None:
        self._report = report
        self._last: dict[str, bytes] = {}

    def __call__(self, operation: operations_pb2.Operation) -> None:
        """Report a state, unless it is the last one again."""
        state = operation.SerializeToString(deterministic=True)
        if self._last.get(operation.name) != state:
            self._last[operation.name] = state
            self._report(operation)
