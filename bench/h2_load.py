"""A load generator for one unary gRPC method: bytes out, bytes in, no gRPC library in between.

A gRPC client in Python costs more than the server under test and hides it. This one sends frames that are
encoded beforehand and looks at nothing but frame headers of what comes back.
"""

import itertools
import socket
import struct
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Self

from bench import h2_frames as h2

_LARGE = 2**31 - 1
_FRAME_MAX = 1 << 20
_OWN_WINDOW = _LARGE - 65_535


class LoadError(RuntimeError):
    """The server refused, or broke the connection."""


@dataclass
class Measured:
    """What a run was like: requests answered, seconds, and the latency of each in seconds."""

    seconds: float
    latencies: list[float]

    @property
    def rate(self) -> float:
        """Requests per second."""
        return len(self.latencies) / self.seconds

    def percentile(self, share: float) -> float:
        """Return a percentile of the latencies in seconds."""
        ordered = sorted(self.latencies)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


@dataclass(eq=False)
class _Stream:
    started: float
    unsent: memoryview
    window: int
    answered: bool = False


@dataclass
class Load:
    """One connection to ``target`` (``unix:PATH`` or ``HOST:PORT``) that calls ``path``."""

    target: str
    path: str
    keep: bool = False
    """Whether ``answer`` is the last answer's message: for small ones, looking at them takes time."""
    answer: bytes = b""
    _streams: dict[int, _Stream] = field(default_factory=dict)
    _blocked: deque[int] = field(default_factory=deque)

    def __post_init__(self) -> None:
        if self.target.startswith("unix:"):
            self._socket = socket.socket(socket.AF_UNIX)
            self._socket.connect(self.target.removeprefix("unix:"))
        else:
            host, _, port = self.target.rpartition(":")
            self._socket = socket.create_connection((host, int(port)))
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket.settimeout(60.0)
        self._headers = h2.request_headers(self.path)
        self._next_stream = 1
        self._window = 65_535
        self._initial_window = 65_535
        self._frame_max = 16_384
        self._received = 0
        self._buffer = bytearray()
        self._skip = 0
        settings = h2.settings(initial_window=_LARGE, max_frame=_FRAME_MAX)
        self._socket.sendall(h2.PREFACE + settings + h2.window(0, _OWN_WINDOW))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def run(self, *messages: bytes, concurrency: int, requests: int) -> Measured:
        """Send ``requests`` of the messages in turn, ``concurrency`` at a time; raises LoadError on any failure."""
        bodies = itertools.cycle([h2.message(message) for message in messages])
        latencies: list[float] = []
        started = time.perf_counter()
        begun = min(concurrency, requests)
        for _ in range(begun):
            self._begin(next(bodies))
        while len(latencies) < requests:
            for stream in self._ended():
                latencies.append(time.perf_counter() - stream.started)
                if begun < requests:
                    begun += 1
                    self._begin(next(bodies))
        return Measured(time.perf_counter() - started, latencies)

    # --- sending --------------------------------------------------------------------------------

    def _begin(self, body: bytes) -> None:
        number, self._next_stream = self._next_stream, self._next_stream + 2
        stream = _Stream(time.perf_counter(), memoryview(body), self._initial_window)
        self._streams[number] = stream
        head = h2.frame(h2.HEADERS, h2.END_HEADERS, number, self._headers)
        if len(body) <= min(self._window, stream.window, self._frame_max):
            # One system call for a small request, as native clients do.
            self._window -= len(body)
            stream.unsent = stream.unsent[:0]
            self._socket.sendall(head + h2.frame(h2.DATA, h2.END_STREAM, number, body))
        else:
            self._socket.sendall(head)
            self._blocked.append(number)
            self._push()

    def _push(self) -> None:
        """Send what the windows allow of the requests that are not sent whole."""
        for _ in range(len(self._blocked)):
            number = self._blocked.popleft()
            stream = self._streams.get(number)
            if stream is None:
                continue
            while stream.unsent and (size := self._sendable(stream)) > 0:
                part, stream.unsent = stream.unsent[:size], stream.unsent[size:]
                self._window -= size
                stream.window -= size
                flags = 0 if stream.unsent else h2.END_STREAM
                head = struct.pack(">I", size)[1:] + struct.pack(">BBI", h2.DATA, flags, number)
                self._send(head, part)
            if stream.unsent:
                self._blocked.append(number)

    def _sendable(self, stream: _Stream) -> int:
        return min(self._window, stream.window, self._frame_max, len(stream.unsent))

    def _send(self, head: bytes, part: memoryview) -> None:
        sent = self._socket.sendmsg([head, part])
        if sent < len(head):
            self._socket.sendall(head[sent:])
            sent = len(head)
        if sent < len(head) + len(part):
            self._socket.sendall(part[sent - len(head) :])

    # --- receiving ------------------------------------------------------------------------------

    def _ended(self) -> list[_Stream]:
        """Wait for bytes and return the calls that ended well with them."""
        data = self._socket.recv(1 << 20)
        if not data:
            raise LoadError("the server closed the connection")
        self._received += len(data)
        if self._received > 1 << 29:
            self._socket.sendall(h2.window(0, self._received))
            self._received = 0
        ended: list[_Stream] = []
        buffer = self._buffer
        if self._skip >= len(data):
            self._skip -= len(data)
            return ended
        buffer += data[self._skip :]
        self._skip = 0
        position = 0
        while len(buffer) - position >= 9:
            size, kind, flags, number = h2.head_of(buffer, position)
            rest = len(buffer) - position - 9
            if kind == h2.DATA:
                if size:
                    self._streams[number].answered = True
                if rest < size and self.keep:
                    break
                if self.keep and size:
                    begin = position + 9 + h2.MESSAGE_HEAD_BYTES
                    self.answer = bytes(buffer[begin : position + 9 + size])
                elif rest < size:
                    self._skip = size - rest
                    position = len(buffer)
                    break
            elif rest < size:
                break
            elif kind == h2.HEADERS and flags & h2.END_STREAM:
                ended.append(self._end(number))
            elif kind not in (h2.HEADERS, h2.DATA):
                self._control(
                    kind, flags, number, bytes(buffer[position + 9 : position + 9 + size])
                )
            position += 9 + size
        del buffer[:position]
        return ended

    def _end(self, number: int) -> _Stream:
        stream = self._streams.pop(number)
        if not stream.answered:
            raise LoadError("a call ended without an answer: its status is an error")
        return stream

    def _control(self, kind: int, flags: int, number: int, payload: bytes) -> None:
        if kind == h2.SETTINGS and not flags & h2.ACK:
            for i in range(0, len(payload), 6):
                name, value = struct.unpack(">HI", payload[i : i + 6])
                if name == 4:
                    for stream in self._streams.values():
                        stream.window += value - self._initial_window
                    self._initial_window = value
                elif name == 5:
                    self._frame_max = min(value, _FRAME_MAX)
            self._socket.sendall(h2.frame(h2.SETTINGS, h2.ACK, 0, b""))
            self._push()
        elif kind == h2.WINDOW:
            more = int.from_bytes(payload, "big")
            if number == 0:
                self._window += more
            elif number in self._streams:
                self._streams[number].window += more
            self._push()
        elif kind == h2.PING and not flags & h2.ACK:
            self._socket.sendall(h2.frame(h2.PING, h2.ACK, 0, payload))
        elif kind in (h2.RST, h2.GOAWAY):
            raise LoadError(f"the server ended a call or the connection: frame {kind}, {payload!r}")
