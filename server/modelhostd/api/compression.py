"""Compressed messages (gzip, deflate), unpacked within limits.

gRPC hands them over as they came: it would unpack any number of them at one time, 60 KB to the largest
message each. Here they are unpacked one after the other, up to the limit of their method, once the call is let in.

gRPC does not say which messages are compressed. What gzip begins with begins no protobuf message; what deflate
(RFC 1950) begins with may, with field 15 in front, and such a message is no valid deflate up to its checksum.
"""

import asyncio
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from modelhostd.core.errors import ModelhostError, Reason

FIRST = frozenset((b"\x1f", b"\x78"))
"""First bytes of messages that may be compressed: all others are not."""
AT_ONCE_BYTES = 64 * 1024
"""Up to here it is done in the loop's thread, which takes 0.2 ms."""
WAITING_BYTES_MAX = 256 * 1024 * 1024
"""Of messages as they came that wait for their turn: nothing else counts them yet."""

_BY_HEAD = zlib.MAX_WBITS + 32
_thread = ThreadPoolExecutor(1, "unpacking")


class Unpacker:
    """Unpacks one message at a time: of all that come together, one is held in full before it is counted."""

    def __init__(self, waiting_bytes_max: int = WAITING_BYTES_MAX) -> None:
        self._turn = asyncio.Lock()
        self._waiting_bytes_max = waiting_bytes_max
        self._waiting_bytes = 0

    async def unpacked(self, message: bytes, limit_bytes: int) -> bytes:
        """Return a message as it was before it was compressed, if it was, else as it came.

        What begins as gzip does and is none is left to the message's own parser, which refuses it as it does any
        other bytes: on a stream in band, where an error from here would end it.
        Raises MESSAGE_TOO_LARGE for one above the limit, at the limit; QUEUE_FULL where too many wait.
        """
        inflater = zlib.decompressobj(_BY_HEAD)
        try:
            found = inflater.decompress(message, min(AT_ONCE_BYTES, limit_bytes + 1))
            if not inflater.eof and len(found) <= limit_bytes:
                found = await self._in_turn(inflater, found, limit_bytes + 1, len(message))
            whole = inflater.eof and not inflater.unused_data
        except zlib.error:
            found, whole = b"", False
        if len(found) > limit_bytes:
            del found  # an error keeps what its frames hold until its caller has been told
            raise ModelhostError(
                Reason.MESSAGE_TOO_LARGE,
                f"the message of {len(message)} bytes unpacks to more than the {limit_bytes} that this "
                f"method takes; send less at once",
                {"limitBytes": str(limit_bytes), "actualBytes": f"more than {limit_bytes}"},
            )
        return found if whole else message

    async def _in_turn(self, inflater: Any, begun: bytes, most: int, size: int) -> bytes:
        waiting, limit = self._waiting_bytes, self._waiting_bytes_max
        if waiting and waiting + size > limit:
            raise ModelhostError(
                Reason.QUEUE_FULL,
                f"{waiting} bytes of compressed messages wait to be unpacked, {size} more are above the limit of "
                f"{limit}; try again in a second, or send them as they are",
                {"queue": str(waiting), "limit": str(limit)},
                retry_delay_s=1.0,
            )
        self._waiting_bytes += size
        try:
            async with self._turn:
                work = asyncio.ensure_future(_rest(inflater, begun, most))
                try:
                    return await asyncio.shield(work)
                except asyncio.CancelledError:
                    # The thread goes on: until it has let go of the message that counts, and nobody else has a turn.
                    await asyncio.wait({work})
                    raise
        finally:
            self._waiting_bytes -= size


async def _rest(inflater: Any, begun: bytes, most: int) -> bytes:
    """Go on in a thread; returns at most ``most`` bytes, with those that there are."""

    def work() -> bytes:
        rest: bytes = inflater.decompress(inflater.unconsumed_tail, most - len(begun))
        return begun + rest

    return await asyncio.get_running_loop().run_in_executor(_thread, work)
