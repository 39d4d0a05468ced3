"""What lies where in a part of an image: written beside it, and read by the load that adopts it.

Either what was read, by the names in the files, or, where a model does with little of that (its library fused or converted it, so that
the image was packed anew), what its module then had, by the names there.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch

from modelhostd.worker.backend import LoadError
from modelhostd.worker.image.layout import Place


def describe(memory: torch.Tensor, tensors: Mapping[str, torch.Tensor], asked: str) -> bytes:
    """Return what lies where in ``memory``, as :meth:`Weights.tensors` reads it; ``asked`` is what was asked for."""
    base = memory.data_ptr()
    listed = [
        (name, _name(t.dtype), t.shape, t.stride(), t.data_ptr() - base if t.numel() else 0)
        for name, t in tensors.items()
    ]
    return json.dumps({"asked": asked, "tensors": listed}).encode()


def describe_state(module: torch.nn.Module, places: Iterable[Place], read: bytes) -> bytes:
    """Return what lies where in an image of one part, whose weights were made of those that ``read`` describes.

    Empty where a module has state that the image has not.
    """
    by_tensor = {id(place.tensor): place for place in places}
    listed = []
    for name, tensor in module.state_dict(keep_vars=True).items():
        place = by_tensor.get(id(tensor))
        if place is None:
            return b""
        offset = 0 if place.part < 0 else place.offset
        listed.append((name, _name(place.dtype), place.shape, place.stride, offset))
    asked = json.loads(read)["asked"]
    return json.dumps({"asked": asked, "state": True, "tensors": listed}).encode()


class Weights:
    """What a backend finds in place of files: the tensors that an earlier load read, or made of what it read."""

    def __init__(self, memory: torch.Tensor, description: bytes) -> None:
        self._memory = memory
        self._description = description

    @cached_property
    def _described(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self._description)
        return found

    def tensors(self, asked: str) -> dict[str, torch.Tensor]:
        """Return the tensors by name, as views of the image. Raises :class:`LoadError` where others were asked for."""
        if self._described["asked"] != asked:
            raise LoadError(f"the image that stayed is of {self._described['asked']}, not {asked}")
        return {
            name: self._view(getattr(torch, dtype), shape, stride, offset)
            for name, dtype, shape, stride, offset in self._described["tensors"]
        }

    def suit(self, module: torch.nn.Module) -> bool:
        """Whether a module that was made of them is what it was: where they are its state, it has each as it lies here.

        A library that converts what was converted already makes other tensors of it.
        """
        if not self._described.get("state"):
            return True
        base, state = self._memory.data_ptr(), module.state_dict()
        return len(state) == len(self._described["tensors"]) and all(
            (found := state.get(name)) is not None
            and (_name(found.dtype), list(found.shape), list(found.stride()))
            == (dtype, shape, stride)
            and (not found.numel() or found.data_ptr() == base + offset)
            for name, dtype, shape, stride, offset in self._described["tensors"]
        )

    def _view(
        self, dtype: torch.dtype, shape: Sequence[int], stride: Sequence[int], offset: int
    ) -> torch.Tensor:
        if 0 in shape:
            return torch.empty_strided(shape, stride, dtype=dtype)
        reach = 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
        part = self._memory[offset : offset + reach * dtype.itemsize]
        return part.view(dtype).as_strided(shape, stride)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
