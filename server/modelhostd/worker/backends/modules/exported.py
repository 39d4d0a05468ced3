"""Serves what ``torch.export.save`` wrote: a ``.pt2`` file, with the inputs and outputs that it names itself.

Reading one can run code, so this backend serves only where the operator's configuration names it, and the daemon fetches such
files only where an operator allowed unsafe ones.

torch reads program and weights in one: what a worker leaves when it dies cannot be adopted, and the file is read again.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.export.passes import move_to_device_pass
from torch.utils import _pytree as pytree

from modelhostd.worker.backend import (
    BadInputError,
    LoadContext,
    LoadError,
    TensorSpec,
    UnsupportedModelError,
)
from modelhostd.worker.backends.modules.base import CANARY_SIZE, DATATYPES, ModuleBackend

SIZE_MAX = 2**62
"""What a dimension without bounds may have."""


class TorchExportBackend(ModuleBackend):
    """One ``.pt2`` file. No options."""

    platform = "pytorch_export"

    def __init__(self) -> None:
        super().__init__()
        self._tree: Any = None
        self._bounds: dict[str, list[tuple[str, int, int]]] = {}
        """Of each input: for each dimension its symbol (empty = fixed) and its least and most size."""

    def open(
        self, context: LoadContext
    ) -> tuple[torch.nn.Module, tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
        """Read the file."""
        if context.options:
            raise BadInputError("backend_options", "none", ", ".join(context.options))
        if context.precision:
            raise BadInputError(
                "precision", "none: a program is exported in one", context.precision
            )
        found = sorted(context.model_dir.rglob("*.pt2"))
        if len(found) != 1:
            raise LoadError(f"there are {len(found)} .pt2 files; one is served")
        size = found[0].stat().st_size
        context.report(0, size)
        try:
            program = torch.export.load(found[0])
        except Exception as error:
            raise LoadError(f"{found[0].name} cannot be read: {error}") from error
        context.check_cancelled()
        if self._device.type != "cpu":
            program = move_to_device_pass(program, self._device)
        self._tree = program.call_spec.in_spec
        inputs, outputs = self._read(program)
        module = program.module()
        context.report(size, size)
        return module, inputs, outputs

    def run(self, tensors: Mapping[str, torch.Tensor]) -> Sequence[Any]:
        """Call the program with its inputs in their places."""
        assert self._module is not None
        self._check(tensors)
        leaves = [tensors[spec.name] for spec in self._inputs]
        args, kwargs = pytree.tree_unflatten(leaves, self._tree)
        return pytree.tree_leaves(self._module(*args, **kwargs))

    def canary_shape(self, spec: TensorSpec) -> list[int]:
        """Return sizes that the program was exported for."""
        return [min(max(CANARY_SIZE, low), most) for _, low, most in self._bounds[spec.name]]

    def _read(self, program: Any) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
        values = {node.name: node.meta.get("val") for node in program.graph.nodes}
        given, made = program.graph_signature.user_inputs, program.graph_signature.user_outputs
        for name in (*given, *made):
            if not isinstance(values.get(name), torch.Tensor):
                raise UnsupportedModelError(f"'{name}' of the exported program is no tensor")
        for name in given:
            self._bounds[name] = [
                _bounds(size, program.range_constraints) for size in values[name].shape
            ]
        names = _output_names(program.call_spec.out_spec, len(made))
        inputs = tuple(_spec(name, values[name]) for name in given)
        return inputs, tuple(_spec(n, values[m]) for n, m in zip(names, made, strict=True))

    def _check(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Refuse sizes that the program was not exported for; equal symbols are equal sizes."""
        sizes: dict[str, int] = {}
        for name, bounds in self._bounds.items():
            for place, (symbol, least, most) in enumerate(bounds):
                size = tensors[name].shape[place]
                if not least <= size <= most:
                    raise BadInputError(
                        f"inputs[{name}].shape", f"{least} to {most} at {place}", size
                    )
                if symbol and sizes.setdefault(symbol, size) != size:
                    raise BadInputError(
                        f"inputs[{name}].shape", f"{sizes[symbol]} at {place}, as elsewhere", size
                    )


def _spec(name: str, value: torch.Tensor) -> TensorSpec:
    datatype = DATATYPES.get(value.dtype)
    if datatype is None:
        raise UnsupportedModelError(f"'{name}' of the exported program is {value.dtype}")
    # What may have any size is a symbol there, whatever the library's types say.
    sizes: tuple[Any, ...] = tuple(value.shape)
    shape = tuple(size if isinstance(size, int) else -1 for size in sizes)
    return TensorSpec(name, datatype, shape)


def _bounds(size: Any, ranges: Mapping[Any, Any]) -> tuple[str, int, int]:
    if isinstance(size, int):
        return "", size, size
    expression = size.node.expr
    found = ranges.get(expression)
    if found is None:
        return str(expression), 0, SIZE_MAX
    # Where there is no bound torch has a symbol of its own, which says that it is finite and cannot become an int.
    return str(expression), int(max(found.lower, 0)), int(min(found.upper, SIZE_MAX))


def _output_names(tree: Any, count: int) -> list[str]:
    """Return the keys of a program that returns a dictionary, else ``output_0`` and so on."""
    if tree.type is dict and tree.num_leaves == len(tree.context) == count:
        return [str(key) for key in tree.context]
    return [f"output_{number}" for number in range(count)]
