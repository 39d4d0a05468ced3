"""A backend whose one parameter is read from a safetensors file, as the real ones read theirs."""

from collections.abc import Mapping

import numpy as np
import torch

from modelhostd.worker.backend import (
    Backend,
    HealthReport,
    InferContext,
    LoadContext,
    Output,
    Signature,
    Tensor,
)
from modelhostd.worker.backends.files import read_weights


class Stored(torch.nn.Module):
    """What the file holds."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)


class StoredBackend(Backend):
    """Answers any request with the last number of each tensor."""

    tasks = frozenset({"stored"})
    packages = ("torch", "safetensors")

    def __init__(self) -> None:
        self._module: Stored | None = None

    def load(self, context: LoadContext) -> None:
        """Read the file."""
        self._module = Stored(read_weights(context, None))

    def signature(self) -> Signature:
        """Return the empty signature."""
        return Signature()

    def infer(self, inputs: Mapping[str, Tensor], context: InferContext) -> Mapping[str, Output]:
        """Answer."""
        assert self._module is not None
        return {"out": np.array([b.reshape(-1)[-1].item() for b in self._module.buffers()])}

    def health_check(self) -> HealthReport:
        """Report that it is there."""
        return HealthReport(ok=self._module is not None, message="It is there.")

    def unload(self) -> None:
        """Drop the module."""
        self._module = None

    def torch_module(self) -> torch.nn.Module | None:
        """Return the module."""
        return self._module
