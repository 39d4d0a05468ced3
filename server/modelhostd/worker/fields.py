"""Top-level fields of an encoded ModelInferRequest, found without parsing it: protobuf would copy large contents three times.

What comes in is hostile: every number is checked against the end, and the fields are counted.
"""

from modelhostd.core.errors import ModelhostError
from modelhostd.worker.tensors import refuse

MAX_FIELDS = 1024
"""Top-level fields of a request. Inputs, outputs and raw contents need 3 x 64."""
MAX_STRUCTURE_BYTES = 16 * 2**20
"""All of a request but its raw contents. Typed contents blow up when they are parsed (an empty
element of two bytes takes 16), so tensors beyond this have to come raw."""

_ID_FIELD, _RAW_INPUT_FIELD = 3, 7
_SIZES = {1: 8, 5: 4}

Span = tuple[int, int]
"""Where something begins and ends."""


def split(payload: bytes | memoryview) -> tuple[bytes, list[memoryview]]:
    """Return a message without its raw contents, and the raw contents as views.

    protobuf would copy them three times. Only top-level fields are looked at, at most ``MAX_FIELDS``.
    """
    view = memoryview(payload)
    _, spans = holes(view)
    kept: list[memoryview] = []
    kept_from = 0
    for field_start, _, end in spans:
        kept.append(view[kept_from:field_start])
        kept_from = end
    kept.append(view[kept_from:])
    if (size := sum(map(len, kept))) > MAX_STRUCTURE_BYTES:
        raise refuse(
            f"the request holds {size} bytes beside its raw_input_contents, at most "
            f"{MAX_STRUCTURE_BYTES} are taken; send large tensors as raw_input_contents",
            "inputs",
            f"at most {MAX_STRUCTURE_BYTES} bytes of typed contents",
            size,
        )
    return b"".join(kept), [view[start:end] for _, start, end in spans]


def holes(view: memoryview) -> tuple[list[Span], list[tuple[int, int, int]]]:
    """Return where ids are in a message, and of each of its raw contents the field, the first byte and the end.

    Raises INVALID_ARGUMENT for what is malformed, and for more than ``MAX_FIELDS`` top-level fields.
    """
    ids: list[Span] = []
    raw: list[tuple[int, int, int]] = []
    position, end = 0, len(view)
    for _ in range(MAX_FIELDS):
        if position >= end:
            break
        field_start = position
        key, position = _varint(view, position, end)
        wire_type = key & 7
        if wire_type == 2:
            length, position = _varint(view, position, end)
            if length > end - position:
                raise _malformed(f"a field of {length} bytes at byte {field_start}")
            if key >> 3 == _RAW_INPUT_FIELD:
                raw.append((field_start, position, position + length))
            elif key >> 3 == _ID_FIELD:
                ids.append((position, position + length))
            position += length
        elif wire_type == 0:
            _, position = _varint(view, position, end)
        elif wire_type in _SIZES:
            position += _SIZES[wire_type]
        else:
            raise _malformed(f"wire type {wire_type} at byte {field_start}")
    if position != end:
        raise _malformed(
            f"more than {MAX_FIELDS} top-level fields" if position < end else "a cut field"
        )
    return ids, raw


def _varint(view: memoryview, position: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while position < end and shift < 70:
        byte = view[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
    raise _malformed(f"a number that does not end at byte {position}")


def _malformed(found: str) -> ModelhostError:
    return refuse(
        f"the request is not a ModelInferRequest: {found}",
        "request",
        "an encoded inference.ModelInferRequest",
        found,
    )
