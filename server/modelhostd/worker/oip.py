"""Parses and validates ModelInferRequest, encodes ModelInferResponse; no tensor is copied on the way.

The texts of errors are those that clients of existing servers match on. What comes in is hostile
until the end of :func:`parse`: the daemon in front has looked at nothing but top-level fields.
"""

from collections.abc import Mapping, Sequence

from google.protobuf.message import DecodeError

from modelhost.oip import open_inference_pb2 as oip
from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.values import dataclass
from modelhostd.worker.backend import Output, Signature, Tensor
from modelhostd.worker.classification import Top, classify
from modelhostd.worker.fields import split
from modelhostd.worker.matching import check_answer, check_name, count_items, match, read_requested
from modelhostd.worker.tensors import (
    CONTENTS_FIELD,
    MAX_NAME_CHARACTERS,
    MAX_TENSORS,
    SMALL_BYTES,
    as_tensor,
    from_contents,
    from_raw,
    refuse,
    to_raw,
)

ACTED_ON = frozenset({"timeout", "priority", "triton_enable_empty_final_response"})
"""Parameters of requests that the daemon acts on itself; a backend never sees them."""

_ID_KEY, _RAW_OUTPUT_KEY = b"\x1a", b"\x32"
_SHORT = [bytes((value,)) for value in range(0x80)]

Parameter = bool | int | float | str
Answer = tuple[int, tuple[tuple[str, str, tuple[int, ...]], ...]]
"""A version, and name, datatype and shape of each of its outputs."""
MOST_BYTES = 2**31 - 1
"""What a message of protobuf holds."""
HEADS_MAX = 8
"""Answers to requests of one form whose encoding is kept."""


@dataclass(slots=True)
class ParsedRequest:
    """A request that passed every check. Not to be changed (frozen, making one takes longer)."""

    id: str
    model_name: str
    inputs: Mapping[str, Tensor]
    outputs: tuple[str, ...]
    parameters: Mapping[str, Parameter]
    item_count: int
    tops: Mapping[str, Top]
    """Outputs of which only the highest elements are wanted."""
    heads: dict[Answer, bytes]
    """What answers to requests of this form begin with, as far as they were made."""


def parse(
    payload: bytes | memoryview,
    *,
    name: str,
    version: int,
    signature: Signature,
    most_bytes: int = MOST_BYTES,
) -> ParsedRequest:
    """Parse and check one encoded ModelInferRequest for the model called ``name`` by its client.

    The tensors are views into ``payload``. Raises INVALID_ARGUMENT naming field, expected and actual, or MODEL_NOT_FOUND for
    another version, or MESSAGE_TOO_LARGE where the signature tells that the answer has more than ``most_bytes``.
    """
    request, raw = _decode(payload)
    _check_route(request, name, version)
    inputs = _read_inputs(request, raw, name)
    match(signature, inputs, name)
    outputs, tops = read_requested(request, signature, inputs, name)
    parameters = _read_parameters(request, signature, name)
    items = count_items(signature, inputs, name)
    check_answer(signature, outputs, tops, items, most_bytes)
    return ParsedRequest(request.id, name, inputs, outputs, parameters, items, tops, {})


def _decode(payload: bytes | memoryview) -> tuple[oip.ModelInferRequest, list[memoryview]]:
    try:
        if len(payload) <= SMALL_BYTES:
            # protobuf's copies of so little cost less than looking at each field here.
            request = oip.ModelInferRequest.FromString(bytes(payload))
            return request, [memoryview(part) for part in request.raw_input_contents]
        structure, raw = split(payload)
        return oip.ModelInferRequest.FromString(structure), raw
    except DecodeError:
        raise refuse(
            "the request is not a ModelInferRequest: its encoding is malformed",
            "request",
            "an encoded inference.ModelInferRequest",
            "malformed bytes",
        ) from None


def _check_route(request: oip.ModelInferRequest, name: str, version: int) -> None:
    if request.model_name != name:
        raise refuse(
            f"the request names the model twice: it was routed to '{name}' and says "
            f"'{request.model_name[:MAX_NAME_CHARACTERS]}' at its end",
            "model_name",
            name,
            request.model_name,
        )
    if request.model_version not in ("", str(version)):
        raise ModelhostError(
            Reason.MODEL_NOT_FOUND,
            f"Request for unknown model: '{name}' version {request.model_version[:32]} is not "
            f"found; version {version} is loaded",
            {"model": name},
        )


