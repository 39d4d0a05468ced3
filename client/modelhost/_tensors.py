"""Numpy arrays to and from the Open Inference Protocol's raw tensors.

Datatypes: BOOL, INT8..64, UINT8..64, FP16, FP32, FP64 are numpy's of the same size; BYTES is an object
array of ``bytes`` (strings are sent as UTF-8). numpy has no BF16: it is sent from arrays of ml_dtypes'
``bfloat16``, or from float32 where the caller names the datatype, and comes back as float32, which holds
every BF16 value exactly.

Raw forms: little-endian, row-major; BOOL one byte; each BYTES element a 32-bit length and its bytes.
Source: https://github.com/kserve/open-inference-protocol and Triton's binary tensor data extension.
"""

import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from modelhost._arguments import shown, text
from modelhost._errors import Code, ModelhostError, invalid, make_error
from modelhost.oip import open_inference_pb2 as oip

Array = npt.NDArray[Any]
Parameter = bool | int | float | str

_DTYPES: Mapping[str, np.dtype[Any]] = {
    "BOOL": np.dtype("?"),
    **{f"INT{8 * size}": np.dtype(f"<i{size}") for size in (1, 2, 4, 8)},
    **{f"UINT{8 * size}": np.dtype(f"<u{size}") for size in (1, 2, 4, 8)},
    **{f"FP{8 * size}": np.dtype(f"<f{size}") for size in (2, 4, 8)},
}
_NAMES: Mapping[tuple[str, int], str] = {(t.kind, t.itemsize): n for n, t in _DTYPES.items()}
DATATYPES = (*_DTYPES, "BF16", "BYTES")

_LENGTH = struct.Struct("<I")


def infer_request(
    model: str,
    inputs: Mapping[str, npt.ArrayLike],
    *,
    outputs: Iterable[str] = (),
    version: str = "",
    datatypes: Mapping[str, str] | None = None,
    parameters: Mapping[str, Parameter] | None = None,
    request_id: str = "",
) -> oip.ModelInferRequest:
    """Return the request for ``inputs``; ``datatypes`` names those that the arrays do not say.

    Raises InvalidArgument for an array that no datatype holds.
    """
    datatypes = datatypes or {}
    for name in datatypes.keys() - inputs.keys():
        raise invalid("datatypes", f"names of inputs: {', '.join(inputs)}", name)
    request = oip.ModelInferRequest(model_name=model, model_version=version, id=request_id)
    for name, value in inputs.items():
        array = _array(name, value)
        datatype, raw = encode(name, array, datatypes.get(name, ""))
        request.inputs.add(name=name, datatype=datatype, shape=array.shape)
        request.raw_input_contents.append(raw)
    for name in outputs:
        request.outputs.add(name=name)
    for key, parameter in (parameters or {}).items():
        _set_parameter(request.parameters[key], key, parameter)
    return request


def infer_result(response: oip.ModelInferResponse) -> dict[str, Array]:
    """Return the outputs by name, in the response's order.

    The arrays are views of the message and read-only, except for BYTES and BF16; ``copy()`` what is to
    be written to. Raises Internal for an answer that is none.
    """
    if len(response.outputs) != len(response.raw_output_contents):
        raise _bad_answer(
            f"{len(response.outputs)} outputs with {len(response.raw_output_contents)} raw contents"
        )
    return {
        output.name: decode(output.name, output.datatype, output.shape, raw)
        for output, raw in zip(response.outputs, response.raw_output_contents, strict=True)
    }


def encode(name: str, array: Array, datatype: str = "") -> tuple[str, bytes]:
    """Return an array's datatype and raw form. ``datatype`` empty = the one of the array's dtype."""
    datatype = datatype or datatype_of(name, array)
    if datatype == "BYTES":
        return datatype, b"".join(_packed(_elements(name, array)))
    if datatype == "BF16":
        return datatype, _bf16_bits(name, array).tobytes()
    dtype = _DTYPES.get(datatype)
    if dtype is None:
        raise invalid(f"datatypes[{name}]", f"one of {', '.join(DATATYPES)}", repr(datatype))
    numbers = array.dtype.kind in "iu" and dtype.kind in "iu"
    if not numbers and not np.can_cast(array.dtype, dtype, casting="same_kind"):
        raise invalid(f"inputs[{name}]", f"an array that {datatype} can hold", str(array.dtype))
    with np.errstate(over="ignore"):
        sent = array.astype(dtype, copy=False)
    _check_finite(name, datatype, array, sent)
    if array.dtype.kind in "iu" and sent.dtype != array.dtype and not np.array_equal(sent, array):
        # A whole number that does not fit would arrive as another one.
        raise invalid(f"inputs[{name}]", f"numbers that {datatype} can hold", _span(array))
    return datatype, sent.tobytes()


def decode(name: str, datatype: str, shape: Sequence[int], raw: bytes) -> Array:
    """Return the array of a raw tensor. Raises Internal where length and shape do not agree."""
    count = math.prod(shape)
    if any(size < 0 for size in shape):
        raise _bad_answer(f"output {name} has the shape {list(shape)}")
    if datatype == "BYTES":
        return _bytes_array(name, shape, count, raw)
    bits = datatype == "BF16"
    dtype = np.dtype("<u2") if bits else _DTYPES.get(datatype)
    if dtype is None:
        raise _bad_answer(f"output {name} has the datatype {datatype!r}")
    if len(raw) != count * dtype.itemsize:
        raise _bad_answer(f"output {name} of shape {list(shape)} has {len(raw)} bytes")
    array: Array = np.frombuffer(raw, dtype=dtype).reshape(tuple(shape))
    if bits:
        array = (array.astype("<u4") << np.uint32(16)).view("<f4")
    return array


