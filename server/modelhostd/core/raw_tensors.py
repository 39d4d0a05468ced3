"""Texts as the raw form of BYTES tensors, and back: per element a 32-bit little-endian length and its bytes.

Source: Triton's binary tensor data extension, which the Open Inference Protocol's raw contents follow.
"""

import struct
from collections.abc import Iterable

_LENGTH = struct.Struct("<I")


def pack_texts(texts: Iterable[str]) -> bytes:
    """Return texts as raw contents, UTF-8."""
    parts = []
    for text in texts:
        data = text.encode()
        parts.append(_LENGTH.pack(len(data)))
        parts.append(data)
    return b"".join(parts)


def unpack_texts(raw: bytes, count: int) -> list[str]:
    """Return ``count`` texts of raw contents; bytes that are no UTF-8 become U+FFFD.

    Raises ValueError where there are more or fewer, or one is cut off.
    """
    texts: list[str] = []
    position = 0
    while position < len(raw):
        if len(texts) == count or position + _LENGTH.size > len(raw):
            raise ValueError(f"not {count} elements")
        (length,) = _LENGTH.unpack_from(raw, position)
        position += _LENGTH.size
        end = position + length
        if end > len(raw):
            raise ValueError("an element that is cut off")
        texts.append(raw[position:end].decode("utf-8", "replace"))
        position = end
    if len(texts) != count:
        raise ValueError(f"{len(texts)} elements in the place of {count}")
    return texts
