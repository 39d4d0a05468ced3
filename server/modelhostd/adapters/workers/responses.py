"""Payloads of one worker's answers: in a frame, in several, or in a slot of its arena, which goes back with the next request."""

from collections.abc import Callable

from modelhostd.adapters.workers.arenas import Arenas
from modelhostd.adapters.workers.call import Call
from modelhostd.adapters.workers.config import WorkersConfig
from modelhostd.adapters.workers.growth import Growth
from modelhostd.worker.v1 import worker_pb2
from modelhostd.worker.wire import frames
from modelhostd.worker.wire.frames import Frame, Kind, ProtocolError

READ_SHARE, READ_SLOTS = 0.25, 64
"""Of the response arena's memory, what may be read and not given back yet, and in how many slots. They go back with the next
request: a frame of their own wakes the worker once more, 20 to 40 us of the 1,500 of a request of 1 MiB."""


class Responses:
    """The daemon's end of the response arena, and the slots that the worker has not been given back yet."""

    def __init__(
        self, config: WorkersConfig, arenas: Arenas, write: Callable[[bytes], None]
    ) -> None:
        """``write`` sends a frame to the worker."""
        self._config = config
        self._arena = arenas.responses.memory
        self._growth = Growth(arenas.responses, self._tell_ready)
        self._write = write
        self._read_slots: list[int] = []
        self._read_bytes = 0

    def begin(self) -> None:
        """Use what was allocated at the start, and tell the worker of it."""
        self._growth.begin()

    def owed(self) -> bytes:
        """Return the frame that gives back all slots that were read; nothing where there are none."""
        return self.credit() if self._read_slots else b""

    def collect(self, call: Call, frame: Frame) -> None:
        """Keep a frame that is not the last of its answer. Raises :class:`ProtocolError` for too much."""
        if not call.parts:
            call.header = frame.header
            total = worker_pb2.ResponseHeader.FromString(frame.header).total_length
            if total > self._config.max_message_bytes:
                raise ProtocolError(f"a response of {total} bytes")
        call.parts = (*call.parts, frame.payload)
        call.size += len(frame.payload)
        if call.size > self._config.max_message_bytes:
            raise ProtocolError(f"a response of more than {self._config.max_message_bytes} bytes")

    def read(self, call: Call, frame: Frame) -> tuple[worker_pb2.ResponseHeader, bytes]:
        """Return the answer that a frame is, or ends. Raises :class:`ProtocolError` for a length or a slot that cannot be."""
        data = frame.header
        payload = frame.payload
        if call.parts:
            data = call.header
            payload = b"".join((*call.parts, payload))
            call.parts = ()
            call.size = 0
            self._growth.missed(len(payload))
        header = worker_pb2.ResponseHeader.FromString(data)
        if header.total_length and header.total_length != len(payload):
            raise ProtocolError(f"{len(payload)} bytes of a response of {header.total_length}")
        if frame.flags & frames.ARENA:
            offset, length = header.slot_offset, header.slot_length
            end = offset + length
            if end > self._growth.ready or not length:
                raise ProtocolError(f"a response slot of {length} bytes at {offset}")
            # Abandoned or not: the slot goes back. Only the copy is spared.
            payload = b"" if call.abandoned else self._arena.read(offset, length)
            self._read_slots.append(offset)
            self._read_bytes += length
            self._growth.used(end)
            enough = self._growth.ready * READ_SHARE
            if self._read_bytes > enough or len(self._read_slots) >= READ_SLOTS:
                self._write(self.credit())
        return header, payload

    def credit(self, request: int = 0, *, responses: int = 0) -> bytes:
        """Return the frame that gives back all slots that were read, and credit for a stream."""
        header = worker_pb2.CreditHeader(responses=responses, slots=self._read_slots)
        self._read_slots = []
        self._read_bytes = 0
        return frames.encode(Kind.CREDIT, 0, request, 0, header.SerializeToString())

    def _tell_ready(self, ready: int) -> None:
        header = worker_pb2.CreditHeader(response_ready_bytes=ready)
        self._write(frames.encode(Kind.CREDIT, 0, 0, 0, header.SerializeToString()))
