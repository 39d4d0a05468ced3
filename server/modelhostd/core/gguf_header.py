"""The header of a GGUF file, held against the file's size before anything reads it.

``GGUF``, version, counts, then key-value pairs, then tensor infos, then the tensors' bytes at offsets
behind the header, aligned. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Every count
and length of it comes from outside: none is believed before it fits into what is there.
"""

import struct

from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.paths import printable
from modelhostd.core.values import dataclass

MAGIC = b"GGUF"
VERSIONS = (2, 3)
HEADER_BYTES_MAX = 64 << 20
"""Vocabularies of a quarter of a million tokens take some 8 MB."""
TENSORS_MAX = 200_000
PAIRS_MAX = 100_000
KEY_BYTES_MAX = 65_535
NAME_BYTES_MAX = 1024
RANK_MAX = 8
ARRAY_DEPTH_MAX = 4
ALIGNMENT_MAX = 1 << 20

_STRING, _ARRAY = 8, 9
# By type of value: bytes. Strings and arrays say their length themselves.
_VALUE_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
# By type of tensor: elements of a block, and its bytes. Later types are taken on trust.
_BLOCKS = {
    0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 9: (32, 36),
    10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210), 15: (256, 292),
    16: (256, 66), 17: (256, 74), 18: (256, 98), 19: (256, 50), 20: (32, 18), 21: (256, 110),
    22: (256, 82), 23: (256, 136), 24: (1, 1), 25: (1, 2), 26: (1, 4), 27: (1, 8), 28: (1, 8),
    29: (256, 56), 30: (1, 2), 34: (256, 54), 35: (256, 66), 39: (32, 17),
}  # fmt: skip


class MoreNeeded(Exception):
    """The header goes on behind the bytes that were given."""


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """A checked header."""

    tensors: int
    data_offset: int
    """Where the tensors' bytes begin."""


def parse_gguf(head: bytes, file_bytes: int, name: str) -> GgufHeader:
    """Return the header of a file that begins with ``head``.

    Raises MoreNeeded when ``head`` is not the whole header (not where it is the whole file, or
    HEADER_BYTES_MAX), MALFORMED_FILE naming the file for anything that does not fit.
    """
    reader = _Reader(head, whole=len(head) >= min(file_bytes, HEADER_BYTES_MAX), name=name)
    if reader.take(4) != MAGIC:
        raise reader.malformed("it does not begin with GGUF")
    version, tensors, pairs = reader.unpack("<IQQ")
    if version not in VERSIONS:
        raise reader.malformed(f"version {version} or another byte order")
    if tensors > TENSORS_MAX or pairs > PAIRS_MAX:
        raise reader.malformed(f"{tensors} tensors and {pairs} values")
    alignment = _pairs(reader, pairs)
    spans = _tensors(reader, tensors, alignment)
    start = -(-reader.position // alignment) * alignment
    end = 0
    for offset, length in sorted(spans):
        if offset < end:
            raise reader.malformed("tensors that overlap")
        end = offset + length
    if start + end > file_bytes:
        raise reader.malformed(f"tensors up to byte {start + end} of {file_bytes}")
    return GgufHeader(tensors, start)


def _pairs(reader: "_Reader", count: int) -> int:
    """Walk over the key-value pairs; return the alignment that they ask for."""
    keys: set[bytes] = set()
    alignment = 32
    for _ in range(count):
        key = reader.string(KEY_BYTES_MAX)
        if key in keys:
            raise reader.malformed("a key twice")
        keys.add(key)
        (kind,) = reader.unpack("<I")
        if key == b"general.alignment" and kind == 4:
            (alignment,) = reader.unpack("<I")
            if not 8 <= alignment <= ALIGNMENT_MAX or alignment % 8:
                raise reader.malformed(f"an alignment of {alignment}")
        else:
            _value(reader, kind, ARRAY_DEPTH_MAX)
    return alignment


def _value(reader: "_Reader", kind: int, depth: int) -> None:
    if kind == _STRING:
        reader.string(HEADER_BYTES_MAX)
    elif kind == _ARRAY:
        item, count = reader.unpack("<IQ")
        if item in _VALUE_BYTES:
            reader.skip(_VALUE_BYTES[item] * count)
            return
        # Each takes 8 bytes at least: what cannot fit is not walked over.
        if depth == 0 or count > HEADER_BYTES_MAX // 8:
            raise reader.malformed("arrays too deep or too long")
        for _ in range(count):
            _value(reader, item, depth - 1)
    elif kind in _VALUE_BYTES:
        reader.skip(_VALUE_BYTES[kind])
    else:
        raise reader.malformed(f"a value of type {kind}")


def _tensors(reader: "_Reader", count: int, alignment: int) -> list[tuple[int, int]]:
    """Return where the tensors are: offset and bytes."""
    names: set[bytes] = set()
    spans: list[tuple[int, int]] = []
    for _ in range(count):
        name = reader.string(NAME_BYTES_MAX)
        if name in names:
            raise reader.malformed("a tensor twice")
        names.add(name)
        (rank,) = reader.unpack("<I")
        if rank > RANK_MAX:
            raise reader.malformed(f"a tensor of {rank} dimensions")
        elements = 1
        for size in reader.unpack(f"<{rank}Q"):
            elements *= size
        kind, offset = reader.unpack("<IQ")
        if offset % alignment:
            raise reader.malformed("a tensor that is not aligned")
        block, block_bytes = _BLOCKS.get(kind, (1, 0))
        if elements % block:
            raise reader.malformed("a tensor of part of a block")
        spans.append((offset, elements // block * block_bytes))
    return spans


class _Reader:
    """A position in the header; everything is checked against what is there."""

    def __init__(self, head: bytes, *, whole: bool, name: str) -> None:
        self.position = 0
        self._head = head
        self._whole = whole
        self._name = name

    def skip(self, count: int) -> None:
        """Go on behind so many bytes."""
        if count > len(self._head) - self.position:
            if self._whole or self.position + count > HEADER_BYTES_MAX:
                raise self.malformed("the header does not end within the file")
            raise MoreNeeded
        self.position += count

    def take(self, count: int) -> bytes:
        """Return the next bytes."""
        start = self.position
        self.skip(count)
        return self._head[start : self.position]

    def unpack(self, form: str) -> tuple[int, ...]:
        """Return the next numbers."""
        return struct.unpack(form, self.take(struct.calcsize(form)))

    def string(self, limit: int) -> bytes:
        """Return the next text, as it is stored."""
        (length,) = self.unpack("<Q")
        if length > limit:
            raise self.malformed(f"a text of {length} bytes")
        return self.take(length)

    def malformed(self, cause: str) -> ModelhostError:
        """Return MALFORMED_FILE for the file."""
        shown = printable(self._name)
        return ModelhostError(
            Reason.MALFORMED_FILE,
            f"{shown} is not a valid GGUF file: {cause}; its publisher must repair it, or leave it out "
            "with an ignore pattern",
            {"file": shown, "cause": cause},
        )
