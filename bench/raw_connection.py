"""A client connection that does only what it is told: for clients that behave badly.

It answers no SETTINGS and no PING, opens no window and reads nothing unless asked to.
"""

import selectors
import socket
import struct
import time
from typing import Self

from bench import h2_frames as h2


class RawConnection:
    """One connection to ``target`` (``unix:PATH`` or ``HOST:PORT``); nothing is sent by itself.

    ``receive_bytes`` is the size of the kernel's buffer for what comes (0: the system's choice).
    """

    def __init__(self, target: str, *, receive_bytes: int = 0, timeout_s: float = 60.0) -> None:
        if target.startswith("unix:"):
            self.socket = socket.socket(socket.AF_UNIX)
            address: str | tuple[str, int] = target.removeprefix("unix:")
        else:
            host, _, port = target.rpartition(":")
            family = socket.AF_INET6 if host.startswith("[") else socket.AF_INET
            self.socket = socket.socket(family)
            address = host.strip("[]"), int(port)
        self.socket.settimeout(timeout_s)
        if receive_bytes:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        self.socket.connect(address)
        self._next_stream = 1
        self._timeout_s = timeout_s
        self._buffer = bytearray()
        self.ended: set[int] = set()
        """Streams that the server has ended."""
        self.goaway = b""
        """What the server said when it gave the connection up."""
        self.received = 0
        """Bytes of messages that came."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- sending --------------------------------------------------------------------------------

    def send(self, data: bytes) -> None:
        """Send bytes as they are."""
        self.socket.sendall(data)

    def begin(self, *, initial_window: int = 65_535) -> Self:
        """Send the preface and SETTINGS; ``initial_window`` is what each answer may take unread."""
        self.send(h2.PREFACE + h2.settings(initial_window=initial_window))
        return self

    def acknowledge(self) -> None:
        """Acknowledge the server's SETTINGS."""
        self.send(h2.frame(h2.SETTINGS, h2.ACK, 0, b""))

    def call(self, path: str, data: bytes = b"", *, ends: bool = True) -> int:
        """Send a request whole, in frames of 16 KiB at most; returns its stream."""
        stream = self.next_stream()
        self.send(request(stream, path, data, ends=ends))
        return stream

    def next_stream(self) -> int:
        """Return the number of the next stream."""
        number, self._next_stream = self._next_stream, self._next_stream + 2
        return number

    # --- receiving ------------------------------------------------------------------------------

    def read(self) -> bool:
        """Wait for bytes and note what they say; False once the server has closed."""
        try:
            data = self.socket.recv(1 << 16)
        except (ConnectionResetError, BrokenPipeError):
            return False
        self._buffer += data
        for kind, flags, stream, payload in h2.frames_of(self._buffer):
            if kind == h2.DATA:
                self.received += len(payload)
            if (kind in (h2.HEADERS, h2.DATA) and flags & h2.END_STREAM) or kind == h2.RST:
                self.ended.add(stream)
            if kind == h2.GOAWAY:
                self.goaway = payload
        return bool(data)

    def drain(self) -> bool:
        """Note what has come, without waiting; False once the server has closed."""
        with selectors.DefaultSelector() as selector:
            selector.register(self.socket, selectors.EVENT_READ)
            while selector.select(0):
                if not self.read():
                    return False
        return True

    def until_ended(self, stream: int) -> bool:
        """Read until the server ended ``stream``; False if it closed the connection instead."""
        end = time.monotonic() + self._timeout_s
        while stream not in self.ended:
            if time.monotonic() > end:
                raise TimeoutError(f"stream {stream} did not end within {self._timeout_s:g} s")
            if not self.read():
                return False
        return True

    def until_closed(self) -> None:
        """Read until the server closes the connection."""
        end = time.monotonic() + self._timeout_s
        while self.read():
            if time.monotonic() > end:
                raise TimeoutError(f"the connection is open after {self._timeout_s:g} s")

    # --- ending ---------------------------------------------------------------------------------

    def half_close(self) -> None:
        """Say that nothing more will come, and go on listening."""
        self.socket.shutdown(socket.SHUT_WR)

    def reset(self) -> None:
        """Close with RST instead of FIN (TCP)."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()

    def close(self) -> None:
        """Close."""
        self.socket.close()


def request(stream: int, path: str, data: bytes, *, ends: bool = True, **headers: str) -> bytes:
    """Return the frames of one request; ``data`` is its message, encoded and not compressed."""
    return request_of(stream, path, h2.message(data), ends=ends, **headers)


def request_of(stream: int, path: str, body: bytes, *, ends: bool = True, **headers: str) -> bytes:
    """Return the frames of one request with a body of bytes as they are."""
    frames = [h2.frame(h2.HEADERS, h2.END_HEADERS, stream, h2.request_headers(path, **headers))]
    for start in range(0, len(body), 16_384):
        last = ends and start + 16_384 >= len(body)
        part = body[start : start + 16_384]
        frames.append(h2.frame(h2.DATA, h2.END_STREAM if last else 0, stream, part))
    return b"".join(frames)
