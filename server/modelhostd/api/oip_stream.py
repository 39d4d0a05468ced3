"""ModelStreamInfer: many requests over one stream, answered in their order, some of them at work at once.

A request that fails is answered in band and leaves the stream as it is; what breaks the stream itself ends
it. When the client closes its side, what is outstanding is finished first: clients wait for that.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import structlog

from modelhost.oip import open_inference_pb2
from modelhostd.api.calls import Call
from modelhostd.api.encoding import entry, key
from modelhostd.api.errors import internal, new_error_id, shutting_down, text
from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.oip_scan import RequestHead, scan

log = structlog.get_logger(__name__)

OUTSTANDING_MAX = 32
OUTSTANDING_BYTES_MAX = 64 * 1024 * 1024
"""Requests of one stream that are read and not answered; beyond it the stream is not read."""
STATUS_ERRORS_KEY = "triton_grpc_error"

_oip = open_inference_pb2
_ANSWER = key(_oip.ModelStreamInferResponse.INFER_RESPONSE_FIELD_NUMBER)
# Appended to an encoded ModelInferResponse, which thereby gains one parameter.
_FINAL = _oip.ModelInferResponse(
    parameters={"triton_final_response": _oip.InferParameter(bool_param=True)}
).SerializeToString()

Infer = Callable[[RequestHead, bytes], Coroutine[Any, Any, bytes]]


async def answers(messages: AsyncIterator[bytes], infer: Infer, call: Call) -> AsyncIterator[bytes]:
    """Yield the encoded answers to encoded requests, in the order of the requests."""
    status_errors = any(
        name == STATUS_ERRORS_KEY and value in ("true", b"true")
        for name, value in call.context.invocation_metadata() or ()
    )
    window = _Window()
    reader = asyncio.create_task(_read(messages, infer, window), name="stream reader")
    drain = asyncio.create_task(_stop_reading(call.draining, reader, window), name="stream drain")
    try:
        while (work := await window.next()) is not None:
            head, task = work
            answer, error = await _ended(task)
            if error is None:
                yield entry(_ANSWER, answer + _FINAL)
            elif status_errors:
                raise error
            else:
                yield _in_band(head, error)
        if window.failure is not None:
            raise window.failure
    finally:
        left: tuple[asyncio.Task[Any], ...] = (reader, drain, *window.left())
        for unfinished in left:
            unfinished.cancel()
        await asyncio.gather(*left, return_exceptions=True)


async def _ended(task: "asyncio.Task[bytes]") -> tuple[bytes, ModelhostError | None]:
    """Return the answer to one request, or why it failed; only the end of the stream itself raises."""
    try:
        return await task, None
    except ModelhostError as error:
        return b"", error
    except asyncio.CancelledError:
        current = asyncio.current_task()
        if current is not None and current.cancelling():
            raise
        return b"", ModelhostError(
            Reason.WORKER_LOST,
            "the work on this request was given up, because its worker is gone; send it again",
            retry_delay_s=1.0,
        )
    except Exception:
        error_id = new_error_id()
        log.exception("a request of a stream failed unexpectedly", error_id=error_id)
        return b"", internal(error_id)


class _Window:
    """The requests that are read and not answered, in order; ``failure`` is why reading ended, if it failed."""

    def __init__(self) -> None:
        self._works: deque[tuple[RequestHead, asyncio.Task[bytes], int]] = deque()
        self._bytes = 0
        self._changed = asyncio.Event()
        self._ended = False
        self.failure: BaseException | None = None

    async def room(self) -> None:
        """Wait until another request may be read."""
        while len(self._works) >= OUTSTANDING_MAX or self._bytes >= OUTSTANDING_BYTES_MAX:
            await self._wait()

    def add(self, head: RequestHead, task: "asyncio.Task[bytes]", size: int) -> None:
        """Add a request that is at work."""
        self._works.append((head, task, size))
        self._bytes += size
        self._changed.set()

    def end(self, failure: BaseException | None = None) -> None:
        """Say that no more requests come."""
        if not self._ended:
            self._ended, self.failure = True, failure
            self._changed.set()

    async def next(self) -> tuple[RequestHead, "asyncio.Task[bytes]"] | None:
        """Return the next request to be answered, or None at the end."""
        while not self._works:
            if self._ended:
                return None
            await self._wait()
        head, task, size = self._works.popleft()
        self._bytes -= size
        self._changed.set()
        return head, task

    def left(self) -> list["asyncio.Task[bytes]"]:
        """Return the requests that nobody will answer any more."""
        return [task for _, task, _ in self._works]

    async def _wait(self) -> None:
        self._changed.clear()
        await self._changed.wait()


async def _read(messages: AsyncIterator[bytes], infer: Infer, window: _Window) -> None:
    try:
        async for message in messages:
            try:
                head = scan(message)
            except ModelhostError as error:
                head = RequestHead("", "", "")
                work = _fail(error)
            else:
                work = infer(head, message)
            window.add(head, asyncio.ensure_future(work), len(message))
            await window.room()
    except Exception as error:
        window.end(error)
    else:
        window.end()


async def _stop_reading(
    draining: asyncio.Event, reader: "asyncio.Task[None]", window: _Window
) -> None:
    await draining.wait()
    reader.cancel()
    window.end(shutting_down())


async def _fail(error: ModelhostError) -> bytes:
    raise error


def _in_band(head: RequestHead, error: ModelhostError) -> bytes:
    response = _oip.ModelInferResponse(id=head.id)
    return _oip.ModelStreamInferResponse(
        error_message=text(error.message), infer_response=response
    ).SerializeToString()
