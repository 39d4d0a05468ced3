"""Messages as they come and go: unpacked, measured, parsed and encoded."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

from google.protobuf.message import DecodeError, Message

from modelhostd.api.compression import FIRST, Unpacker
from modelhostd.api.methods import Method
from modelhostd.core.errors import ModelhostError, Reason, invalid

READ_IDLE_S = 60.0
LINGER_S = 1.0
LINGER_IDLE_S = 0.1
LINGER_BYTES = 32 << 20


def parsed(method: Method, raw: bytes) -> Any:
    """Return the request of a method, or raise MESSAGE_TOO_LARGE or INVALID_ARGUMENT."""
    if len(raw) > method.limit_bytes:
        raise ModelhostError(
            Reason.MESSAGE_TOO_LARGE,
            f"the message has {len(raw)} bytes, {method.name} takes at most {method.limit_bytes}; "
            f"{method.too_large}",
            {"limitBytes": str(method.limit_bytes), "actualBytes": str(len(raw))},
        )
    if method.request is None:
        return raw
    try:
        return method.request.FromString(raw)
    except DecodeError:
        expected = f"an encoded {method.request.DESCRIPTOR.full_name}"
        raise invalid("request", expected, raw[:40]) from None


async def taken(method: Method, raw: bytes, unpacker: Unpacker) -> Any:
    """Return the request of a method as :func:`parsed` does, unpacked before if it came compressed."""
    if raw[:1] in FIRST:
        raw = await unpacker.unpacked(raw, method.limit_bytes)
    return parsed(method, raw)


async def requests(
    method: Method,
    messages: AsyncIterator[bytes],
    unpacker: Unpacker,
    *,
    idle_s: float | None = READ_IDLE_S,
) -> AsyncIterator[Any]:
    """Yield the requests of a client's stream; one that sends nothing for long ends it."""
    iterator = aiter(messages)
    while True:
        try:
            async with asyncio.timeout(idle_s):
                raw = await anext(iterator)
        except StopAsyncIteration:
            return
        except TimeoutError:
            raise ModelhostError(
                Reason.DEADLINE_EXCEEDED,
                f"{method.name} got no message for {READ_IDLE_S:g} s; what came does not count, begin again",
                {"method": method.name},
            ) from None
        yield await taken(method, raw, unpacker)


async def read_on(messages: AsyncIterator[bytes]) -> None:
    """Take what a client still sends before its stream is refused: for 1 s, 32 MiB, or 0.1 s of silence.

    A client of grpc.aio whose write meets a stream that has ended reports "Internal error from Core" in
    place of the status, if it has not read that yet: of 40 imports refused on busy cores, 3 ended so.
    """
    iterator = aiter(messages)
    left = LINGER_BYTES
    with contextlib.suppress(TimeoutError, StopAsyncIteration):
        async with asyncio.timeout(LINGER_S):
            while left > 0:
                async with asyncio.timeout(LINGER_IDLE_S):
                    left -= len(await anext(iterator))


def encoded(answer: Message | bytes) -> bytes:
    """Return an answer as it is sent; a handler may have encoded it already."""
    return answer if isinstance(answer, bytes) else answer.SerializeToString()