def text_array(texts: Iterable[str]) -> Array:
    """Return texts as a BYTES array of one dimension. Raises InvalidArgument for one bare string."""
    if isinstance(texts, str | bytes):
        raise invalid("texts", "a list of strings", "one string; put it in a list")
    listed = list(texts)
    if not listed:
        raise invalid("texts", "at least one text", "none")
    array = np.empty(len(listed), dtype=object)
    for i, one in enumerate(listed):
        array[i] = text(f"texts[{i}]", one).encode()
    return array


def datatype_of(name: str, array: Array) -> str:
    """Return the datatype of an array's dtype. Raises InvalidArgument where there is none."""
    dtype = array.dtype
    if dtype.kind in "OSU":
        return "BYTES"
    if dtype.name == "bfloat16":
        return "BF16"
    found = _NAMES.get((dtype.kind, dtype.itemsize))
    if found is None:
        raise invalid(f"inputs[{name}]", f"an array of {', '.join(DATATYPES)}", str(dtype))
    return found


def _array(name: str, value: npt.ArrayLike) -> Array:
    try:
        array = np.asarray(value)
    except (TypeError, ValueError, OverflowError) as error:
        # Lists of unequal lengths, or an object that says it were an array.
        raise invalid(
            f"inputs[{name}]", "an array, or numbers in lists of equal lengths", str(error)[:200]
        ) from None
    # A masked array's own; ``np.ma`` is a library more to import.
    masked = np.count_nonzero(getattr(value, "mask", 0)) if isinstance(value, np.ndarray) else 0
    if masked:
        raise invalid(
            f"inputs[{name}]", "an array without a mask, as filled() gives", f"{masked} masked"
        )
    return array


def _check_finite(name: str, datatype: str, array: Array, sent: Array) -> None:
    """Raise InvalidArgument where a number has become infinite on its way into a smaller datatype."""
    if sent.dtype == array.dtype or sent.dtype.kind != "f":
        return
    lost = np.isinf(sent) & ~np.isinf(array)
    if lost.any():
        raise invalid(f"inputs[{name}]", f"numbers that {datatype} can hold", _span(array[lost]))


def _span(array: Array) -> str:
    return f"{array.min()} to {array.max()}"


def _elements(name: str, array: Array) -> Iterable[bytes]:
    if array.dtype.kind not in "OSU":
        raise invalid(f"inputs[{name}]", "bytes or strings for BYTES", str(array.dtype))
    for element in array.ravel(order="C").tolist():
        if isinstance(element, str):
            yield text(f"inputs[{name}]", element).encode()
        elif isinstance(element, bytes | bytearray | memoryview):
            yield bytes(element)
        else:
            raise invalid(f"inputs[{name}]", "bytes or strings", type(element).__name__)


def _packed(elements: Iterable[bytes]) -> Iterable[bytes]:
    for element in elements:
        yield _LENGTH.pack(len(element))
        yield element


def _bytes_array(name: str, shape: Sequence[int], count: int, raw: bytes) -> Array:
    elements: list[bytes] = []
    at = 0
    while at < len(raw):
        if at + 4 > len(raw):
            raise _bad_answer(f"output {name} ends inside a length")
        (length,) = _LENGTH.unpack_from(raw, at)
        at += 4 + length
        if at > len(raw):
            raise _bad_answer(f"output {name} ends inside an element")
        elements.append(raw[at - length : at])
    if len(elements) != count:
        raise _bad_answer(f"output {name} of shape {list(shape)} has {len(elements)} elements")
    array = np.empty(count, dtype=object)
    array[:] = elements
    return array.reshape(tuple(shape))


def _bf16_bits(name: str, array: Array) -> npt.NDArray[np.uint16]:
    """Return the upper halves of float32 values, rounded to nearest, ties to even; NaN stays NaN."""
    if array.dtype.name == "bfloat16":
        return np.ascontiguousarray(array).view("<u2")
    if array.dtype.kind != "f":
        raise invalid(f"inputs[{name}]", "bfloat16 or float32 for BF16", str(array.dtype))
    with np.errstate(over="ignore"):
        single = np.ascontiguousarray(array, dtype="<f4")
    _check_finite(name, "BF16", array.reshape(single.shape), single)
    bits = single.view("<u4")
    rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    quiet = (bits >> np.uint32(16)) | np.uint32(0x40)
    size, infinite = bits & np.uint32(0x7FFFFFFF), np.uint32(0x7F800000)
    nan = size > infinite
    lost = (size < infinite) & ((rounded & np.uint32(0x7FFFFFFF)) >= infinite)
    if lost.any():
        # float32 goes on a little above what BF16 holds.
        raise invalid(f"inputs[{name}]", "numbers that BF16 can hold", _span(single[lost]))
    chosen: npt.NDArray[np.uint32] = np.where(nan, quiet, rounded >> np.uint32(16))
    return chosen.astype("<u2")


def _set_parameter(slot: oip.InferParameter, key: str, value: Parameter) -> None:
    if isinstance(value, bool):
        slot.bool_param = value
    elif isinstance(value, int):
        if not -(2**63) <= value < 2**64:
            raise invalid(f"parameters[{key}]", "an integer of 64 bits", shown(value))
        if value < 2**63:
            slot.int64_param = value
        else:
            slot.uint64_param = value
    elif isinstance(value, float):
        slot.double_param = value
    elif isinstance(value, str):
        slot.string_param = text(f"parameters[{key}]", value)
    else:
        raise invalid(f"parameters[{key}]", "a bool, an integer, a float or a string", shown(value))


def _bad_answer(what: str) -> ModelhostError:
    return make_error(
        f"the daemon sent an answer that cannot be read: {what}",
        code=Code.INTERNAL,
        reason="INTERNAL",
    )
