"""The header of a safetensors file, checked before any library reads it.

A file is 8 bytes little-endian header length N, N bytes of JSON, then the tensors' bytes:
``{"__metadata__": {"format": "pt"}, "w": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}``.
Format: https://huggingface.co/docs/safetensors/index#format. The reference library accepts duplicate
keys and headers of 100 MB with a million tensors; this check does not.
"""

import json
import struct
from collections.abc import Mapping, Sequence
from typing import Any

from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.paths import printable
from modelhostd.core.values import dataclass

PREFIX_BYTES = 8
HEADER_BYTES_MAX = 25_000_000
TENSORS_MAX = 200_000
RANK_MAX = 16
NAME_CHARS_MAX = 1024
SIZE_MAX = (1 << 63) - 1
_FIELDS = frozenset({"dtype", "shape", "data_offsets"})

# Bits, because some are packed two to a byte.
DTYPE_BITS: Mapping[str, int] = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32, "C64": 64, "I64": 64, "U64": 64, "F64": 64,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a file; ``start`` and ``end`` are bytes after the header."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Header:
    """A checked header. ``tensors`` are in the order of their bytes and cover the file exactly."""

    tensors: tuple[TensorEntry, ...]
    metadata: Mapping[str, str]
    data_offset: int

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors as they are stored."""
        return self.tensors[-1].end if self.tensors else 0


def header_length(prefix: bytes, file_bytes: int, name: str) -> int:
    """Return the header's length from a file's first 8 bytes, checked against the file's size.

    Raises MALFORMED_FILE naming the file.
    """
    if file_bytes < PREFIX_BYTES or len(prefix) < PREFIX_BYTES:
        raise malformed(name, f"{file_bytes} bytes are no safetensors file")
    length: int = struct.unpack_from("<Q", prefix)[0]
    limit = min(HEADER_BYTES_MAX, file_bytes - PREFIX_BYTES)
    if not 2 <= length <= limit:
        raise malformed(name, f"header of {length} bytes, expected 2 to {limit}")
    return length


def parse_header(header: bytes, file_bytes: int, name: str) -> Header:
    """Return the checked header of a file of ``file_bytes``; ``header`` is the JSON after the prefix.

    Raises MALFORMED_FILE naming the file and what is wrong; nothing else, whatever the bytes.
    """
    data_bytes = file_bytes - PREFIX_BYTES - len(header)
    if data_bytes < 0:
        raise malformed(name, f"the header of {len(header)} bytes is longer than the file")
    entries = _decode(header, name)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise malformed(name, "__metadata__ is not a map of strings")
    if len(entries) > TENSORS_MAX:
        raise malformed(name, f"{len(entries)} tensors, at most {TENSORS_MAX}")
    tensors = sorted(
        (_entry(key, value, data_bytes, name) for key, value in entries.items()),
        key=lambda tensor: (tensor.start, tensor.end),
    )
    _check_cover(tensors, data_bytes, name)
    return Header(tuple(tensors), metadata, PREFIX_BYTES + len(header))


def predicted_bytes(headers: Sequence[Header]) -> int:
    """Return what the weights of a model take on a device: the sum of its tensors as stored."""
    return sum(header.tensor_bytes for header in headers)


def malformed(name: str, cause: str) -> ModelhostError:
    """Return MALFORMED_FILE for one file of a model."""
    shown = printable(name)
    return ModelhostError(
        Reason.MALFORMED_FILE,
        f"{shown} is not a valid safetensors file: {cause}; its publisher must repair it, or leave it "
        "out with an ignore pattern",
        {"file": shown, "cause": cause},
    )


class _DuplicateKey(ValueError):
    pass


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        raise _DuplicateKey
    return out


def _reject_constant(_: str) -> None:
    raise ValueError


def _decode(header: bytes, name: str) -> dict[str, Any]:
    if not header.startswith(b"{"):
        raise malformed(name, "the header does not begin with '{'")
    # Counted before parsing: a million small objects would take 200 MB first.
    if (count := header.count(b"data_offsets")) > TENSORS_MAX:
        raise malformed(name, f"{count} tensors, at most {TENSORS_MAX}")
    try:
        text = header.decode("utf-8")
        decoded = json.loads(
            text,
            object_pairs_hook=_unique,
            parse_constant=_reject_constant,
            parse_float=_reject_constant,
        )
    except _DuplicateKey:
        raise malformed(name, "the header holds a key twice") from None
    except (ValueError, RecursionError):
        raise malformed(name, "the header is not valid JSON") from None
    if not isinstance(decoded, dict):
        raise malformed(name, "the header is not a JSON object")
    return decoded


def _entry(key: str, value: Any, data_bytes: int, name: str) -> TensorEntry:
    shown = ascii(key[:80])
    if not key.isprintable() or len(key) > NAME_CHARS_MAX:
        raise malformed(name, f"tensor name {shown} is unprintable or too long")
    if not isinstance(value, dict) or value.keys() != _FIELDS:
        raise malformed(name, f"tensor {shown} has other fields than dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise malformed(name, f"tensor {shown} has unknown dtype {ascii(dtype)[:40]}")
    if not _is_sizes(shape) or len(shape) > RANK_MAX:
        raise malformed(name, f"tensor {shown} has a shape that is not up to {RANK_MAX} sizes")
    if not _is_sizes(offsets) or len(offsets) != 2:
        raise malformed(name, f"tensor {shown} has data_offsets that are not two sizes")
    bits = DTYPE_BITS[dtype]
    for size in shape:
        # Stops before the product grows: sizes are checked to be at most 2**63 each.
        bits *= size
        if bits > 1 << 66:
            raise malformed(name, f"tensor {shown} overflows")
    start, end = offsets
    if bits % 8 or end - start != bits // 8:
        raise malformed(name, f"tensor {shown} of {bits // 8} bytes has offsets {start} to {end}")
    if end > data_bytes:
        raise malformed(name, f"tensor {shown} ends at {end}, after the file's {data_bytes} bytes")
    return TensorEntry(key, dtype, tuple(shape), start, end)


def _is_sizes(value: Any) -> bool:
    # No generator: it would take longer than all else of reading a header.
    return (
        isinstance(value, list)
        and set(map(type, value)) <= {int}
        and 0 <= min(value, default=0) <= max(value, default=0) <= SIZE_MAX
    )


def _check_cover(tensors: Sequence[TensorEntry], data_bytes: int, name: str) -> None:
    position = 0
    for tensor in tensors:
        if tensor.start != position:
            what = "overlap" if tensor.start < position else "leave a gap"
            raise malformed(name, f"the tensors {what} at byte {min(tensor.start, position)}")
        position = tensor.end
    if position != data_bytes:
        raise malformed(name, f"the tensors cover {position} of {data_bytes} bytes")
