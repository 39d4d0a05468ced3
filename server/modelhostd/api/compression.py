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

from modelhostd.core.errors import ModelhostError, Reason, invalid

FIRST = frozenset((b"\x1f", b"\x78"))
"""First bytes of messages that may be compressed: all others are not."""
AT_ONCE_BYTES = 64 * 1024
"""Up to here it is done in the loop's thread, which takes 0.2 ms."""

_GZIP = b"\x1f"
_BY_HEAD = zlib.MAX_WBITS + 32
_thread = ThreadPoolExecutor(1, "unpacking")


class Unpacker:
    """Unpacks one message at a time: of all that come together, one is held in full before it is counted."""

    def __init__(self) -> None:
        self._turn = asyncio.Lock()

    async def unpacked(self, message: bytes, limit_bytes: int) -> bytes:
        """Return a message as it was before it was compressed, if it was.

        Raises MESSAGE_TOO_LARGE for one above the limit, at the limit; INVALID_ARGUMENT for gzip that is none.
        """
        inflater = zlib.decompressobj(_BY_HEAD)
        try:
            found = inflater.decompress(message, min(AT_ONCE_BYTES, limit_bytes + 1))
            if not inflater.eof and len(found) <= limit_bytes:
                async with self._turn:
                    found = await _rest(inflater, found, limit_bytes + 1)
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
        if whole:
            return found
        if message[:1] == _GZIP:
            raise invalid("request", "a message as it is, in gzip or in deflate", message[:40])
        return message


async def _rest(inflater: Any, begun: bytes, most: int) -> bytes:
    """Go on in a thread; returns at most ``most`` bytes, with those that there are."""

    def work() -> bytes:
        rest: bytes = inflater.decompress(inflater.unconsumed_tail, most - len(begun))
        return begun + rest

    return await asyncio.get_running_loop().run_in_executor(_thread, work)
