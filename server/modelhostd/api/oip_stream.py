"""ModelStreamInfer: many requests over one stream, some of them at work at once.

Answers of models that give one to each request come in the order of the requests. A decoupled model gives any number of
responses to a request; those go out as they come, between the others' answers. A request that fails is
answered in band and leaves the stream as it is; what breaks the stream itself ends it. When the client closes
its side, what is outstanding is finished first: clients wait for that.
"""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from typing import Any, Protocol

import structlog

from modelhost.oip import open_inference_pb2
from modelhostd.api.calls import Call
from modelhostd.api.encoding import entry, key
from modelhostd.api.errors import internal, new_error_id, shutting_down, text
from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.oip_scan import RequestHead, scan
from modelhostd.ports import InferReply

log = structlog.get_logger(__name__)

OUTSTANDING_MAX = 32
OUTSTANDING_BYTES_MAX = 64 * 1024 * 1024
"""Requests of one stream that are read and not answered, and answers that its client has not read; beyond it
the stream is not read."""
STATUS_ERRORS_KEY = "triton_grpc_error"

_oip = open_inference_pb2
_ANSWER = key(_oip.ModelStreamInferResponse.INFER_RESPONSE_FIELD_NUMBER)


def _final(value: bool) -> bytes:
    """Return what is appended to an encoded ModelInferResponse, which thereby gains one parameter."""
    parameter = _oip.InferParameter(bool_param=value)
    return _oip.ModelInferResponse(
        parameters={"triton_final_response": parameter}
    ).SerializeToString()


_FINAL, _NOT_FINAL = _final(True), _final(False)

Infer = Callable[[RequestHead, bytes], AsyncGenerator[tuple[bool, InferReply], None]]
"""Serves one request: yields its responses, each with whether it is one of several."""


class Unread(Protocol):
    """Counts bytes of answers that clients have not read."""

    def take(self, size: int, model: str) -> None:
        """Count bytes in, or raise QUEUE_FULL."""

    def give_back(self, size: int) -> None:
        """Count bytes out."""


async def answers(
    messages: AsyncIterator[bytes], infer: Infer, unread: Unread, call: Call
) -> AsyncGenerator[bytes, None]:
    """Yield the encoded answers to encoded requests. What is not read yet is counted in ``unread``."""
    status_errors = any(
        name == STATUS_ERRORS_KEY and value in ("true", b"true")
        for name, value in call.context.invocation_metadata() or ()
    )
    window = _Window(infer, unread)
    reader = asyncio.create_task(_read(messages, window), name="stream reader")
    drain = asyncio.create_task(_stop_reading(call.draining, reader, window), name="stream drain")
    try:
        while (answer := await window.next()) is not None:
            if answer.error is None:
                yield answer.data
            elif status_errors:
                raise answer.error
            else:
                yield _in_band(answer.head, answer.error)
            window.written(answer)
        if window.failure is not None:
            raise window.failure
    finally:
        left: tuple[asyncio.Task[Any], ...] = (reader, drain, *window.tasks())
        for unfinished in left:
            unfinished.cancel()
        # First, and without waiting: this task may be cancelled once more.
        window.close()
        await asyncio.gather(*left, return_exceptions=True)


class _Nobody:
    """Takes the place of the count when the stream has ended."""

    def take(self, size: int, model: str) -> None:
        """Refuse: nobody will read it."""
        raise _lost()

    def give_back(self, size: int) -> None:
        """Do nothing."""


class _Answer:
    """One message to the client: an encoded answer, or an error. ``size`` is what was counted as unread of it."""

    __slots__ = ("data", "error", "head", "size")

    def __init__(self, head: RequestHead, data: bytes, error: ModelhostError | None = None) -> None:
        self.head = head
        self.data = data
        self.error = error
        self.size = 0


class _Work:
    """One request at work. ``answer`` is that of a model that gives one; a decoupled one has put its own."""

    __slots__ = ("answer", "decoupled", "head", "size", "task")

    def __init__(self, head: RequestHead, size: int) -> None:
        self.head = head
        self.size = size
        self.decoupled = False
        self.answer: _Answer | None = None
        self.task: asyncio.Task[None] | None = None


