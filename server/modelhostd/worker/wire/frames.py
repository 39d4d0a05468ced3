"""Frames of the worker protocol: bytes in, frames out, whatever the chunks are. Pure.

The layout is documented in ``protos/modelhostd/worker/v1/worker.proto``. Whatever comes over a socket
is checked against the limits here before anything is kept, so the memory that a peer can take with
garbage is one frame.
"""

import enum
import struct
from typing import NamedTuple

PROTOCOL_VERSION = 5

MAGIC = 0x686D
_LAYOUT = struct.Struct("<HBBHHIQQ")
FIXED_BYTES = _LAYOUT.size

MAX_HEADER_BYTES = 65_535
"""A protobuf header is small; the largest is an ERROR with its metadata or a LOAD with its options."""
MAX_PAYLOAD_BYTES = 256 * 1024
"""Payload of one frame. Longer ones go through an arena or in several frames, so that a small
message never waits behind more than this."""
ARENA_MIN_BYTES = 64 * 1024
"""Payloads from this size on travel through an arena: below it, two copies through the socket cost
less than the bookkeeping of a slot."""


CREDIT_BYTES = 64 * 1024
"""What one credit of a stream pays for."""


def credit_of(size: int) -> int:
    """Return what a response of a stream costs: both ends count alike. The last one may cost more than there is."""
    return 1 + size // CREDIT_BYTES


Key = tuple[str, int]
"""Instance and generation: what most frames are about."""


class Kind(enum.IntEnum):
    """What a frame is."""

    HELLO = 1
    REQUEST = 2
    RESPONSE = 3
    ERROR = 4
    CANCEL = 5
    CREDIT = 6
    LOAD = 16
    LOAD_PROGRESS = 17
    LOADED = 18
    UNLOAD = 19
    UNLOADED = 20
    CHECK = 21
    CHECKED = 22
    HEARTBEAT = 23
    DEMOTE = 24
    DEMOTED = 25
    PROMOTE = 26
    KEPT = 27
    DROP_COPY = 28
    COPY_DROPPED = 29


DATA_TO_WORKER = frozenset({Kind.REQUEST, Kind.CREDIT})
DATA_FROM_WORKER = frozenset({Kind.RESPONSE, Kind.ERROR})
CONTROL_TO_WORKER = frozenset(
    {
        Kind.HELLO,
        Kind.LOAD,
        Kind.UNLOAD,
        Kind.DEMOTE,
        Kind.PROMOTE,
        Kind.DROP_COPY,
        Kind.CHECK,
        Kind.CANCEL,
    }
)
CONTROL_FROM_WORKER = frozenset(
    {
        Kind.HELLO,
        Kind.LOAD_PROGRESS,
        Kind.LOADED,
        Kind.UNLOADED,
        Kind.DEMOTED,
        Kind.COPY_DROPPED,
        Kind.CHECKED,
        Kind.KEPT,
        Kind.HEARTBEAT,
        Kind.ERROR,
    }
)

FINAL = 1
"""Flag: the last frame of its request."""
MORE = 2
"""Flag: the payload goes on in the next frame of this request id."""
ARENA = 4
"""Flag: the payload is a slot of the sender's arena, named in the header."""
_ALL_FLAGS = FINAL | MORE | ARENA


class ProtocolError(Exception):
    """The peer broke the protocol; nothing more that it sends can be trusted."""


class Frame(NamedTuple):
    """One frame as it came: ``header`` is an encoded protobuf message, ``payload`` raw bytes."""

    kind: int
    flags: int
    request: int
    generation: int
    header: bytes
    payload: bytes


def encode(
    kind: int,
    flags: int,
    request: int,
    generation: int,
    header: bytes = b"",
    *,
    payload: bytes | memoryview = b"",
) -> bytes:
    """Return one encoded frame. Raises :class:`ProtocolError` where a part is over its limit."""
    if len(header) > MAX_HEADER_BYTES or len(payload) > MAX_PAYLOAD_BYTES:
        raise ProtocolError(
            f"frame of kind {kind} with a header of {len(header)} and a payload of {len(payload)} "
            f"bytes; the limits are {MAX_HEADER_BYTES} and {MAX_PAYLOAD_BYTES}"
        )
    fixed = _LAYOUT.pack(MAGIC, kind, flags, len(header), 0, len(payload), request, generation)
    return b"".join((fixed, header, payload))


_new = tuple.__new__


class Decoder:
    """Cuts a byte stream into frames. After the first :class:`ProtocolError` it takes nothing more."""

    def __init__(self, kinds: frozenset[Kind]) -> None:
        self._kinds = kinds
        self._rest = bytearray()
        self._need = FIXED_BYTES
        self._broken = False

    def feed(self, data: bytes) -> list[Frame]:
        """Take the next chunk, of any size, and return the frames that it completes, in order.

        Raises :class:`ProtocolError` for a wrong magic, an unknown kind or flag, or a length over its
        limit: as soon as the fixed header is there, before its parts are waited for.
        """
        if self._broken:
            raise ProtocolError("the stream broke the protocol before")
        if self._rest:
            self._rest += data
            # Below this, looking again would find nothing: a peer that sends single bytes would
            # else make each of them cost a copy of the whole frame.
            if len(self._rest) < self._need:
                return []
            data = bytes(self._rest)
            self._rest.clear()
        frames: list[Frame] = []
        position = 0
        available = len(data)
        self._need = FIXED_BYTES
        while available - position >= FIXED_BYTES:
            magic, kind, flags, header_length, zero, payload_length, request, generation = (
                _LAYOUT.unpack_from(data, position)
            )
            if (
                magic != MAGIC
                or zero
                or kind not in self._kinds
                or flags & ~_ALL_FLAGS
                or payload_length > MAX_PAYLOAD_BYTES
            ):
                self._broken = True
                raise ProtocolError(
                    f"bad frame: magic {magic:#06x}, kind {kind}, flags {flags}, "
                    f"lengths {header_length} and {payload_length}"
                )
            start = position + FIXED_BYTES
            middle = start + header_length
            end = middle + payload_length
            if end > available:
                self._need = end - position
                break
            # Not Frame(...), which is a call in Python; a frame is made for each request, on both sides.
            frame = kind, flags, request, generation, data[start:middle], data[middle:end]
            frames.append(_new(Frame, frame))
            position = end
        if position < available:
            self._rest += data[position:] if position else data
        return frames

    @property
    def pending(self) -> int:
        """Bytes of a frame that is not complete yet."""
        return len(self._rest)