def _read_inputs(
    request: oip.ModelInferRequest, raw: Sequence[memoryview], model: str
) -> dict[str, Tensor]:
    if len(request.inputs) > MAX_TENSORS or len(request.outputs) > MAX_TENSORS:
        raise refuse(
            f"{len(request.inputs)} inputs and {len(request.outputs)} requested outputs for model "
            f"'{model}', at most {MAX_TENSORS} of each are taken",
            "inputs",
            f"at most {MAX_TENSORS}",
            max(len(request.inputs), len(request.outputs)),
        )
    inputs: dict[str, Tensor] = {}
    used = 0
    for item in request.inputs:
        name = item.name
        check_name(name, "inputs", model)
        if name in inputs:
            raise refuse(
                f"input '{name}' already exists in request", "inputs", "each name once", name
            )
        if "shared_memory_region" in item.parameters:
            raise refuse(
                f"Unable to find shared memory region: input '{name}' for model '{model}' names "
                "one, and this server has none; send the data as raw_input_contents",
                f"inputs[{name}].parameters",
                "no shared_memory_region",
                "shared_memory_region",
            )
        if item.HasField("contents"):
            if raw:
                raise refuse(
                    "contents field must not be specified when using raw_input_contents for "
                    f"'{name}' for model '{model}'",
                    f"inputs[{name}].contents",
                    "no contents beside raw_input_contents",
                    "both",
                )
            inputs[name] = _read_contents(item, model)
            continue
        if used >= len(raw):
            raise refuse(
                f"unable to find data for input tensor '{name}' for model '{model}' in request.",
                f"inputs[{name}]",
                "contents or an entry of raw_input_contents",
                "neither",
            )
        inputs[name] = from_raw(name, model, item.datatype, tuple(item.shape), raw[used])
        used += 1
    if used < len(raw):
        raise refuse(
            f"expected {used} raw_input_contents for model '{model}', one for each input, "
            f"got {len(raw)}",
            "raw_input_contents",
            f"{used} entries",
            len(raw),
        )
    return inputs


def _read_contents(item: oip.ModelInferRequest.InferInputTensor, model: str) -> Tensor:
    wanted = CONTENTS_FIELD.get(item.datatype)
    if wanted is None and item.datatype in ("FP16", "BF16"):
        raise refuse(
            f"contents of input '{item.name}' for model '{model}': {item.datatype} has none, send "
            "it as raw_input_contents",
            f"inputs[{item.name}].contents",
            "raw_input_contents",
            item.datatype,
        )
    for field, _ in item.contents.ListFields():
        if wanted is not None and field.name != wanted:
            raise refuse(
                f"contents of input '{item.name}' for model '{model}' are in {field.name}, "
                f"{item.datatype} belongs in {wanted}",
                f"inputs[{item.name}].contents",
                wanted,
                field.name,
            )
    values = getattr(item.contents, wanted) if wanted is not None else ()
    return from_contents(item.name, model, item.datatype, tuple(item.shape), values)


def _read_parameters(
    request: oip.ModelInferRequest, signature: Signature, model: str
) -> dict[str, Parameter]:
    parameters: dict[str, Parameter] = {}
    known = signature.parameters
    if not request.parameters:
        return parameters
    for key, value in request.parameters.items():
        if key.startswith("triton_") and key != "triton_enable_empty_final_response":
            raise refuse(
                f"parameter keys starting with 'triton_' are reserved: '{key[:64]}' in the request "
                f"for model '{model}' is not known",
                f"parameters[{key[:64]}]",
                "a key that does not start with triton_",
                key,
            )
        choice = value.WhichOneof("parameter_choice")
        if choice is None or key in ACTED_ON:
            continue
        if known is not None and key not in known:
            raise refuse(
                f"request parameter '{key[:64]}' means nothing to model '{model}'",
                f"parameters[{key[:64]}]",
                ", ".join(sorted(known)) or "no parameters but timeout and priority",
                key,
            )
        parameters[key] = getattr(value, choice)
    return parameters


class Response:
    """An encoded ModelInferResponse in parts, so that large tensors are copied once: to where they go."""

    def __init__(self, request: ParsedRequest, version: int, outputs: Mapping[str, Output]) -> None:
        """Encode ``outputs`` (those the request wants).

        Raises ``TypeError``, ``ValueError`` or ``KeyError`` where a backend answered what cannot be sent.
        """
        parts: list[bytes | memoryview] = [b""]
        found = []
        for name in request.outputs or outputs:
            tensor = as_tensor(outputs[name])
            if name in request.tops:
                tensor = classify(name, tensor, request.tops[name])
            found.append((name, tensor.datatype, tensor.array.shape))
            raw = to_raw(tensor)
            parts += (_RAW_OUTPUT_KEY + _encode_varint(len(raw)), raw)
        answer = version, tuple(found)
        head = request.heads.get(answer)
        if head is None:
            head = _head(request, answer)
        if request.id:
            encoded = request.id.encode()
            head = b"".join((head, _ID_KEY, _encode_varint(len(encoded)), encoded))
        parts[0] = head
        self.parts = parts
        self.size = sum(map(len, parts))

    def to_bytes(self) -> bytes:
        """Return the whole message."""
        return b"".join(self.parts)

    def write(self, target: memoryview) -> None:
        """Write the whole message to ``target``, which is ``size`` bytes long."""
        position = 0
        for part in self.parts:
            target[position : position + len(part)] = part
            position += len(part)


def _head(request: ParsedRequest, answer: Answer) -> bytes:
    """Return what the answer begins with: all but the id and the contents."""
    version, outputs = answer
    made = oip.ModelInferResponse(model_name=request.model_name, model_version=str(version))
    for name, datatype, shape in outputs:
        made.outputs.add(name=name, datatype=datatype, shape=shape)
    if len(request.heads) >= HEADS_MAX:
        request.heads.clear()
    head = request.heads[answer] = made.SerializeToString()
    return head


def _encode_varint(value: int) -> bytes:
    if value < 0x80:
        return _SHORT[value]
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
