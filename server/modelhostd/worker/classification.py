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
    rows = array.reshape(len(array), -1) if top.batched and array.ndim else array.reshape(1, -1)
    count = min(top.count, rows.shape[1])
    if len(rows) * count > MAX_BYTES_ELEMENTS:
        most = MAX_BYTES_ELEMENTS // max(1, len(rows))
        raise BadInputError(f"outputs[{name}].classification", f"at most {most}", top.count)
    texts = np.empty((len(rows), count), object)
    for row, values in enumerate(rows):
        # What is no number comes last. Sorted from the end, so that of equals the first comes first.
        keys = np.nan_to_num(values, nan=-np.inf) if values.dtype.kind == "f" else values
        order = (rows.shape[1] - 1 - np.argsort(keys[::-1], kind="stable"))[::-1][:count]
        for place, index in enumerate(order.tolist()):
            texts[row, place] = _text(values[index].item(), index, top.labels)
    return Tensor("BYTES", texts if top.batched else texts.reshape(-1))


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
