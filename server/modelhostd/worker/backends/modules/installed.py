"""Serves weights in safetensors with a module class that the operator installed.

The class is found by its name in the entry point group ``modelhost.modules``; no model's files and no client can
name other code. A class is a ``torch.nn.Module`` with

    inputs, outputs    tuples of (name, datatype, shape), shape with -1 for any size; or properties that give them
    forward(**inputs)  returns a mapping from the outputs' names to tensors

and is made with the arguments that stand in the model's ``module.json``.
"""

import importlib.metadata
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from modelhostd.worker.backend import (
    BadInputError,
    LoadContext,
    LoadError,
    TensorSpec,
    UnsupportedModelError,
)
from modelhostd.worker.backends import files
from modelhostd.worker.backends.building import PRECISIONS
from modelhostd.worker.backends.modules.base import DTYPES, ModuleBackend

ENTRY_POINT_GROUP = "modelhost.modules"
ARGUMENTS = "module.json"
_BUILD = threading.Lock()


class InstalledModuleBackend(ModuleBackend):
    """Option ``class``: the name of an installed module class."""

    platform = "pytorch_module"

    def open(
        self, context: LoadContext
    ) -> tuple[torch.nn.Module, tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
        """Make the module without memory and give it the weights that are read."""
        kind = _find(context.options)
        arguments = dict(files.read_object(context.model_dir, ARGUMENTS))
        if context.precision and context.precision not in PRECISIONS:
            raise BadInputError("precision", " or ".join(PRECISIONS), context.precision)
        try:
            # The default device is the thread's own; it is a lock for constructors that change more.
            with _BUILD, torch.device("meta"):
                module = kind(**arguments)
        except TypeError as error:
            raise LoadError(f"{ARGUMENTS} does not fit the class: {error}") from error
        if not isinstance(module, torch.nn.Module):
            raise UnsupportedModelError(f"{kind.__qualname__} is no torch.nn.Module")
        inputs, outputs = (_specs(module, side) for side in ("inputs", "outputs"))
        _give(module, files.read_weights(context, PRECISIONS.get(context.precision)))
        # Left in RAM, its parameters views of what was read: the worker puts it on its device.
        return module.eval(), inputs, outputs

    def run(self, tensors: Mapping[str, torch.Tensor]) -> Sequence[Any]:
        """Call the module by names."""
        assert self._module is not None
        found = self._module(**tensors)
        return [found[spec.name] for spec in self._outputs]


def _find(options: Mapping[str, Any]) -> Any:
    unknown = set(options) - {"class"}
    if unknown:
        raise BadInputError("backend_options", "class", min(unknown))
    points = {
        point.name: point for point in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)
    }
    name = options.get("class", "")
    point = points.get(name) if isinstance(name, str) else None
    if point is None:
        installed = ", ".join(sorted(points)) or "none is installed"
        raise BadInputError("class", f"an installed module class ({installed})", name)
    try:
        return point.load()
    except Exception as error:
        raise LoadError(f"module class '{name}' cannot be imported: {error}") from error


def _give(module: torch.nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    try:
        missing, unexpected = module.load_state_dict(dict(weights), strict=False, assign=True)
    except RuntimeError as error:
        raise LoadError(f"the weights do not fit the class: {error}") from error
    without = [
        name for name, one in (*module.named_parameters(), *module.named_buffers()) if one.is_meta
    ]
    if missing or unexpected or without:
        named = ", ".join(sorted({*missing, *unexpected, *without})[:3])
        raise LoadError(
            f"the weights lack {len(missing)} of the class's tensors and have {len(unexpected)} that it "
            f"has not ({named})"
        )


def _specs(module: torch.nn.Module, side: str) -> tuple[TensorSpec, ...]:
    try:
        found = tuple(
            TensorSpec(str(name), str(datatype), tuple(int(size) for size in shape))
            for name, datatype, shape in getattr(module, side)
        )
    except (AttributeError, TypeError, ValueError) as error:
        raise UnsupportedModelError(f"the class does not say its {side}: {error}") from error
    unknown = [spec.datatype for spec in found if spec.datatype not in DTYPES]
    if unknown or not found:
        raise UnsupportedModelError(f"{side} of the class: {unknown[0] if unknown else 'none'}")
    return found
