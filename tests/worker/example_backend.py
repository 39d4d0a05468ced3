"""An example of a backend of one's own: multiplies by a factor that stands in the model's files.

A distribution offers it by an entry point (see ``test_backend_interface.py``), and an operator allows it.
"""

import json
from collections.abc import Mapping

import numpy as np

from modelhostd.worker.backend import (
    Array,
    Backend,
    BadInputError,
    HealthReport,
    InferContext,
    LoadContext,
    LoadError,
    Output,
    Signature,
    Tensor,
    TensorSpec,
)


class ExampleBackend(Backend):
    """FP32 ``x`` [-1, 4] in, FP32 ``y`` [-1, 4] out; ``scale.json`` holds ``{"factor": number}``."""

    tasks = frozenset({"example-scaling"})
    packages = ("numpy",)
    platform = "example"

    def __init__(self) -> None:
        self._factor: Array | None = None

    def load(self, context: LoadContext) -> None:
        """Read the factor."""
        path = context.model_dir / "scale.json"
        try:
            factor = float(json.loads(path.read_text())["factor"])
        except (OSError, ValueError, KeyError) as error:
            raise LoadError(f"scale.json has no factor: {error}") from error
        context.check_cancelled()
        self._factor = np.full(4, factor, np.float32)
        context.report(self._factor.nbytes, self._factor.nbytes)

    def signature(self) -> Signature:
        """Return rows of four numbers, as many as are sent."""
        return Signature(
            inputs=(TensorSpec("x", "FP32", (-1, 4), "rows to scale"),),
            outputs=(TensorSpec("y", "FP32", (-1, 4), "the rows, scaled"),),
            batched=True,
            max_batch_size=8,
        )

    def infer(self, inputs: Mapping[str, Tensor], context: InferContext) -> Mapping[str, Output]:
        """Scale; infinities are refused, to show how."""
        context.check_cancelled()
        rows = inputs["x"].array
        if not np.isfinite(rows).all():
            raise BadInputError("x", "finite numbers", "infinity or NaN")
        return {"y": rows * self._factor}

    def health_check(self) -> HealthReport:
        """Scale ones and compare."""
        ones = np.ones((1, 4), np.float32)
        answer = self.infer({"x": Tensor("FP32", ones)}, InferContext())["y"]
        ok = bool(np.array_equal(np.asarray(answer)[0], self._factor))
        return HealthReport(ok=ok, message="Ones were scaled.")

    def unload(self) -> None:
        """Drop the factor."""
        self._factor = None

    @property
    def measured_bytes(self) -> int:
        """Return the bytes of the factor."""
        return 0 if self._factor is None else self._factor.nbytes
