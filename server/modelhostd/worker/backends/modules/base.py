"""What backends of plain modules share: tensors to and from torch, canary, memory."""

import abc
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch

from modelhostd.worker.backend import (
    Array,
    Backend,
    BadInputError,
    HealthReport,
    InferContext,
    LoadContext,
    Output,
    Signature,
    Tensor,
    TensorSpec,
    UnsupportedModelError,
)
from modelhostd.worker.backends import files
from modelhostd.worker.backends.building import find_device

CANARY_SIZE = 2
"""Of each dimension that may have any size; 1 is special to compilers."""
CANARY_TOLERANCE = 1e-2

DTYPES = {
    "BOOL": torch.bool,
    "INT8": torch.int8,
    "INT16": torch.int16,
    "INT32": torch.int32,
    "INT64": torch.int64,
    "UINT8": torch.uint8,
    "UINT16": torch.uint16,
    "UINT32": torch.uint32,
    "UINT64": torch.uint64,
    "FP16": torch.float16,
    "BF16": torch.bfloat16,
    "FP32": torch.float32,
    "FP64": torch.float64,
}
DATATYPES = {dtype: name for name, dtype in DTYPES.items()}


class ModuleBackend(Backend):
    """A module with named inputs and outputs. Where ``max_batch_size`` is set, requests are batched.

    That is for whoever configures the model to say: no file tells whether items influence each other.
    """

    packages = ("torch",)
    platform: ClassVar[str] = "pytorch"
    hands_over = True

    def __init__(self) -> None:
        self._module: torch.nn.Module | None = None
        self._device = torch.device("cpu")
        self._inputs: tuple[TensorSpec, ...] = ()
        self._outputs: tuple[TensorSpec, ...] = ()
        self._max_batch_size = 0
        self._canary: dict[str, torch.Tensor] | None = None

    @classmethod
    def prepare(cls) -> Mapping[str, str]:
        """Tell torch's version; it is imported with this file."""
        return {"torch": torch.__version__}

    def load(self, context: LoadContext) -> None:
        """Open the module and have it ready on its device."""
        self._device = find_device(context.device)
        self._module, self._inputs, self._outputs = self.open(context)
        self._max_batch_size = context.max_batch_size
        if self._max_batch_size and not self._dynamic():
            raise UnsupportedModelError(
                "max_batch_size is set, and not every input and output has a first dimension of any size"
            )
        self._module.requires_grad_(False)

    @abc.abstractmethod
    def open(
        self, context: LoadContext
    ) -> tuple[torch.nn.Module, tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
        """Return the module on its device, its inputs and its outputs."""

    @abc.abstractmethod
    def run(self, tensors: Mapping[str, torch.Tensor]) -> Sequence[Any]:
        """Return the outputs, in the order of their specifications."""

    def signature(self) -> Signature:
        """Return what the model says."""
        batched = self._max_batch_size > 0
        return Signature(
            inputs=self._inputs,
            outputs=self._outputs,
            batched=batched,
            max_batch_size=self._max_batch_size,
            joinable=batched,
            parameters=frozenset(),
        )

    def infer(self, inputs: Mapping[str, Tensor], context: InferContext) -> Mapping[str, Output]:
        """Run the module once."""
        context.check_cancelled()
        tensors = {name: to_torch(tensor).to(self._device) for name, tensor in inputs.items()}
        found = context.compute(partial(self._run, tensors))
        wanted = context.outputs
        return {
            spec.name: to_tensor(output)
            for spec, output in zip(self._outputs, found, strict=True)
            if not wanted or spec.name in wanted
        }

    def _run(self, tensors: Mapping[str, torch.Tensor]) -> Sequence[Any]:
        with torch.inference_mode():
            return self.run(tensors)

    def health_check(self) -> HealthReport:
        """Run ones through it: finite numbers, and the same as the first time."""
        tensors = {
            spec.name: torch.ones(
                self.canary_shape(spec),
                dtype=DTYPES[spec.datatype],
                device=self._device,
            )
            for spec in self._inputs
            if not spec.optional
        }
        with torch.inference_mode():
            found = self.run(tensors)
        floats = {
            spec.name: output.float().cpu()
            for spec, output in zip(self._outputs, found, strict=True)
            if output.is_floating_point()
        }
        for name, numbers in floats.items():
            if not bool(torch.isfinite(numbers).all()):
                return HealthReport(ok=False, message=f"The canary's {name} is not finite.")
            if self._canary is not None:
                first = self._canary[name]
                most = max(1e-6, float(first.abs().max()) if first.numel() else 0.0)
                if numbers.shape != first.shape or (
                    numbers.numel() and (numbers - first).abs().max() > CANARY_TOLERANCE * most
                ):
                    return HealthReport(ok=False, message=f"The canary's {name} has changed.")
        self._canary = self._canary or floats
        return HealthReport(ok=True, message="The canary was answered as the first time.")

    def canary_shape(self, spec: TensorSpec) -> list[int]:
        """Return the sizes of an input of the health check."""
        return [CANARY_SIZE if size < 0 else size for size in spec.shape]

    def unload(self) -> None:
        """Drop the module, and give device memory back to the driver."""
        self._module = self._canary = None
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    @property
    def measured_bytes(self) -> int:
        """Bytes of parameters and buffers; 0 before the load and after the unload."""
        return 0 if self._module is None else files.measure(self._module)

    def torch_module(self) -> Any | None:
        """Return the module."""
        return self._module

    def is_poisoned(self, error: BaseException) -> bool:
        """Whether CUDA reported a fault other than a lack of memory."""
        if isinstance(error, torch.OutOfMemoryError):
            return False
        return isinstance(error, RuntimeError) and "CUDA error" in str(error)

    def _dynamic(self) -> bool:
        return all(spec.shape[:1] == (-1,) for spec in (*self._inputs, *self._outputs))


def to_torch(tensor: Tensor) -> torch.Tensor:
    """Return a tensor of a request as torch's, copied: the request's memory is read-only and not ours for long."""
    if tensor.datatype == "BYTES":
        raise BadInputError("inputs", "numbers", "BYTES")
    made = torch.from_numpy(np.array(tensor.array))
    return made.view(torch.bfloat16) if tensor.datatype == "BF16" else made


def to_tensor(output: Any) -> Tensor:
    """Return what a module gave as a tensor of a response. Raises ``TypeError`` for what is none."""
    if not isinstance(output, torch.Tensor) or output.dtype not in DATATYPES:
        raise TypeError(f"the module gave {type(output).__name__}, not a tensor that can be sent")
    here = output.detach().cpu().contiguous()
    datatype = DATATYPES[here.dtype]
    array: Array = here.view(torch.uint16).numpy() if datatype == "BF16" else here.numpy()
    return Tensor(datatype, array)
