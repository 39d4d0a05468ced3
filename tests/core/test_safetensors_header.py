"""The safetensors header: good ones, a table of lies, and any bytes at all."""

import json
import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.safetensors_header import (
    DTYPE_BITS,
    PREFIX_BYTES,
    TENSORS_MAX,
    Header,
    header_length,
    parse_header,
    predicted_bytes,
)
from tests.core.attempt import attempt


def parse(entries: Any, data_bytes: int) -> Header:
    """Check a header given as an object, as of a file with so many bytes of tensors."""
    header = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return parse_header(header, PREFIX_BYTES + len(header) + data_bytes, "model.safetensors")


def tensor(dtype: str, shape: list[Any], start: Any, end: Any, **more: Any) -> dict[str, Any]:
    """Return one entry of a header."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end], **more}


def test_a_good_header_is_read_in_the_order_of_its_bytes() -> None:
    """Tensors, metadata and where the data begins; scalars and empty tensors too."""
    entries = {
        "__metadata__": {"format": "pt"},
        "b": tensor("F16", [3], 24, 30),
        "a": tensor("F32", [2, 3], 0, 24),
        "scalar": tensor("I64", [], 30, 38),
        "empty": tensor("F32", [0, 7], 38, 38),
    }
    header = parse(entries, 38)
    assert [t.name for t in header.tensors] == ["a", "b", "scalar", "empty"]
    assert header.tensors[0].shape == (2, 3)
    assert header.tensor_bytes == 38
    assert header.metadata == {"format": "pt"}
    assert header.data_offset == PREFIX_BYTES + len(json.dumps(entries))
    assert predicted_bytes([header, header]) == 76


def test_a_file_without_tensors_is_fine() -> None:
    """Nothing to load, nothing to refuse."""
    assert parse({}, 0).tensor_bytes == 0


def test_packed_types_are_counted_in_bits() -> None:
    """Two 4-bit numbers make a byte; an odd count makes no whole one."""
    assert parse({"w": tensor("F4", [4], 0, 2)}, 2).tensor_bytes == 2
    with pytest.raises(ModelhostError):
        parse({"w": tensor("F4", [3], 0, 2)}, 2)


LIES: dict[str, tuple[Any, int]] = {
    "not an object": (b"[]", 0),
    "not JSON": (b"{x}", 0),
    "not UTF-8": (b'{"\xff":1}', 0),
    "NaN": (b'{"a":NaN}', 0),
    "a float": (b'{"a":{"dtype":"U8","shape":[1.0],"data_offsets":[0,1]}}', 1),
    "deep": (b'{"a":' + b"[" * 100_000, 0),
    "huge number": (b'{"a":{"dtype":"U8","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,1]}}', 1),
    "duplicate tensor": (
        b'{"a":%b,"a":%b}' % ((b'{"dtype":"U8","shape":[1],"data_offsets":[0,1]}',) * 2),
        1,
    ),
    "duplicate field": (b'{"a":{"dtype":"U8","dtype":"U8","shape":[1],"data_offsets":[0,1]}}', 1),
    "metadata of numbers": ({"__metadata__": {"a": 1}}, 0),
    "metadata no object": ({"__metadata__": "x"}, 0),
    "entry no object": ({"a": 1}, 0),
    "entry with another field": ({"a": tensor("U8", [1], 0, 1, x=1)}, 1),
    "entry without offsets": ({"a": {"dtype": "U8", "shape": [1]}}, 1),
    "unknown dtype": ({"a": tensor("Q9", [1], 0, 1)}, 1),
    "dtype no text": ({"a": {"dtype": 3, "shape": [1], "data_offsets": [0, 1]}}, 1),
    "negative size": ({"a": tensor("U8", [-1], 0, 1)}, 1),
    "boolean size": ({"a": tensor("U8", [True], 0, 1)}, 1),
    "shape no list": ({"a": {"dtype": "U8", "shape": 1, "data_offsets": [0, 1]}}, 1),
    "rank 17": ({"a": tensor("U8", [1] * 17, 0, 1)}, 1),
    "overflow": ({"a": tensor("F32", [2**62, 2**62], 0, 0)}, 0),
    "overflow around to zero": ({"a": tensor("U8", [2**32, 2**32], 0, 0)}, 0),
    "three offsets": ({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1, 2]}}, 1),
    "offsets reversed": ({"a": tensor("U8", [1], 1, 0)}, 1),
    "too few bytes": ({"a": tensor("F32", [2], 0, 4)}, 4),
    "past the end": ({"a": tensor("U8", [9], 0, 9)}, 8),
    "a gap": ({"a": tensor("U8", [1], 0, 1), "b": tensor("U8", [1], 2, 3)}, 3),
    "an overlap": ({"a": tensor("U8", [2], 0, 2), "b": tensor("U8", [2], 1, 3)}, 3),
    "not from the start": ({"a": tensor("U8", [1], 1, 2)}, 2),
    "bytes left over": ({"a": tensor("U8", [1], 0, 1)}, 2),
    "control character in a name": ({"a\n": tensor("U8", [1], 0, 1)}, 1),
    "name of a mile": ({"a" * 1025: tensor("U8", [1], 0, 1)}, 1),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies_is_refused(lie: str) -> None:
    """MALFORMED_FILE names the file and the cause."""
    entries, data_bytes = LIES[lie]
    with pytest.raises(ModelhostError) as caught:
        parse(entries, data_bytes)
    assert caught.value.reason is Reason.MALFORMED_FILE
    assert caught.value.metadata["file"] == "'model.safetensors'"
    assert caught.value.message.isascii()


def test_too_many_tensors_are_refused_before_they_are_parsed() -> None:
    """Counted in the bytes: parsing a million entries would take the memory first."""
    header = b'{"a":"' + b"data_offsets" * (TENSORS_MAX + 1) + b'"}'
    with pytest.raises(ModelhostError, match="tensors, at most"):
        parse(header, 0)


@pytest.mark.parametrize(
    ("length", "size"),
    [(0, 100), (1, 100), (93, 100), (2**63, 100), (2**64 - 1, 100), (25_000_001, 10**12), (5, 7)],
)
def test_a_header_length_is_checked_against_the_file(length: int, size: int) -> None:
    """At least two bytes, at most 25 MB, inside the file."""
    with pytest.raises(ModelhostError) as caught:
        header_length(struct.pack("<Q", length), size, "x")
    assert caught.value.reason is Reason.MALFORMED_FILE
    assert header_length(struct.pack("<Q", 92), 100, "x") == 92
    with pytest.raises(ModelhostError):
        header_length(b"\x01\x02", 100, "x")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=10,
)
SIZES = st.integers(-2, 2**64) | st.integers(0, 9)
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(sorted(DTYPE_BITS)) | JSON,
        "shape": st.lists(SIZES, max_size=3) | JSON,
        "data_offsets": st.lists(SIZES, min_size=2, max_size=2) | JSON,
    }
)


@given(
    st.binary(max_size=200) | st.dictionaries(st.text(max_size=4), ENTRY | JSON, max_size=4),
    st.integers(-20, 1 << 40),
)
def test_any_header_is_good_or_malformed(header: bytes | dict[str, Any], data_bytes: int) -> None:
    """Nothing but MALFORMED_FILE is ever raised; what passes covers the file exactly."""
    data = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = PREFIX_BYTES + len(data) + data_bytes
    checked = attempt(lambda: parse_header(data, size, "any"))
    if isinstance(checked, ModelhostError):
        assert checked.reason is Reason.MALFORMED_FILE
        return
    assert checked.tensor_bytes == data_bytes
    assert sum(t.end - t.start for t in checked.tensors) == data_bytes


@given(
    st.lists(st.tuples(st.sampled_from(["U8", "F16", "F32", "I64"]), st.integers(0, 5)), max_size=6)
)
def test_every_honest_header_passes(shapes: list[tuple[str, int]]) -> None:
    """Whatever the tensors, in the layout that the library writes."""
    entries, position = {}, 0
    for number, (dtype, count) in enumerate(shapes):
        size = count * DTYPE_BITS[dtype] // 8
        entries[f"t{number}"] = tensor(dtype, [count], position, position + size)
        position += size
    assert parse(entries, position).tensor_bytes == position
