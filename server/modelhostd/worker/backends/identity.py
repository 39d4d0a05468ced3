"""Answers any tensors with the same tensors: for tests, benches, and trying out a client."""

from collections.abc import Mapping

from modelhostd.worker.backend import (
    Backend,
    BadInputError,
    HealthReport,
    InferContext,
    LoadContext,
    Output,
    Signature,
    Tensor,
)


class IdentityBackend(Backend):
    """Outputs are the inputs: same names, datatypes, shapes and bytes. Holds no memory.

    Where the model's ``max_batch_size`` is set, the first dimension counts items and requests are batched.
    """

    platform = "identity"

    def __init__(self) -> None:
        self._max_batch_size = 0

    def load(self, context: LoadContext) -> None:
        """Refuse options, since there are none; files are not looked at."""
        if context.options:
            raise BadInputError("backend_options", "none", ", ".join(context.options))
        self._max_batch_size = context.max_batch_size
        context.report(0, 0)

    def signature(self) -> Signature:
        """Return the empty signature: any tensors."""
        most = self._max_batch_size
        return Signature(batched=most > 0, max_batch_size=most, joinable=most > 0)

    def infer(self, inputs: Mapping[str, Tensor], context: InferContext) -> Mapping[str, Output]:
        """Return the inputs."""
        context.check_cancelled()
        return inputs

    def health_check(self) -> HealthReport:
        """Report that the worker runs, which is all there is to it."""
        return HealthReport(ok=True, message="The worker answers.")

    def unload(self) -> None:
        """Do nothing: nothing is held."""
