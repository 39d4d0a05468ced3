"""How one operation is followed to its end, over breaks of the connection; without one itself."""

from dataclasses import dataclass

from modelhost import _enums, _names
from modelhost._errors import Cancelled, Code, ModelhostError, Timeout, Unavailable, make_error
from modelhost.v1 import operations_pb2

FIRST_DELAY_S = 0.1
LONGEST_DELAY_S = 2.0
PATIENCE_S = 60.0
"""How long a daemon may be away before following gives up; the operation does not."""

FINAL = frozenset(
    {
        operations_pb2.Operation.SUCCEEDED,
        operations_pb2.Operation.FAILED,
        operations_pb2.Operation.CANCELLED,
    }
)


def is_final(operation: operations_pb2.Operation) -> bool:
    """Whether an operation has ended."""
    return operation.state in FINAL


@dataclass(slots=True)
class Follow:
    """Where the following of one operation is. Times are of one monotonic clock, in seconds."""

    operation: operations_pb2.Operation
    started: float
    timeout: float | None = None
    _failures: int = 0
    _lost: float = 0.0

    def remaining(self, now: float) -> float | None:
        """Return the seconds that are left; None = no end. Raises Timeout where none are."""
        if self.timeout is None:
            return None
        left = self.started + self.timeout - now
        if left <= 0:
            raise self.too_late()
        return left

    def received(self, operation: operations_pb2.Operation) -> None:
        """Note what the stream brought."""
        self.operation = operation
        self._failures = 0

    def broken(self, error: ModelhostError | None, now: float) -> float:
        """Return the seconds to wait before the next stream. Raises ``error`` when none is to follow.

        ``error`` None = the daemon closed the stream in order, before the final state.
        """
        if isinstance(error, Timeout) and self.timeout is not None:
            raise self.too_late()
        if error is not None and not isinstance(error, Unavailable | Cancelled):
            raise error
        if self._failures == 0:
            self._lost = now
        elif error is not None and now - self._lost > PATIENCE_S:
            raise error
        delay = min(FIRST_DELAY_S * 2.0 ** min(self._failures, 16), LONGEST_DELAY_S)
        self._failures += 1
        return delay

    def too_late(self) -> ModelhostError:
        """Return the error for a caller whose time is up."""
        state = _enums.name_of(operations_pb2.Operation.State, self.operation.state)
        name = self.operation.name
        assert self.timeout is not None
        error = make_error(
            f"{name} is {state} after {self.timeout:g} s, and goes on without this caller",
            code=Code.DEADLINE_EXCEEDED,
            reason="DEADLINE_EXCEEDED",
            metadata={"operation": name},
        )
        error.hint = f"`modelhost ops wait {_names.short(name)}` waits again"
        return error
