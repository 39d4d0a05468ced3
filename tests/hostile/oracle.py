"""A second reading of the protocol: which fields of a ModelInferRequest are wrong. Shares no code with the server.

Written from the contract's comments (``modelhost/oip/open_inference.proto``), the Open Inference Protocol
and Triton's extensions. It finds every fault, where the server may stop at the first that it finds.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from google.protobuf.message import DecodeError

from modelhost.oip import open_inference_pb2 as oip

WIDTHS = {
    "BOOL": 1, "INT8": 1, "UINT8": 1, "INT16": 2, "UINT16": 2, "FP16": 2, "BF16": 2,
    "INT32": 4, "UINT32": 4, "FP32": 4, "INT64": 8, "UINT64": 8, "FP64": 8,
}  # fmt: skip
HOMES = {
    "BOOL": "bool_contents", "FP32": "fp32_contents", "FP64": "fp64_contents",
    "INT8": "int_contents", "INT16": "int_contents", "INT32": "int_contents",
    "INT64": "int64_contents", "UINT8": "uint_contents", "UINT16": "uint_contents",
    "UINT32": "uint_contents", "UINT64": "uint64_contents", "BYTES": "bytes_contents",
}  # fmt: skip
NARROW = {
    "INT8": (-(2**7), 2**7 - 1), "INT16": (-(2**15), 2**15 - 1),
    "UINT8": (0, 2**8 - 1), "UINT16": (0, 2**16 - 1),
}  # fmt: skip
ANY_SIZE = -1
TENSORS, NAME, RANK, EXTENT, TEXTS = 64, 256, 8, 2**47, 1_000_000
FIELDS, HEAD_BYTES = 1024, 1024
HEAD = ("model_name", "model_version", "id", "parameters[timeout]", "parameters[priority]")
"""What the daemon itself reads, before a worker looks at the whole."""
MODEL = "model"
"""Not a field: the name or the version is of nobody."""


@dataclass(frozen=True)
class Takes:
    """What a model takes and gives: datatype and sizes by name. No inputs = any, and they are the outputs."""

    inputs: Mapping[str, tuple[str, Sequence[int]]] = field(default_factory=dict)
    outputs: Sequence[str] = ()
    batched: bool = False
    items_max: int = 0
    parameters: frozenset[str] | None = None
    """Those of requests that mean something to it; None = any."""


def faults(message: bytes, models: Mapping[str, Takes], version: str = "1") -> frozenset[str]:
    """Return every field that a refusal of this message may name; nothing where it must be accepted."""
    try:
        if _is_odd(message):
            # Also a name that is too long by itself: which of the two is seen first is the daemon's affair.
            return frozenset({"request", *HEAD})
    except (IndexError, _Odd):
        return frozenset({"request"})
    try:
        request = oip.ModelInferRequest.FromString(message)
    except DecodeError:
        # Broken further down: the daemon routes by what stands at the top, before anybody looks there.
        names = {1: b"", 2: b""}
        names.update(
            (number, content) for number, content in _fields(message) if content is not None
        )
        nobody = names[1] not in map(str.encode, models) or names[2] not in (b"", version.encode())
        return frozenset({"request", *HEAD, *({MODEL} if nobody else ())})
    return frozenset(_all(request, models, version))


def _all(
    request: oip.ModelInferRequest, models: Mapping[str, Takes], version: str
) -> Iterator[str]:
    for name in ("model_name", "model_version", "id"):
        if len(getattr(request, name).encode()) > HEAD_BYTES:
            yield name
    if request.model_name not in models or request.model_version not in ("", version):
        yield MODEL
    takes = models.get(request.model_name, Takes())
    yield from _of_parameters(request, takes)
    yield from _of_inputs(request, takes)
    yield from _of_outputs(request, takes)


def _of_parameters(request: oip.ModelInferRequest, takes: Takes) -> Iterator[str]:
    known = takes.parameters
    for key, value in request.parameters.items():
        kind = value.WhichOneof("parameter_choice")
        whole = kind in ("int64_param", "uint64_param") and getattr(value, kind) >= 0
        if key in ("timeout", "priority") and not whole:
            yield f"parameters[{key}]"
        if key.startswith("triton_") and key != "triton_enable_empty_final_response":
            yield f"parameters[{key[:64]}]"
        own = key in ("timeout", "priority", "triton_enable_empty_final_response") or kind is None
        if not own and known is not None and key not in known:
            yield f"parameters[{key[:64]}]"


def _of_inputs(request: oip.ModelInferRequest, takes: Takes) -> Iterator[str]:
    if max(len(request.inputs), len(request.outputs)) > TENSORS:
        yield "inputs"
    seen: set[str] = set()
    left = list(request.raw_input_contents)
    for tensor in request.inputs:
        name = tensor.name
        if not 0 < len(name) <= NAME:
            yield "inputs.name"
        if name in seen:
            yield "inputs"
        seen.add(name)
        if "shared_memory_region" in tensor.parameters:
            yield f"inputs[{name}].parameters"
        if tensor.HasField("contents"):
            if request.raw_input_contents:
                yield f"inputs[{name}].contents"
            yield from _of_contents(tensor)
        elif left:
            yield from _of_raw(tensor, left.pop(0))
        else:
            yield f"inputs[{name}]"
        yield from _of_what_is_taken(tensor, takes)
    if left:
        yield "raw_input_contents"
    if takes.inputs and seen != set(takes.inputs):
        yield "inputs"
    yield from _of_items(request, takes)


def _size(tensor: oip.ModelInferRequest.InferInputTensor) -> int | str:
    """Return how many elements a tensor has, or which of its fields is wrong."""
    if tensor.datatype not in WIDTHS and tensor.datatype != "BYTES":
        return "datatype"
    shape = list(tensor.shape)
    if len(shape) > RANK or any(size < 0 for size in shape):
        return "shape"
    if math.prod(size or 1 for size in shape) > EXTENT:
        return "shape"
    if tensor.datatype == "BYTES" and math.prod(shape) > TEXTS:
        return "shape"
    return math.prod(shape)


def _of_raw(tensor: oip.ModelInferRequest.InferInputTensor, data: bytes) -> Iterator[str]:
    size = _size(tensor)
    if isinstance(size, str):
        yield f"inputs[{tensor.name}].{size}"
        return
    if tensor.datatype == "BYTES":
        at = count = 0
        while at + 4 <= len(data) and count < size:
            at += 4 + int.from_bytes(data[at : at + 4], "little")
            count += 1
        right = at == len(data) and count == size
    else:
        right = len(data) == size * WIDTHS[tensor.datatype]
    if not right:
        yield f"raw_input_contents[{tensor.name}]"


def _of_contents(tensor: oip.ModelInferRequest.InferInputTensor) -> Iterator[str]:
    size = _size(tensor)
    if isinstance(size, str):
        yield f"inputs[{tensor.name}].{size}"
    here = {f.name: values for f, values in tensor.contents.ListFields()}
    home = HOMES.get(tensor.datatype)
    values = here.pop(home, ()) if home is not None else ()
    least, most = NARROW.get(tensor.datatype, (-math.inf, math.inf))
    if (
        tensor.datatype in ("FP16", "BF16")
        or (home is not None and here)
        or (isinstance(size, int) and len(values) != size)
        or (tensor.datatype in NARROW and not all(least <= v <= most for v in values))
    ):
        yield f"inputs[{tensor.name}].contents"


def _of_what_is_taken(
    tensor: oip.ModelInferRequest.InferInputTensor, takes: Takes
) -> Iterator[str]:
    if tensor.name not in takes.inputs:
        return
    datatype, sizes = takes.inputs[tensor.name]
    if tensor.datatype != datatype:
        yield f"inputs[{tensor.name}].datatype"
    fits = len(sizes) == len(tensor.shape) and all(
        want in (ANY_SIZE, is_) for want, is_ in zip(sizes, tensor.shape, strict=True)
    )
    if not fits:
        yield f"inputs[{tensor.name}].shape"


def _of_items(request: oip.ModelInferRequest, takes: Takes) -> Iterator[str]:
    if not takes.batched:
        return
    counts = {t.name: t.shape[0] for t in request.inputs if t.shape}
    if len(set(counts.values())) > 1:
        yield from (f"inputs[{name}].shape" for name in counts)
    if not counts or 0 in counts.values():
        yield "inputs"
    if takes.items_max and any(count > takes.items_max for count in counts.values()):
        yield "inputs"


def _of_outputs(request: oip.ModelInferRequest, takes: Takes) -> Iterator[str]:
    given = {tensor.name: tensor for tensor in request.inputs}
    known = takes.outputs or given.keys()
    seen: set[str] = set()
    for wanted in request.outputs:
        name = wanted.name
        if not 0 < len(name) <= NAME:
            yield "outputs.name"
        if name in seen or name not in known:
            yield "outputs"
        seen.add(name)
        if "shared_memory_region" in wanted.parameters:
            yield f"outputs[{name}].parameters"
        if "classification" in wanted.parameters:
            top = wanted.parameters["classification"]
            kind = top.WhichOneof("parameter_choice")
            count = getattr(top, kind) if kind in ("int64_param", "uint64_param") else 0
            # The highest of texts and flags: an identity model gives what it was given.
            no_number = name in given and given[name].datatype in ("BYTES", "BOOL")
            if count < 1 or (not takes.outputs and no_number):
                yield f"outputs[{name}].classification"


# --- what the server takes no message for, though protobuf would -------------------------------------


class _Odd(Exception):
    pass


def _is_odd(message: bytes) -> bool:
    """Whether there are too many fields, or groups, at the top or in what the daemon reads of parameters."""
    top = list(_fields(message))
    inner = 0
    for number, content in top:
        if number == 4 and content is not None:
            entries = list(_fields(content))
            values = [list(_fields(c)) for n, c in entries if n == 2 and c is not None]
            inner += len(entries) + sum(map(len, values))
    return len(top) > FIELDS or inner > FIELDS


def _fields(message: bytes) -> Iterator[tuple[int, bytes | None]]:
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        number, kind = key >> 3, key & 7
        if number == 0 or key >= 1 << 32 or kind not in (0, 1, 2, 5):
            raise _Odd
        if kind == 2:
            length, at = _varint(message, at)
            end = at + length
            content = message[at:end]
        else:
            content = None
            end = _varint(message, at)[1] if kind == 0 else at + {1: 8, 5: 4}[kind]
        if end > len(message):
            raise _Odd
        yield number, content
        at = end


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise _Odd
