"""The worker's ends of its two sockets: blocking, one thread reads each, any thread sends."""

import socket
import threading
from collections.abc import Iterator

from modelhostd.core.errors import ModelhostError
from modelhostd.worker import failures
from modelhostd.worker.oip import Response
from modelhostd.worker.v1 import worker_pb2
from modelhostd.worker.wire import frames
from modelhostd.worker.wire.arena import Arena
from modelhostd.worker.wire.frames import Decoder, Frame, Kind, ProtocolError
from modelhostd.worker.wire.slots import Slots

RECEIVE_BYTES = 256 * 1024


class Channel:
    """One socket with framing. ``send`` is safe from any thread; frames never mix."""

    def __init__(self, sock: socket.socket, kinds: frozenset[Kind]) -> None:
        self._socket = sock
        self._decoder = Decoder(kinds)
        self._lock = threading.Lock()

    def frames(self) -> Iterator[Frame]:
        """Yield frames until the daemon closes its end. Raises :class:`ProtocolError` for garbage."""
        while data := self._socket.recv(RECEIVE_BYTES):
            yield from self._decoder.feed(data)

    def receive(self, *, wait: bool) -> list[Frame] | None:
        """Return the frames that the next chunk completes; None at the end.

        Where nothing has come it waits, or returns none. Raises :class:`ProtocolError` for garbage.
        """
        try:
            data = self._socket.recv(RECEIVE_BYTES, 0 if wait else socket.MSG_DONTWAIT)
        except BlockingIOError:
            return []
        return self._decoder.feed(data) if data else None

    def send(
        self, kind: Kind, flags: int, request: int, generation: int, header: bytes = b""
    ) -> None:
        """Send one frame without payload."""
        self.send_encoded(frames.encode(kind, flags, request, generation, header))

    def send_encoded(self, frame: bytes) -> None:
        """Send one encoded frame, waiting for the daemon to take it."""
        with self._lock:
            self._socket.sendall(frame)

    def send_error(self, request: int, generation: int, error: ModelhostError) -> None:
        """Send an error as the final frame of a request or command."""
        header = failures.encode(error)
        self.send(Kind.ERROR, frames.FINAL, request, generation, header)


class DataChannel(Channel):
    """The data socket with its response arena.

    A response goes into the frame when it is small, else into the arena, else (the arena is full, or smaller than the
    response) in several frames between which others' may pass. So nothing here waits for the daemon
    to give a slot back, and nothing can deadlock: the daemon always reads.
    """

    def __init__(
        self, sock: socket.socket, responses: Arena, arena_bytes: int, max_message_bytes: int
    ) -> None:
        """Send on ``sock``; slots lie in ``responses`` where that has memory, its first ``arena_bytes`` at most."""
        super().__init__(sock, frames.DATA_TO_WORKER)
        self._arena = responses
        self._arena_bytes = arena_bytes
        self._slots = Slots(0)
        self._slots_lock = threading.Lock()
        self.max_message_bytes = max_message_bytes
        """What a response may have; a longer one is not sent."""

    def release(self, offsets: list[int]) -> None:
        """Take slots back that the daemon has read. Raises :class:`ProtocolError` for unknown ones."""
        with self._slots_lock:
            for offset in offsets:
                try:
                    self._slots.free(offset)
                except KeyError:
                    raise ProtocolError(f"no response slot at {offset}") from None

    def extend(self, ready_bytes: int) -> None:
        """Use so much of the arena from now on. Raises :class:`ProtocolError` for less than before or too much."""
        with self._slots_lock:
            if not self._slots.size <= ready_bytes <= self._arena_bytes:
                raise ProtocolError(f"{ready_bytes} bytes of the response arena")
            self._slots.extend(ready_bytes)

    def send_response(
        self,
        request: int,
        generation: int,
        header: worker_pb2.ResponseHeader,
        response: Response,
        flags: int,
    ) -> None:
        """Send one response. Raises MESSAGE_TOO_LARGE, with nothing sent, where it passes the limit."""
        size = response.size
        if size < frames.ARENA_MIN_BYTES:
            self.send_encoded(
                frames.encode(
                    Kind.RESPONSE,
                    flags,
                    request,
                    generation,
                    header.SerializeToString(),
                    payload=response.to_bytes(),
                )
            )
            return
        if size > self.max_message_bytes:
            raise failures.answer_too_large(size, self.max_message_bytes)
        with self._slots_lock:
            offset = self._slots.allocate(size)
        if offset is not None:
            response.write(self._arena.view(offset, size))
            header.slot_offset = offset
            header.slot_length = size
            head = header.SerializeToString()
            self.send(Kind.RESPONSE, flags | frames.ARENA, request, generation, head)
            return
        header.total_length = size
        self._send_chunks(request, generation, header.SerializeToString(), response, flags)

    def _send_chunks(
        self, request: int, generation: int, header: bytes, response: Response, flags: int
    ) -> None:
        payload = memoryview(response.to_bytes())
        step = frames.MAX_PAYLOAD_BYTES
        for start in range(0, len(payload), step):
            last = start + step >= len(payload)
            self.send_encoded(
                frames.encode(
                    Kind.RESPONSE,
                    flags if last else frames.MORE,
                    request,
                    generation,
                    header if start == 0 else b"",
                    payload=payload[start : start + step],
                )
            )
