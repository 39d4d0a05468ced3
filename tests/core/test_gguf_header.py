"""The header of a GGUF file: what fits, and every way in which one does not."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.gguf_header import MoreNeeded, parse_gguf
from tests.core.attempt import attempt
from tests.gguf import gguf, model, pair, tensor, text

U32 = struct.Struct("<I").pack
U64 = struct.Struct("<Q").pack
ARCH = pair(b"general.architecture", 8, text(b"llama"))


def array(kind: int, count: int, items: bytes = b"") -> bytes:
    """Return an array as GGUF stores it."""
    return struct.pack("<IQ", kind, count) + items


GOOD = [
    model(b"x" * 100),
    gguf(),
    gguf((ARCH,), version=2),
    gguf(
        (
            ARCH,
            pair(b"tokens", 9, array(8, 2, text(b"a") + text(b"b"))),
            pair(b"scores", 9, array(6, 3, bytes(12))),
            pair(b"nested", 9, array(9, 2, array(0, 1, b"x") * 2)),
            pair(b"flag", 7, b"\x01"),
            pair(b"big", 10, bytes(8)),
        ),
        (tensor(b"a", (32, 2), 2, 0), tensor(b"b", (4,), 0, 64), tensor(b"c", (), 0, 96)),
        bytes(100),
    ),
    gguf(
        (pair(b"general.alignment", 4, U32(64)),),
        (tensor(b"a", (3,), 24, 64),),
        bytes(67),
        alignment=64,
    ),
    gguf((), (tensor(b"new kind", (7,), 999, 0),), b""),
]

BAD = {
    "empty": b"",
    "magic": b"GGML" + bytes(100),
    "short": b"GGUF\x03",
    "version": gguf(version=1),
    "byte order": b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
    "many tensors": gguf(counts=(1 << 40, 0)),
    "many pairs": gguf(counts=(0, 1 << 40)),
    "missing pair": gguf(counts=(0, 1)),
    "missing tensor": gguf(counts=(1, 0)),
    "long key": gguf((U64(1 << 20) + b"a" * 100,)),
    "endless key": gguf((U64(1 << 63),)),
    "endless text": gguf((pair(b"a", 8, U64(1 << 62)),)),
    "endless array": gguf((pair(b"a", 9, array(4, 1 << 61)),)),
    "endless texts": gguf((pair(b"a", 9, array(8, 1 << 61)),)),
    "deep arrays": gguf((pair(b"a", 9, array(9, 1) * 9 + array(0, 0)),)),
    "unknown value": gguf((pair(b"a", 13, bytes(8)),)),
    "unknown items": gguf((pair(b"a", 9, array(99, 1, bytes(8))),)),
    "key twice": gguf((ARCH, ARCH)),
    "tensor twice": gguf((), (tensor(b"a", (1,)), tensor(b"a", (1,), 24, 32)), bytes(64)),
    "rank": gguf((), (tensor(b"a", (1,) * 9),), bytes(9)),
    "alignment 0": gguf((pair(b"general.alignment", 4, U32(0)),)),
    "alignment 7": gguf((pair(b"general.alignment", 4, U32(7)),)),
    "huge alignment": gguf((pair(b"general.alignment", 4, U32(1 << 30)),)),
    "not aligned": gguf((), (tensor(b"a", (1,), 24, 1),), bytes(9)),
    "part of a block": gguf((), (tensor(b"a", (33,), 2),), bytes(99)),
    "past the end": gguf((), (tensor(b"a", (100,)),), bytes(99)),
    "offset past the end": gguf((), (tensor(b"a", (1,), 24, 1 << 62),), bytes(99)),
    "huge shape": gguf((), (tensor(b"a", (1 << 63, 1 << 63)),), bytes(99)),
    "overlap": gguf((), (tensor(b"a", (64,)), tensor(b"b", (1,), 24, 32)), bytes(99)),
    "truncated": model(b"x" * 100)[:-1],
}


@pytest.mark.parametrize("data", GOOD, ids=[str(number) for number in range(len(GOOD))])
def test_a_good_file_passes_in_pieces_too(data: bytes) -> None:
    """A head that is too short asks for more, and never says that the file is wrong."""
    header = parse_gguf(data, len(data), "m.gguf")
    assert header.data_offset <= len(data)
    for length in range(header.data_offset - 32):
        try:
            assert parse_gguf(data[:length], len(data), "m.gguf") == header
        except MoreNeeded:
            continue


@pytest.mark.parametrize("why", BAD)
def test_a_file_that_does_not_fit_is_refused(why: str) -> None:
    """MALFORMED_FILE with the name; at once, whatever its counts promise."""
    with pytest.raises(ModelhostError) as caught:
        parse_gguf(BAD[why], len(BAD[why]), "m\n.gguf")
    assert caught.value.reason is Reason.MALFORMED_FILE
    assert caught.value.message.isprintable()


@given(st.binary(max_size=300), st.integers(0, 400))
def test_any_bytes_are_judged(data: bytes, more: int) -> None:
    """A header, a refusal, or the wish for more where there is more."""
    for head in (data, b"GGUF\x03\0\0\0" + data):
        try:
            found = attempt(lambda head=head: parse_gguf(head, len(head) + more, "m.gguf"))
        except MoreNeeded:
            assert more > 0
            continue
        if isinstance(found, ModelhostError):
            assert found.reason is Reason.MALFORMED_FILE


@given(st.integers(0, 200), st.binary(min_size=1, max_size=4))
def test_a_good_file_with_other_bytes_is_judged(at: int, other: bytes) -> None:
    """One place of it overwritten: still a header or a refusal."""
    data = bytearray(GOOD[3])
    data[at : at + len(other)] = other
    found = attempt(lambda: parse_gguf(bytes(data), len(data), "m.gguf"))
    if isinstance(found, ModelhostError):
        assert found.reason is Reason.MALFORMED_FILE
