"""The daemon's ends of a worker's sockets and of its standard error, on the event loop."""

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from typing import cast

from modelhostd.worker.wire.frames import Decoder, Frame, Kind, ProtocolError

worker_log = logging.getLogger("modelhostd.worker")

HIGH_WATER_BYTES = 512 * 1024

TAIL_LINES = 250
LINE_CHARACTERS = 1_000
TAIL_CHARACTERS = 32_000
LINES_A_SECOND = 50
BURST_LINES = 500
READ_PAUSE_S = 0.05


class FrameStream(asyncio.Protocol):
    """One socket: frames in by callback, bytes out without waiting.

    ``on_frame`` may raise :class:`ProtocolError` (or anything else, which counts as that): the stream is then over, and
    ``on_lost`` is told. ``on_lost`` is called once, with None where the worker closed it.
    """

    def __init__(
        self,
        kinds: frozenset[Kind],
        on_frame: Callable[[Frame], None],
        on_lost: Callable[[Exception | None], None],
        on_room: Callable[[], None] = lambda: None,
    ) -> None:
        self._decoder = Decoder(kinds)
        self._on_frame = on_frame
        self._on_lost = on_lost
        self._on_room = on_room
        self._transport: asyncio.Transport | None = None
        self._broken: Exception | None = None
        self.paused = False
        self.closed = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take the transport."""
        # Not isinstance: uvloop's transports are no subclasses of asyncio's.
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(high=HIGH_WATER_BYTES)

    def data_received(self, data: bytes) -> None:
        """Cut the bytes into frames and hand each on."""
        if self._broken is not None:
            return
        try:
            for frame in self._decoder.feed(data):
                self._on_frame(frame)
        except Exception as error:
            self._broken = error if isinstance(error, ProtocolError) else ProtocolError(repr(error))
            self.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell that the stream is over."""
        self._transport = None
        if not self.closed.done():
            self.closed.set_result(None)
        self._on_lost(self._broken or exc)

    def pause_writing(self) -> None:
        """Note that the worker does not keep up."""
        self.paused = True

    def resume_writing(self) -> None:
        """Note that there is room again, and tell who waits for it."""
        self.paused = False
        self._on_room()

    def write(self, data: bytes) -> None:
        """Send, now or as soon as the worker reads; nothing once the stream is over."""
        if self._transport is not None:
            self._transport.write(data)

    def abort(self) -> None:
        """Close at once; what was not sent is dropped."""
        if self._transport is not None:
            self._transport.abort()


class StderrTail(asyncio.Protocol):
    """Drains a worker's standard error, keeps its last lines, and passes them to the log at a bounded rate.

    Never lets a worker block on a full pipe, and never lets one that floods take the loop: it is read
    at most once in ``READ_PAUSE_S`` then.
    """

    def __init__(self, label: str) -> None:
        self._label = label
        self._lines: deque[str] = deque(maxlen=TAIL_LINES)
        self._partial = b""
        self._transport: asyncio.ReadTransport | None = None
        self._loop = asyncio.get_running_loop()
        self._allowance = float(BURST_LINES)
        self._refilled = self._loop.time()
        self._suppressed = 0
        self.closed = self._loop.create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take the transport."""
        self._transport = cast(asyncio.ReadTransport, transport)

    def data_received(self, data: bytes) -> None:
        """Keep and log the lines; read no further for a moment where there are too many."""
        *lines, self._partial = (self._partial + data).split(b"\n")
        self._partial = self._partial[-LINE_CHARACTERS:]
        self._refill()
        for line in lines:
            self._take(line)
        if self._allowance < 1 and self._transport is not None:
            self._transport.pause_reading()
            self._loop.call_later(READ_PAUSE_S, self._resume)

    def connection_lost(self, exc: Exception | None) -> None:
        """Keep what came after the last line break too."""
        del exc
        self._transport = None
        if self._partial:
            self._take(self._partial)
            self._partial = b""
        if not self.closed.done():
            self.closed.set_result(None)

    def text(self) -> str:
        """Return the last lines, at most ``TAIL_CHARACTERS``."""
        return "\n".join(self._lines)[-TAIL_CHARACTERS:]

    def close(self) -> None:
        """Stop reading: a child that the worker left behind may hold the pipe open for ever."""
        if self._transport is not None:
            self._transport.close()

    def _take(self, line: bytes) -> None:
        text = line[:LINE_CHARACTERS].decode(errors="backslashreplace").rstrip()
        self._lines.append(text)
        if self._allowance < 1:
            self._suppressed += 1
            return
        if self._suppressed:
            worker_log.warning("%s: %d lines were left out here", self._label, self._suppressed)
            self._suppressed = 0
        self._allowance -= 1
        worker_log.log(_level(text), "%s: %s", self._label, text)

    def _refill(self) -> None:
        now = self._loop.time()
        more = (now - self._refilled) * LINES_A_SECOND
        self._refilled = now
        self._allowance = min(BURST_LINES, self._allowance + more)

    def _resume(self) -> None:
        if self._transport is not None:
            self._transport.resume_reading()


def _level(line: str) -> int:
    level = logging.getLevelNamesMapping().get(line.partition(" ")[0])
    return level if level is not None else logging.INFO
