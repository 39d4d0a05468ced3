"""Open Inference Protocol tensors to numpy and back, every number checked before memory is taken.

Rules: ``raw`` is little-endian and row-major; its length equals the product of the shape times the
element size, computed in Python integers, which do not overflow. BYTES elements are a little-endian u32 length and the
bytes. Source: https://github.com/kserve/open-inference-protocol (specification/protocol).
"""

import math
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np

from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.worker.backend import Array, Output, Tensor

SMALL_BYTES = 16 * 1024
"""Up to here copies, protobuf's and our own, cost less than avoiding them."""
MAX_RANK = 8
MAX_TENSORS = 64
MAX_NAME_CHARACTERS = 256
MAX_BYTES_ELEMENTS = 1_000_000
"""Each element of a BYTES tensor is a Python object: a million of them takes about 0.2 s."""
LONG_TEXT_BYTES = 4096
"""Elements above it on average are copied one by one, not all at once before."""

_NUMPY: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "INT8": np.dtype("<i1"),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "UINT8": np.dtype("<u1"),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "FP16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
    "BYTES": np.dtype(object),
}
DATATYPES = tuple(_NUMPY)
_INFERRED = {dtype: name for name, dtype in _NUMPY.items() if name != "BF16"}

CONTENTS_FIELD = {
    "BOOL": "bool_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}
"""Where typed contents of a datatype stand; FP16 and BF16 exist only as raw."""

_MAX_EXTENT = 2**47
"""Product of the sizes that are not 0: numpy refuses what no address space could hold, also where
another size is 0 and nothing is held."""

_LENGTH = struct.Struct("<I")


def refuse(message: str, field: str, expected: str, actual: object) -> ModelhostError:
    """Return INVALID_ARGUMENT for a part of a request, with the text that existing clients match on."""
    shown = str(actual)
    shown = shown if len(shown) <= 200 else shown[:197] + "..."
    metadata = {"field": field, "expected": expected, "actual": shown}
    return ModelhostError(Reason.INVALID_ARGUMENT, message, metadata)


def element_count(name: str, model: str, datatype: str, shape: Sequence[int]) -> int:
    """Return how many elements a tensor of this shape has, after checking datatype, rank and sizes."""
    if datatype not in _NUMPY:
        raise refuse(
            f"inference input '{name}' for model '{model}' has unknown data-type '{datatype[:32]}'; "
            f"known are {', '.join(DATATYPES)}",
            f"inputs[{name}].datatype",
            "|".join(DATATYPES),
            datatype,
        )
    if len(shape) > MAX_RANK:
        raise refuse(
            f"input '{name}' for model '{model}' has {len(shape)} dimensions, at most {MAX_RANK} "
            "are supported",
            f"inputs[{name}].shape",
            f"at most {MAX_RANK} dimensions",
            len(shape),
        )
    if shape and min(shape) < 0:
        raise refuse(
            f"input '{name}' for model '{model}' has a negative dimension in {list(shape)}; a "
            "request gives the size of each",
            f"inputs[{name}].shape",
            "sizes of 0 and more",
            list(shape),
        )
    count = math.prod(shape)
    if (count or math.prod(size for size in shape if size)) > _MAX_EXTENT:
        raise refuse(
            f"input '{name}' for model '{model}' is larger than any memory: {list(shape)}",
            f"inputs[{name}].shape",
            f"at most {_MAX_EXTENT} elements",
            list(shape),
        )
    if datatype == "BYTES" and count > MAX_BYTES_ELEMENTS:
        raise refuse(
            f"input '{name}' for model '{model}' has {count} BYTES elements, at most "
            f"{MAX_BYTES_ELEMENTS} are taken in one request; send several",
            f"inputs[{name}].shape",
            f"at most {MAX_BYTES_ELEMENTS} elements",
            count,
        )
    return count


def from_raw(name: str, model: str, datatype: str, shape: Sequence[int], raw: memoryview) -> Tensor:
    """Return the tensor in ``raw`` without a copy (BOOL and BYTES are copied)."""
    count = element_count(name, model, datatype, shape)
    if datatype == "BYTES":
        return Tensor(datatype, _split(name, model, raw, count).reshape(shape))
    dtype = _NUMPY[datatype]
    expected = count * dtype.itemsize
    if len(raw) != expected:
        raise refuse(
            f"input byte size mismatch for input '{name}' for model '{model}'. "
            f"Expected {expected}, got {len(raw)}",
            f"raw_input_contents[{name}]",
            f"{expected} bytes",
            len(raw),
        )
    if datatype == "BOOL":
        # Any byte may come; numpy's bool is undefined for others than 0 and 1.
        return Tensor(datatype, (np.frombuffer(raw, np.uint8) != 0).reshape(shape))
    return Tensor(datatype, np.frombuffer(raw, dtype).reshape(shape))


def from_contents(
    name: str, model: str, datatype: str, shape: Sequence[int], values: Sequence[Any]
) -> Tensor:
    """Return the tensor of typed contents; ``values`` is the one repeated field that its type has."""
    count = element_count(name, model, datatype, shape)
    if len(values) != count:
        raise refuse(
            f"unexpected number of elements for input '{name}' for model '{model}'. "
            f"Expected {count}, got {len(values)}",
            f"inputs[{name}].contents",
            f"{count} elements",
            len(values),
        )
    array: Array
    if datatype == "BYTES":
        array = np.empty(count, object)
        array[:] = list(values)
        return Tensor(datatype, array.reshape(shape))
    dtype = _NUMPY[datatype]
    array = np.fromiter(values, dtype if dtype.itemsize > 2 else np.int64, count)
    if dtype.itemsize <= 2 and dtype.kind in "iu":
        limits = np.iinfo(dtype)
        if count and not (limits.min <= array.min() and array.max() <= limits.max):
            raise refuse(
                f"input '{name}' for model '{model}' has an element outside {datatype}",
                f"inputs[{name}].contents",
                f"{limits.min} to {limits.max}",
                f"{array.min()} to {array.max()}",
            )
    return Tensor(datatype, array.astype(dtype, copy=False).reshape(shape))


def _split(name: str, model: str, raw: memoryview, count: int) -> Array:
    # Slices of bytes are made twice as fast as those of a view, which must be copied once more.
    data = bytes(raw) if len(raw) < LONG_TEXT_BYTES * count else raw
    parts: list[bytes] = []
    add, unpack, width = parts.append, _LENGTH.unpack_from, _LENGTH.size
    position, end = 0, len(data)
    try:
        for _ in range(count):
            start = position + width
            position = start + unpack(data, position)[0]
            add(bytes(data[start:position]))
    except struct.error:
        # What is longer than the data is cut, and the next length is not there.
        if position <= end:
            problem = f"the data ends in element {len(parts)}"
            raise _bytes_mismatch(name, model, count, problem) from None
    if position > end:
        length = position - (end - len(parts[-1]))
        problem = f"element {len(parts) - 1} of {length} bytes passes the end"
        raise _bytes_mismatch(name, model, count, problem)
    if position != end:
        raise _bytes_mismatch(name, model, count, f"{end - position} bytes are left over")
    elements: Array = np.empty(count, object)
    elements[:] = parts
    return elements


def _bytes_mismatch(name: str, model: str, count: int, problem: str) -> ModelhostError:
    return refuse(
        f"unexpected data of BYTES input '{name}' for model '{model}': {problem}",
        f"raw_input_contents[{name}]",
        f"{count} elements, each a little-endian u32 length and its bytes",
        problem,
    )


def as_tensor(output: Output) -> Tensor:
    """Return a backend's output as a tensor. Raises ``TypeError`` for what has no datatype."""
    if isinstance(output, Tensor):
        return output
    array = np.asarray(output)
    datatype = _INFERRED.get(array.dtype.newbyteorder("<"))
    if datatype is None and array.dtype.kind in "SU":
        datatype = "BYTES"
    if datatype is None:
        raise TypeError(f"no Open Inference Protocol datatype for a numpy array of {array.dtype}")
    return Tensor(datatype, array)


def least_bytes(datatype: str, shape: Sequence[int]) -> int:
    """Return what the raw contents of such a tensor have, of texts their lengths alone; 0 where a size is not known."""
    if min(shape, default=0) < 0 or datatype not in _NUMPY:
        return 0
    element = _LENGTH.size if datatype == "BYTES" else _NUMPY[datatype].itemsize
    return math.prod(shape) * element


def to_raw(tensor: Tensor) -> bytes | memoryview:
    """Return the tensor as raw contents, without a copy where it is large and has that form already.

    Raises ``TypeError`` or ``ValueError`` where array and datatype disagree: a backend's bug.
    """
    if tensor.datatype == "BYTES":
        parts: list[bytes] = []
        for element in tensor.array.reshape(-1).tolist():
            data = element.encode() if isinstance(element, str) else bytes(element)
            parts += (_LENGTH.pack(len(data)), data)
        return b"".join(parts)
    dtype = _NUMPY[tensor.datatype]
    if tensor.array.dtype != dtype:
        raise TypeError(f"an array of {tensor.array.dtype} is not {tensor.datatype}")
    if tensor.array.nbytes <= SMALL_BYTES:
        return tensor.array.tobytes()
    array = np.ascontiguousarray(tensor.array)
    return array.reshape(-1).view(np.uint8).data if array.size else b""
