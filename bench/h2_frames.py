"""HTTP/2 as bytes: frames, the preface and a gRPC request's headers, for clients that are no library.

HTTP/2 is RFC 9113, header compression RFC 7541 (literals without indexing only), the mapping gRPC's
PROTOCOL-HTTP2.md.
"""

import struct
from collections.abc import Iterator

DATA, HEADERS, RST, SETTINGS, PING, GOAWAY, WINDOW = 0, 1, 3, 4, 6, 7, 8
END_STREAM, END_HEADERS, ACK = 1, 4, 1
INITIAL_WINDOW, MAX_FRAME = 4, 5
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
HEAD_BYTES = 9
MESSAGE_HEAD_BYTES = 5


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """Return one frame."""
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def settings(**values: int) -> bytes:
    """Return a SETTINGS frame of ``initial_window`` and ``max_frame``, in bytes."""
    numbers = {"initial_window": INITIAL_WINDOW, "max_frame": MAX_FRAME}
    pairs = (struct.pack(">HI", numbers[name], value) for name, value in values.items())
    return frame(SETTINGS, 0, 0, b"".join(pairs))


def window(stream: int, more: int) -> bytes:
    """Return a WINDOW_UPDATE frame; stream 0 is the connection."""
    return frame(WINDOW, 0, stream, struct.pack(">I", more))


def head_of(buffer: bytes | bytearray, position: int = 0) -> tuple[int, int, int, int]:
    """Return size, kind, flags and stream of the frame whose 9 bytes of head begin at ``position``."""
    size = int.from_bytes(buffer[position : position + 3], "big")
    number = int.from_bytes(buffer[position + 5 : position + 9], "big")
    return size, buffer[position + 3], buffer[position + 4], number


def frames_of(buffer: bytearray) -> Iterator[tuple[int, int, int, bytes]]:
    """Take every whole frame from the front of ``buffer``; yields kind, flags, stream, payload."""
    while len(buffer) >= HEAD_BYTES:
        size, kind, flags, number = head_of(buffer)
        if len(buffer) < HEAD_BYTES + size:
            return
        payload = bytes(buffer[HEAD_BYTES : HEAD_BYTES + size])
        del buffer[: HEAD_BYTES + size]
        yield kind, flags, number, payload


def message(data: bytes, *, compressed: bool = False) -> bytes:
    """Return gRPC's length-prefixed message."""
    return struct.pack(">BI", compressed, len(data)) + data


def request_headers(path: str, **more: str) -> bytes:
    """Return a request's header block: indexed where static, else literal and not indexed.

    ``more`` are further headers, ``_`` for ``-`` in their names.
    """
    return (
        b"\x83\x86"  # :method POST, :scheme http
        + _literal(b"\x04", path)  # :path
        + _literal(b"\x01", "bench")  # :authority
        + _literal(b"\x0f\x10", "application/grpc")  # content-type
        + _literal(b"\x00" + _text("te"), "trailers")
        + b"".join(
            _literal(b"\x00" + _text(name.replace("_", "-")), value) for name, value in more.items()
        )
    )


def _literal(name: bytes, value: str) -> bytes:
    return name + _text(value)


def _text(value: str) -> bytes:
    data = value.encode()
    assert len(data) < 127
    return bytes([len(data)]) + data
