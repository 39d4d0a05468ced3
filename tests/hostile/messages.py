"""Messages that no honest client sends, made from the descriptors: any field, any value, any bytes.

Strategies of hypothesis, so that what fails is made smaller before it is shown.
"""

import struct
import uuid
from collections.abc import Sequence
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from hypothesis import strategies as st

UNKNOWN_OPERATION = f"operations/{uuid.UUID(int=7)}"

# What a fuzzer would not find in years: names that mean something here, and texts made to hurt.
MEANINGFUL = (
    *("models/m", "models/m", "models/second", "m", "models/m/instances/-", "models/m/instances/1"),
    *("devices/cpu", "devices/sim-0", "slots/s", "leases/l", UNKNOWN_OPERATION, "host", "settings"),
    *(
        "hf://org/tiny",
        "hf://org/none",
        "hf://org/tiny@main",
        "hf://org/bare",
        "file:///etc/passwd",
    ),
    *("https://127.0.0.1:1/x", "s3://bucket/x", "github://o/r@t/a", "ollama://n:t", "hf://"),
    *("identity", "transformers", "feature-extraction", "other", "fp16", "lru", "info", "debug"),
    *("*", "budget_bytes", "config.keep_alive", "config", "source.uri", "display_name", "priority"),
    *("1", "-1", "main", "*.json", "torch>=2", "8.0", "text/x", "timeout", "CREATED", "LOADING"),
)
HOSTILE = (
    *(
        "",
        " ",
        "..",
        "../x",
        "models/..",
        "models/",
        "models//",
        "models/a/b",
        "%2e%2e",
        "a\0b",
        "\n",
    ),
    *(
        "\u202eminilm",
        "\uff4dinilm",
        "m\u0456nilm",
        "\ud7ff",
        "\U0010ffff",
        "%s%n{0}{x!r}",
        "-a",
        "a.",
    ),
    *(
        "A" * 64,
        "a" * 65,
        "a" * 300,
        "x" * 5000,
        "\u20ac" * 3000,
        "9" * 400,
        "nan",
        "1e999",
        "\u0663",
    ),
    *(
        "AAAAAAAAAAA",
        "AAAAAAAAAAAx",
        "A" * 1025,
        "=",
        "\u00e9",
        "[[" * 500,
        "{" * 3000,
        '{"a":' * 900,
    ),
)
_texts = st.one_of(
    st.sampled_from(MEANINGFUL),
    st.sampled_from(MEANINGFUL),
    st.sampled_from(HOSTILE),
    st.text(max_size=12),
)
_lengthy = st.sampled_from(["y" * 70_000, "\u00fc" * 60_000])

_RANGES = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
}
_floats = st.sampled_from([0.0, -0.0, 1.5, -1.0, 1e308, float("inf"), float("-inf"), float("nan")])
_DEPTH_MAX = 5


def _whole(kind: int) -> st.SearchStrategy[int]:
    least, most = _RANGES[kind]
    edges = (0, 1, 2, 100, 101, 1000, 65_536, 10**9, 10**12, -1, least, most, most - 1)
    known = [n for n in edges if least <= n <= most]
    return st.one_of(st.sampled_from(known), st.integers(least, most))


def _enum(field: FieldDescriptor) -> st.SearchStrategy[int]:
    named = [value.number for value in field.enum_type.values]
    return st.sampled_from([*named, *named, 99, -1, 2**31 - 1, -(2**31)])


def _scalar(field: FieldDescriptor) -> st.SearchStrategy[Any]:
    match field.cpp_type:
        case FieldDescriptor.CPPTYPE_STRING if field.type == FieldDescriptor.TYPE_BYTES:
            return st.one_of(st.binary(max_size=40), st.just(b"\0" * 3000))
        case FieldDescriptor.CPPTYPE_STRING:
            return st.integers(0, 39).flatmap(lambda n: _texts if n else _lengthy)
        case FieldDescriptor.CPPTYPE_BOOL:
            return st.booleans()
        case FieldDescriptor.CPPTYPE_FLOAT | FieldDescriptor.CPPTYPE_DOUBLE:
            return st.one_of(_floats, st.floats(width=32))
        case FieldDescriptor.CPPTYPE_ENUM:
            return _enum(field)
        case kind:
            return _whole(kind)


@st.composite
def messages(draw: st.DrawFn, descriptor: Descriptor, depth: int = 0) -> Message:
    """Make a message of a type: some of its fields, each with any value that its type takes."""
    made: Message = GetMessageClass(descriptor)()
    if descriptor.full_name == "google.protobuf.Struct" and draw(st.integers(0, 3)) == 0:
        return _struct(draw(st.sampled_from([1, 4, 5, 16, 17, 24])))
    fields: Sequence[FieldDescriptor] = tuple(descriptor.fields)
    if not fields or depth > _DEPTH_MAX:
        return made
    chosen = draw(st.lists(st.sampled_from(fields), max_size=4, unique_by=lambda f: f.number))
    for field in chosen:
        _set(draw, made, field, depth)
    return made


