"""The classification extension: instead of a tensor its highest elements, as texts ``value:index:label``.

Format: https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_classification.md
"""

from collections.abc import Sequence

import numpy as np

from modelhostd.core.values import dataclass
from modelhostd.worker.backend import Array, BadInputError, Tensor
from modelhostd.worker.tensors import MAX_BYTES_ELEMENTS


@dataclass(frozen=True, slots=True)
class Top:
    """What a request wants of one output: its ``count`` highest elements; of each item where it is ``batched``."""

    count: int
    labels: Sequence[str] = ()
    batched: bool = False


def classify(name: str, tensor: Tensor, top: Top) -> Tensor:
    """Return BYTES ``[count]``, or ``[items, count]``, the highest first; fewer where there are not so many.

    Equal elements are in the order of their indices. Raises :class:`BadInputError` for an output without numbers.
    """
    array = _numbers(name, tensor)
    items = len(array) if top.batched and array.ndim else 1
    rows = array.reshape(items, array.size // items if items else 0)
    count = min(top.count, rows.shape[1])
    if len(rows) * count > MAX_BYTES_ELEMENTS:
        most = MAX_BYTES_ELEMENTS // max(1, len(rows))
        raise BadInputError(f"outputs[{name}].classification", f"at most {most}", top.count)
    texts = np.empty((len(rows), count), object)
    for row, values in enumerate(rows):
        for place, index in enumerate(_highest(values, count)):
            texts[row, place] = _text(values[index].item(), index, top.labels)
    return Tensor("BYTES", texts if top.batched else texts.reshape(-1))


def _highest(values: Array, count: int) -> list[int]:
    """Return the indices of the ``count`` highest, which are ordered alone: all of 15 million took 18 s."""
    # The highest is the lowest key, also of integers without a sign; what is no number comes last in every order.
    keys = -values if values.dtype.kind == "f" else ~values
    chosen = np.arange(len(keys))
    if count < len(keys):
        last = np.partition(keys, count - 1)[count - 1]
        chosen = np.flatnonzero((keys <= last) | np.isnan(last))
    order: list[int] = chosen[np.argsort(keys[chosen], kind="stable")][:count].tolist()
    return order


def _numbers(name: str, tensor: Tensor) -> Array:
    array = tensor.array
    if tensor.datatype == "BF16":
        # The upper half of a float of 32 bits.
        return (array.astype(np.uint32) << 16).view(np.float32)
    if tensor.datatype in ("BYTES", "BOOL"):
        raise BadInputError(
            f"outputs[{name}].classification", "an output of numbers", tensor.datatype
        )
    return array.astype(np.float32) if tensor.datatype == "FP16" else array


def _text(value: object, index: int, labels: Sequence[str]) -> bytes:
    shown = f"{value:f}" if isinstance(value, float) else str(value)
    label = f":{labels[index]}" if index < len(labels) else ""
    return f"{shown}:{index}{label}".encode()