class _Window:
    """The requests that are read and not answered, in order; ``failure`` is why reading ended, if it failed."""

    def __init__(self, infer: Infer, unread: Unread) -> None:
        self._infer = infer
        self._unread = unread
        self._works: deque[_Work] = deque()
        self._ready: deque[_Answer] = deque()
        self._bytes = 0
        self._unread_bytes = 0
        self._changed = asyncio.Event()
        self._ended = False
        self.failure: BaseException | None = None

    async def room(self) -> None:
        """Wait until another request may be read."""
        while (
            len(self._works) >= OUTSTANDING_MAX
            or self._bytes + self._unread_bytes >= OUTSTANDING_BYTES_MAX
        ):
            await self._wait()

    def add(self, head: RequestHead, message: bytes, error: ModelhostError | None) -> None:
        """Begin a request, or note why it cannot be."""
        work = _Work(head, len(message))
        self._works.append(work)
        self._bytes += work.size
        if error is not None:
            work.answer = _Answer(head, b"", error)
        else:
            work.task = asyncio.create_task(self._serve(work, message))
        self._changed.set()

    def end(self, failure: BaseException | None = None) -> None:
        """Say that no more requests come."""
        if not self._ended:
            self._ended, self.failure = True, failure
            self._changed.set()

    async def next(self) -> _Answer | None:
        """Return the next message to the client, or None at the end."""
        while True:
            if self._ready:
                return self._ready.popleft()
            # Decoupled requests hold up nobody: their answers are in ``_ready`` as they come.
            first = next((work for work in self._works if not work.decoupled), None)
            if first is not None and first.answer is not None:
                self._leave(first)
                return first.answer
            if self._ended and not self._works:
                return None
            await self._wait()

    def written(self, answer: _Answer) -> None:
        """Note that the client has taken a message."""
        self._unread.give_back(answer.size)
        self._unread_bytes -= answer.size
        self._changed.set()

    def tasks(self) -> list["asyncio.Task[None]"]:
        """Return what is at work."""
        return [work.task for work in self._works if work.task is not None]

    def close(self) -> None:
        """Count out what nobody will read any more."""
        self._unread.give_back(self._unread_bytes)
        self._unread_bytes = 0
        self._unread = _Nobody()

    # --- inside ---------------------------------------------------------------------------------

    async def _serve(self, work: _Work, message: bytes) -> None:
        """Run one request to its last response."""
        head = work.head
        error = None
        last = False
        try:
            async with aclosing(self._infer(head, message)) as replies:
                del message
                async for decoupled, reply in replies:
                    work.decoupled, last = decoupled, reply.last
                    final = _FINAL if last or not decoupled else _NOT_FINAL
                    answer = self._counted(head, entry(_ANSWER, reply.payload + final))
                    if not decoupled:
                        work.answer = answer
                        continue
                    self._ready.append(answer)
                    self._changed.set()
                    # The next one is asked for when this one was taken.
                    while answer in self._ready or self._unread_bytes > OUTSTANDING_BYTES_MAX:
                        await self._wait()
        except asyncio.CancelledError:
            current = asyncio.current_task()
            if current is not None and current.cancelling():
                raise
            error = _lost()
        except ModelhostError as raised:
            error = raised
        except Exception:
            error_id = new_error_id()
            log.exception("a request of a stream failed unexpectedly", error_id=error_id)
            error = internal(error_id)
        self._finish(work, error, last=last)

    def _finish(self, work: _Work, error: ModelhostError | None, *, last: bool) -> None:
        head = work.head
        self._bytes -= work.size
        work.size = 0
        if not work.decoupled:
            if error is not None or work.answer is None:
                work.answer = _Answer(head, b"", error or _lost())
        else:
            if error is not None:
                self._ready.append(_Answer(head, b"", error))
            elif head.empty_final and not last:
                self._ready.append(_Answer(head, _empty_final(head)))
            self._leave(work)
        self._changed.set()

    def _counted(self, head: RequestHead, data: bytes) -> _Answer:
        """Return an answer that is counted as unread, or raise QUEUE_FULL."""
        answer = _Answer(head, data)
        self._unread.take(len(data), head.model_name[:64])
        answer.size = len(data)
        self._unread_bytes += answer.size
        return answer

    def _leave(self, work: _Work) -> None:
        self._works.remove(work)
        self._bytes -= work.size
        self._changed.set()

    async def _wait(self) -> None:
        # Several wait here; whoever is woken looks for itself.
        self._changed.clear()
        await self._changed.wait()


async def _read(messages: AsyncIterator[bytes], window: _Window) -> None:
    try:
        async for message in messages:
            try:
                head, error = scan(message), None
            except ModelhostError as refused:
                head, error = RequestHead("", "", ""), refused
            window.add(head, message, error)
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


def _lost() -> ModelhostError:
    return ModelhostError(
        Reason.WORKER_LOST,
        "the work on this request was given up, because its worker is gone; send it again",
        retry_delay_s=1.0,
    )


def _empty_final(head: RequestHead) -> bytes:
    """Return the message that says that no more responses come to a request."""
    response = _oip.ModelInferResponse(
        model_name=head.model_name, model_version=head.model_version, id=head.id
    )
    return entry(_ANSWER, response.SerializeToString() + _FINAL)


def _in_band(head: RequestHead, error: ModelhostError) -> bytes:
    response = _oip.ModelInferResponse(id=head.id)
    return _oip.ModelStreamInferResponse(
        error_message=text(error.message), infer_response=response
    ).SerializeToString()
