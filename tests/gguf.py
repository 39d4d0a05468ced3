"""Small valid GGUF files for tests, and the pieces that they are made of."""

import struct


def text(value: bytes) -> bytes:
    """Return a string as GGUF stores it."""
    return struct.pack("<Q", len(value)) + value


def pair(key: bytes, kind: int, value: bytes) -> bytes:
    """Return a key with its value."""
    return text(key) + struct.pack("<I", kind) + value


def tensor(name: bytes, shape: tuple[int, ...], kind: int = 24, offset: int = 0) -> bytes:
    """Return the info of a tensor; kind 24 is int8."""
    dims = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return text(name) + dims + struct.pack("<IQ", kind, offset)


def gguf(
    pairs: tuple[bytes, ...] = (),
    tensors: tuple[bytes, ...] = (),
    data: bytes = b"",
    *,
    version: int = 3,
    counts: tuple[int, int] | None = None,
    alignment: int = 32,
) -> bytes:
    """Return a file; ``counts`` (of tensors and pairs) may lie."""
    told = counts or (len(tensors), len(pairs))
    head = b"GGUF" + struct.pack("<IQQ", version, *told) + b"".join((*pairs, *tensors))
    return head + bytes(-len(head) % alignment) + data


def model(data: bytes) -> bytes:
    """Return a file whose one tensor is these bytes."""
    return gguf(
        (pair(b"general.architecture", 8, text(b"tiny")),), (tensor(b"w", (len(data),)),), data
    )
