"""What the daemon reads of an encoded ModelInferRequest: the top-level fields it routes by, and no more.

The tensors stay bytes; the worker parses and checks the whole message. Both follow protobuf's rule that the
last of several fields with one number counts, and the worker refuses a message that it reads as naming
another model, so that a difference between the two parsers can never reach the wrong model.

Wire format: https://protobuf.dev/programming-guides/encoding/. Field numbers are those of
``inference.ModelInferRequest``. Stricter than protobuf: at most ``FIELDS_MAX`` fields (two million empty ones
would hold the loop for seconds), no groups.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from modelhostd.core.errors import ModelhostError, Reason, invalid

FIELDS_MAX = 1024
"""Top-level fields. 64 inputs, 64 outputs and their raw contents need 192."""
PARAMETER_FIELDS_MAX = 1024
"""Fields inside of all parameters together; one parameter needs 3."""
TEXT_BYTES_MAX = 1024
"""Of a name, a version and an id: what is longer is not copied, and no model has such a name."""

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_KEY_MAX = (1 << 32) - 1
_LENGTH_MAX = (1 << 31) - 1
_MODEL_NAME, _MODEL_VERSION, _ID, _PARAMETERS = (n << 3 | _BYTES for n in (1, 2, 3, 4))
_TIMEOUT, _PRIORITY, _EMPTY_FINAL = b"timeout", b"priority", b"triton_enable_empty_final_response"
_NAMES_BYTES_MAX = len(_EMPTY_FINAL)
_NOTHING = (0, 0)
_CHOICES = {1: "bool", 2: "int64", 3: "string", 4: "double", 5: "uint64"}
_WIRE_TYPES = {1: _VARINT, 2: _VARINT, 3: _BYTES, 4: _FIXED64, 5: _VARINT}


class RequestHead(NamedTuple):
    """What a request says of itself. Numbers are 0 where it says nothing.

    ``timeout_us`` is the parameter ``timeout`` (microseconds), ``priority`` the parameter of that name: from 1,
    the most urgent, upwards.
    """

    model_name: str
    model_version: str
    id: str
    timeout_us: int = 0
    priority: int = 0
    empty_final: bool = False


class _Malformed(Exception):
    """The bytes are no message; the text says what was found."""


def scan(payload: bytes) -> RequestHead:
    """Return the head of an encoded ModelInferRequest.

    Raises INVALID_ARGUMENT for bytes that are no such message, for too many fields, and for a ``timeout`` or
    ``priority`` that is no whole number from 0. Time is bounded whatever the bytes are.
    """
    try:
        return _scan(payload)
    except IndexError:
        raise _refused("a field that is cut off by the end of the message") from None
    except _Malformed as error:
        raise _refused(str(error)) from None
    except UnicodeDecodeError:
        raise _refused("text that is not UTF-8") from None


def _scan(payload: bytes) -> RequestHead:
    name = version = request_id = _NOTHING
    parameters: list[tuple[int, int]] = []
    position, end = 0, len(payload)
    for _ in range(FIELDS_MAX):
        if position >= end:
            break
        # One-byte keys and lengths are read here: nearly all of them are, and a call costs more.
        key, length = payload[position], payload[position + 1]
        if key & 0x87 == _BYTES and length < 0x80:
            start = position + 2
            position = start + length
        else:
            key, start, position = _field(payload, key, position + 1, end)
        if position > end:
            raise _Malformed(
                f"a field of {position - start} bytes of which {end - start} are there"
            )
        if key > _PARAMETERS:
            continue  # tensors, and what belongs to them
        if key == _MODEL_NAME:
            name = start, position
        elif key == _MODEL_VERSION:
            version = start, position
        elif key == _ID:
            request_id = start, position
        elif key == _PARAMETERS:
            parameters.append((start, position))
        elif key < 8:
            raise _Malformed("field number 0")
    if position < end:
        raise _Malformed(f"more than {FIELDS_MAX} top-level fields")
    head = RequestHead(
        _text("model_name", payload, name),
        _text("model_version", payload, version) if version is not _NOTHING else "",
        _text("id", payload, request_id) if request_id is not _NOTHING else "",
    )
    return _with_parameters(head, payload, parameters) if parameters else head


def _field(payload: bytes, key: int, position: int, end: int) -> tuple[int, int, int]:
    """Return the key of a field of any form, which begins with ``key``, where what it holds begins, and where it ends."""
    if key >= 0x80:
        key, position = _varint(payload, position - 1, _KEY_MAX)
    if key & 7 != _BYTES:
        return key, position, _skip(payload, key, position, end)
    length, start = _varint(payload, position, _LENGTH_MAX)
    return key, start, start + length


def _text(field: str, payload: bytes, place: tuple[int, int]) -> str:
    start, end = place
    if end - start > TEXT_BYTES_MAX:
        raise invalid(field, f"at most {TEXT_BYTES_MAX} bytes", f"{end - start} bytes")
    return str(payload[start:end], "utf-8")


def _varint(payload: bytes, position: int, maximum: int) -> tuple[int, int]:
    """Return the number at ``position`` and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        byte = payload[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            if value > maximum:
                break
            return value, position
    raise _Malformed("a number above its range")


def _skip(payload: bytes, key: int, position: int, end: int) -> int:
    """Return where a field that holds no length ends."""
    if key < 8:
        raise _Malformed("field number 0")
    match key & 7:
        case 0:
            _, position = _varint(payload, position, (1 << 70) - 1)
        case 1:
            position += 8
        case 5:
            position += 4
        case other:
            raise _Malformed(f"a field of wire type {other}")
    if position > end:
        raise IndexError
    return position


# --- parameters: map<string, InferParameter>, entries with key = 1 and value = 2 --------------------


class _Field(NamedTuple):
    number: int
    wire_type: int
    value: int
    """Of a varint; else 0."""
    start: int
    end: int


class _Fields:
    """Reads fields inside of a message, all readers together at most ``PARAMETER_FIELDS_MAX``."""

    def __init__(self, payload: bytes) -> None:
        self._payload = payload
        self._left = PARAMETER_FIELDS_MAX

    def read(self, position: int, end: int) -> Iterator[_Field]:
        while position < end:
            self._left -= 1
            if self._left < 0:
                raise _Malformed(f"more than {PARAMETER_FIELDS_MAX} fields in its parameters")
            key, start = _varint(self._payload, position, _KEY_MAX)
            value = 0
            if key & 7 == _BYTES:
                length, start = _varint(self._payload, start, _LENGTH_MAX)
                position = start + length
            elif key & 7 == _VARINT:
                value, position = _varint(self._payload, start, (1 << 70) - 1)
            else:
                position = _skip(self._payload, key, start, end)
            if position > end:
                raise IndexError
            if key < 8:
                raise _Malformed("field number 0")
            yield _Field(key >> 3, key & 7, value, start, position)


def _with_parameters(
    head: RequestHead, payload: bytes, entries: Sequence[tuple[int, int]]
) -> RequestHead:
    fields = _Fields(payload)
    found: dict[bytes, tuple[str, int]] = {}
    for start, end in entries:
        name = b""
        choice = "", 0
        whole = True
        for field in fields.read(start, end):
            if field.wire_type != _BYTES or field.number not in (1, 2):
                whole = False
            elif field.number == 1:
                # A longer name is not one of ours, and would only be copied.
                name = payload[field.start : min(field.end, field.start + _NAMES_BYTES_MAX + 1)]
            else:
                # A second value is merged into the first, as protobuf does.
                for inner in fields.read(field.start, field.end):
                    if _WIRE_TYPES.get(inner.number) == inner.wire_type:
                        choice = _CHOICES[inner.number], inner.value & ((1 << 64) - 1)
        # protobuf's parser (upb) takes an entry with fields beside key and value for unknown.
        if whole:
            found[name] = choice
    kind, value = found.get(_EMPTY_FINAL, ("bool", 0))
    return head._replace(
        timeout_us=_number(found, _TIMEOUT),
        priority=_number(found, _PRIORITY),
        empty_final=kind == "bool" and value != 0,
    )


def _number(found: dict[bytes, tuple[str, int]], name: bytes) -> int:
    choice, value = found.get(name, ("int64", 0))
    if choice == "int64" and value >> 63:
        value -= 1 << 64
    if choice not in ("int64", "uint64") or value < 0:
        actual = value if choice in ("int64", "uint64") else choice or "nothing"
        raise invalid(f"parameters[{name.decode()}]", "int64_param or uint64_param from 0", actual)
    return value


def _refused(found: str) -> ModelhostError:
    return ModelhostError(
        Reason.INVALID_ARGUMENT,
        f"the request is not a ModelInferRequest: {found}",
        {
            "field": "request",
            "expected": "an encoded inference.ModelInferRequest",
            "actual": found,
        },
    )
