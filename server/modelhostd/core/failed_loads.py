"""When a model whose load failed is tried again for requests. Pure.

Without it every request to a model that cannot be loaded would start one more load that fails. What no backend
can load is not tried again until its files or its config are others; the rest after 1, 2, 4 ... 60 seconds. An
operator's LoadModel is always tried.
"""

from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.values import dataclass

FIRST_DELAY_S = 1.0
LONGEST_DELAY_S = 60.0

LASTING = frozenset({Reason.UNSUPPORTED_MODEL, Reason.BACKEND_NOT_AVAILABLE})
"""What is as it is until the model is another one."""

REMEMBERED = LASTING | {Reason.LOAD_FAILED, Reason.OUT_OF_DEVICE_MEMORY}
"""What a worker says of a load; everything else has nothing to do with the model, or has counts of its own."""


@dataclass(frozen=True, slots=True)
class FailedLoad:
    """The last load of a model, which failed, and how many before it did in a row. Times: monotonic seconds."""

    version: int
    edit: int
    error: ModelhostError
    time: float
    count: int = 1

    def again(self, version: int, edit: int, error: ModelhostError, now: float) -> "FailedLoad":
        """Return what is remembered after one more failure, of the same model or of a changed one."""
        same = (version, edit) == (self.version, self.edit)
        return FailedLoad(version, edit, error, now, self.count + 1 if same else 1)

    def refusal(self, version: int, edit: int, now: float) -> ModelhostError | None:
        """Return what a request is refused with now; None = it may be tried again."""
        if (version, edit) != (self.version, self.edit):
            return None
        error = self.error
        if error.reason in LASTING:
            return ModelhostError(error.reason, error.message, dict(error.metadata))
        # The exponent is bounded too: 2.0 ** 1100 is an OverflowError.
        delay = min(FIRST_DELAY_S * 2.0 ** min(self.count - 1, 10), LONGEST_DELAY_S)
        # Floats: the sum may come to a little more than the delay.
        left = min(self.time + delay - now, delay)
        if left <= 0:
            return None
        return ModelhostError(error.reason, error.message, dict(error.metadata), retry_delay_s=left)
