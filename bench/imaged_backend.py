"""The faulty backend with weights that the worker moves between tiers: a module whose bytes are its answer."""

from collections.abc import Mapping

import numpy as np
import torch

from bench.faulty_backend import FaultyBackend
from modelhostd.worker.backend import InferContext, LoadContext, Output, Tensor
from modelhostd.worker.image.descriptions import describe


class Weights(torch.nn.Module):
    """One parameter."""

    weights: torch.nn.Parameter

    def __init__(self, values: torch.Tensor) -> None:
        super().__init__()
        self.weights = torch.nn.Parameter(values, requires_grad=False)


def _made(size: int, context: LoadContext) -> torch.Tensor:
    """Return the weights, in memory of their image where there is any, so that they can outlive this worker."""
    values = (torch.arange(size, dtype=torch.int64) * 31 % 251).to(torch.uint8)
    if context.memory is None or not size:
        return values
    memory = context.memory(size)
    memory.prepare(0, size)
    weights: torch.Tensor = memory.tensor[:size]
    weights.copy_(values)
    memory.describe(describe(memory.tensor, {"weights": weights}, ""))
    return weights


class ImagedBackend(FaultyBackend):
    """Holds ``bytes`` bytes of its seed as parameters; ``sum`` of an answer changes with any of them."""

    tasks = frozenset({"imaged"})
    packages = ("torch",)

    def __init__(self) -> None:
        super().__init__()
        self._module: Weights | None = None

    def load(self, context: LoadContext) -> None:
        """Make the weights, where none outlived an earlier worker."""
        size = int(context.options.get("bytes", 0))
        kept = context.kept
        self._module = Weights(
            _made(size, context) if kept is None else kept.tensors("")["weights"]
        )
        context.report(size, size)

    def infer(self, inputs: Mapping[str, Tensor], context: InferContext) -> Mapping[str, Output]:
        """Do what was asked for, then answer how many weights there are and their sum, each by its place.

        ``quick`` answers the first weight alone.
        """
        assert self._module is not None
        if context.parameters.get("do") == "quick":
            return {"first": self._module.weights[:1].numpy()}
        weights = self._module.weights
        super().infer(inputs, context)
        places = torch.arange(weights.numel(), dtype=torch.int64) % 97
        total = int((weights.to(torch.int64) * places).sum())
        return {"sum": np.array([weights.numel(), total], np.int64)}

    def unload(self) -> None:
        """Drop the weights."""
        self._module = None

    def torch_module(self) -> torch.nn.Module | None:
        """Return what the worker may move."""
        return self._module

    @property
    def measured_bytes(self) -> int:
        """Return the bytes of the weights."""
        return 0 if self._module is None else self._module.weights.nbytes