def _set(draw: st.DrawFn, made: Message, field: FieldDescriptor, depth: int) -> None:
    name = field.name
    if not field.is_repeated:
        if field.message_type is not None:
            getattr(made, name).CopyFrom(draw(messages(field.message_type, depth + 1)))
        else:
            setattr(made, name, draw(_scalar(field)))
    elif field.message_type is None:
        values = draw(st.lists(_scalar(field), max_size=3))
        lengthy = any(isinstance(v, str) and len(v) > 5000 for v in values)
        times = 1 if lengthy else draw(st.sampled_from([1, 1, 1, 1, 2, 40, 150]))
        getattr(made, name).extend(values * times)
    elif field.message_type.GetOptions().map_entry:
        _set_map(draw, getattr(made, name), field.message_type, depth)
    else:
        for _ in range(draw(st.integers(0, 2))):
            getattr(made, name).add().CopyFrom(draw(messages(field.message_type, depth + 1)))


def _set_map(draw: st.DrawFn, target: Any, entry: Descriptor, depth: int) -> None:
    value = entry.fields_by_name["value"]
    for key in draw(st.lists(_scalar(entry.fields_by_name["key"]), max_size=3)):
        if value.message_type is not None:
            target[key].CopyFrom(draw(messages(value.message_type, depth + 1)))
        else:
            target[key] = draw(_scalar(value))
    if isinstance(key := draw(st.sampled_from([None] * 8 + ["many"])), str):
        for number in range(200):
            if value.message_type is not None:
                target[f"{key}{number}"].SetInParent()
            elif value.cpp_type == FieldDescriptor.CPPTYPE_STRING:
                target[f"{key}{number}"] = ""


def _struct(depth: int) -> Any:
    from google.protobuf.struct_pb2 import Struct

    made = Struct()
    inner = made
    for _ in range(depth):
        inner.fields["a"].struct_value.SetInParent()
        inner = inner.fields["a"].struct_value
    inner.fields["n"].number_value = float("nan")
    return made


# --- bytes ------------------------------------------------------------------------------------------


def varint(value: int) -> bytes:
    """Encode a number as protobuf does."""
    made = bytearray()
    while value > 0x7F:
        made.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*made, value])


def entry(number: int, content: bytes) -> bytes:
    """Encode a field that has a length."""
    return varint(number << 3 | 2) + varint(len(content)) + content


def nested(number: int, depth: int) -> bytes:
    """Encode a field in a field in a field ..."""
    made = b""
    for _ in range(depth):
        made = entry(number, made)
    return made


_TAILS = (
    b"\xff" * 11,
    b"\x0b" * 50,
    b"\x0b\x0c" * 50,
    b"\x0a\x00" * 30_000,
    entry(1, b"\xc3\x28"),
    entry(15, b"z" * 300_000),
    entry(15, b"z" * 1_200_000),
    *(nested(number, depth) for number in (1, 2, 4) for depth in (50, 99, 101, 5000)),
    *(varint(n << 3) + varint(2**64 - 1) for n in (1, 2, 3, 4, 5)),
    *(varint(n << 3 | 1) + struct.pack("<d", float("nan")) for n in (1, 2, 3)),
    *(entry(n, entry(1, b"x") * 2000) for n in (1, 2, 3, 4)),
)


@st.composite
def mutated(draw: st.DrawFn, whole: bytes) -> bytes:
    """Damage an encoded message, or leave it: cut, turned bytes, doubled, with something behind it."""
    how = draw(st.integers(0, 15))
    if how <= 9:
        return whole
    if how == 10:
        return whole[: draw(st.integers(0, len(whole)))]
    if how == 11 and whole:
        changed = bytearray(whole)
        for _ in range(draw(st.integers(1, 4))):
            changed[draw(st.integers(0, len(changed) - 1))] = draw(st.integers(0, 255))
        return bytes(changed)
    if how == 12:
        place = draw(st.integers(0, len(whole)))
        return whole[:place] + draw(st.binary(min_size=1, max_size=8)) + whole[place:]
    if how == 13:
        return whole + whole
    if how == 14:
        return whole + draw(st.sampled_from(_TAILS))
    return draw(st.binary(max_size=200))


@st.composite
def varied(draw: st.DrawFn, good: Message) -> Message:
    """Take a request that works and set some fields of it, or of a message in it, to anything."""
    made = type(good)()
    made.CopyFrom(good)
    for _ in range(draw(st.integers(0, 2))):
        target = made
        for _ in range(draw(st.integers(0, 2))):
            below = [f.name for f, _ in target.ListFields() if f.message_type and not f.is_repeated]
            if below:
                target = getattr(target, draw(st.sampled_from(below)))
        fields = tuple(target.DESCRIPTOR.fields)
        if fields:
            _set(draw, target, draw(st.sampled_from(fields)), 1)
    return made


@st.composite
def payloads(draw: st.DrawFn, descriptor: Descriptor, good: Sequence[Message] = ()) -> bytes:
    """Make the bytes of one request of a type; ``good`` are requests that work, to begin from."""
    made: Message
    if good and draw(st.integers(0, 3)):
        made = draw(varied(draw(st.sampled_from(list(good)))))
    else:
        made = draw(messages(descriptor))
    return draw(mutated(made.SerializeToString()))
