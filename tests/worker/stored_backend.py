"""A backend whose module is what a safetensors file says, for the tests of images that outlive their worker.

Half of it is in the file; the rest, tied and not persistent, comes of building the module. The answer to any request is FP32
``out``, one number for each of eight rows, of which every tensor has its part.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from modelhostd.worker.backend import (
    Backend,
    HealthReport,
    InferContext,
    LoadContext,
    LoadError,
    Output,
    Signature,
    Tensor,
)
from modelhostd.worker.backends.files import read_weights

FILE = "model.safetensors"


class Stored(torch.nn.Module):
    """Two layers, one weight tied to the other, and a buffer that is in no file."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = torch.nn.Linear(width, width)
        self.second = torch.nn.Linear(width, width, bias=False)
        self.register_buffer("ramp", torch.linspace(0.5, 1.5, width), persistent=False)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Return one number per row."""
        return (self.second(self.first(rows) * self.ramp)).sum(1)


def write(folder: Path, seed: int, width: int = 96) -> Path:
    """Write a model's one file."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    tensors = {"weight": torch.rand(width, width), "bias": torch.rand(width)}
    save_file(tensors, folder / FILE)
    return folder


class StoredBackend(Backend):
    """Hosts a :class:`Stored`; option ``fail``: the load does when all is read; ``converted_later``: a load that adopts
    has weights of its own in place of those.
    """

    tasks = frozenset({"stored"})
    packages = ("torch", "safetensors")

    def __init__(self) -> None:
        self._module: Stored | None = None

    @classmethod
    def prepare(cls) -> Mapping[str, str]:
        """Import nothing more: torch is here."""
        return {"torch": torch.__version__}

    def load(self, context: LoadContext) -> None:
        """Read the file, and have the module's parameters be views of what was read."""
        found = read_weights(context, None)
        if context.options.get("fail"):
            raise LoadError("as it was told")
        if context.options.get("converted_later") and context.kept is not None:
            found = {name: tensor.clone() for name, tensor in found.items()}
        width = found["bias"].numel()
        module = Stored(width)
        module.first.weight = torch.nn.Parameter(found["weight"], requires_grad=False)
        module.first.bias = torch.nn.Parameter(found["bias"], requires_grad=False)
        module.second.weight = module.first.weight
        self._module = module.eval()

    def signature(self) -> Signature:
        """Return the empty signature."""
        return Signature()

    def infer(self, inputs: Mapping[str, Tensor], context: InferContext) -> Mapping[str, Output]:
        """Answer fixed rows."""
        assert self._module is not None
        with torch.inference_mode():
            width = self._module.ramp.numel()
            rows = torch.arange(8 * width, dtype=torch.float32).reshape(8, width) / (8 * width)
            return {"out": self._module(rows).numpy()}

    def health_check(self) -> HealthReport:
        """Report that it is there."""
        return HealthReport(ok=self._module is not None, message="It is there.")

    def unload(self) -> None:
        """Drop the module."""
        self._module = None

    def torch_module(self) -> torch.nn.Module | None:
        """Return the module."""
        return self._module
