"""Requests in flight in one worker: sent without waiting, answered by frames, payloads by arena.

Order of choice for a request's payload: in the frame when small; a slot of the arena; else in several
frames, one request's at a time, between which small ones pass. So no request waits for another's slot, and what this
costs in memory is bounded by ``inline_bytes``.
"""

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable

from modelhostd.adapters.workers import errors
from modelhostd.adapters.workers.arenas import Arenas
from modelhostd.adapters.workers.call import Call, Reply
from modelhostd.adapters.workers.config import WorkersConfig
from modelhostd.adapters.workers.growth import Growth
from modelhostd.adapters.workers.responses import Responses
from modelhostd.adapters.workers.streams import FrameStream
from modelhostd.core.errors import ModelhostError
from modelhostd.ports import InferReply, LoadSpec
from modelhostd.worker.v1 import worker_pb2
from modelhostd.worker.wire import frames
from modelhostd.worker.wire.frames import Frame, Kind, ProtocolError
from modelhostd.worker.wire.slots import Slots

_LONGEST_S = 1e8
"""Three years: what callers give for "no deadline" in seconds may not fit into 64 bits of nanoseconds."""

MODEL_SHARE = 0.75
"""Of the requests that may be in flight in one worker, those of one model: others find a place beside it."""
HEADS_MAX = 256
"""Beginnings of headers that are kept: one for each instance, name of it and priority."""
STREAM_WINDOW = 8
"""Credit of a stream: small responses that may lie here unread. The worker waits beyond them."""


class Calls:
    """The data socket of one worker and what is in flight on it."""

    def __init__(
        self,
        config: WorkersConfig,
        device: str,
        arenas: Arenas,
        send_cancel: Callable[[int], None],
    ) -> None:
        self._config = config
        self._device = device
        self._requests = arenas.requests.memory
        self._responses = Responses(config, arenas, self._write)
        self._slots = Slots(0)
        self._for_requests = Growth(arenas.requests, self._slots.extend)
        self._send_cancel = send_cancel
        self._in_flight: dict[int, Call] = {}
        self._of_model: dict[str, int] = {}
        self._model_limit = max(1, int(config.queue_limit * MODEL_SHARE))
        self._backlog: deque[Call] = deque()
        self._inline_bytes = 0
        self._heads: dict[tuple[str, str, int, int], bytes] = {}
        self._next = 0
        self._gone: Callable[[str], ModelhostError] | None = None
        self._loop = asyncio.get_running_loop()
        self.stream: FrameStream

    def begin(self) -> None:
        """Use what was allocated at the start; before the worker is greeted."""
        self._for_requests.begin()
        self._responses.begin()

    @property
    def count(self) -> int:
        """Requests whose final frame has not come, abandoned ones included."""
        return len(self._in_flight)

    @property
    def slots_taken(self) -> int:
        """Slots of the request arena that are in use."""
        return len(self._slots.taken)

    def infer(
        self, spec: LoadSpec, name: str, payload: bytes, timeout_s: float | None, priority: int
    ) -> "asyncio.Future[InferReply]":
        """Send one request now; see :meth:`modelhostd.ports.Workers.infer`."""
        model = spec.model
        reply = Reply(loop=self._loop)
        error = self._refusal(model, payload, timeout_s)
        if error is not None:
            reply.set_exception(error)
            return reply
        call = self._open(spec.generation, model)
        call.reply = reply
        reply.call = call
        self._send(call, self._head(spec.instance, name, priority), payload, timeout_s)
        return reply

    async def stream_infer(
        self, spec: LoadSpec, name: str, payload: bytes, timeout_s: float | None, priority: int
    ) -> AsyncGenerator[InferReply, None]:
        """Send one request and yield its responses; leaving the iterator early cancels it.

        What lies here unread is worth at most ``STREAM_WINDOW`` of credit, or is one larger response.
        """
        error = self._refusal(spec.model, payload, timeout_s)
        if error is not None:
            raise error
        call = self._open(spec.generation, spec.model)
        messages: asyncio.Queue[InferReply | ModelhostError | None] = asyncio.Queue()
        call.on_message = messages.put_nowait
        call.credit = STREAM_WINDOW
        head = self._head(spec.instance, name, priority, STREAM_WINDOW)
        self._send(call, head, payload, timeout_s)
        try:
            while (message := await messages.get()) is not None:
                if isinstance(message, ModelhostError):
                    raise message
                yield message
                # Only now: what is not taken yet is all that may lie here.
                cost = frames.credit_of(len(message.payload))
                call.credit += cost
                self.stream.write(self._responses.credit(call.request, responses=cost))
        finally:
            if call.request in self._in_flight:
                call.abandon()

    def abort(self, generation: int) -> None:
        """Answer everything in flight in an instance with CANCELLED, and tell the worker to stop it."""
        for call in [c for c in self._in_flight.values() if c.generation == generation]:
            call.fail(errors.aborted(call.model))
            call.abandon()

    def cancel(self, call: Call) -> None:
        """Stop a request that nobody waits for: not sent at all, or cancelled in the worker."""
        if call.unsent is not None and call.size == 0:
            self._backlog.remove(call)
            self._close(call)
        elif call.request in self._in_flight:
            self._send_cancel(call.request)

    def pump(self) -> None:
        """Send more of the large requests that do not go by the arena, while there is room."""
        while self._backlog and not self.stream.paused:
            call = self._backlog[0]
            assert call.unsent is not None
            end = call.size + frames.MAX_PAYLOAD_BYTES
            part = call.unsent[call.size : end]
            call.size += len(part)
            last = call.size == len(call.unsent)
            header, call.header = call.header, b""
            self.stream.write(
                frames.encode(
                    Kind.REQUEST,
                    0 if last else frames.MORE,
                    call.request,
                    call.generation,
                    header,
                    payload=part,
                )
            )
            if last:
                call.unsent = None
                call.size = 0
                self._backlog.popleft()

    def take(self, frame: Frame) -> None:
        """Take a frame of the worker. Raises :class:`ProtocolError` for what answers nothing."""
        call = self._in_flight.get(frame.request)
        if call is None or call.generation != frame.generation:
            raise ProtocolError(f"an answer to request {frame.request}, which is not in flight")
        final = bool(frame.flags & frames.FINAL)
        if frame.kind == Kind.ERROR:
            error = errors.from_header(frame.header)
            self._close(call)
            call.fail(error)
            return
        if frame.flags & frames.MORE:
            self._responses.collect(call, frame)
            return
        if call.on_message is not None:
            self._take_of_stream(call, frame, final=final)
            return
        if not final:
            raise ProtocolError(f"more than one response to request {frame.request}")
        self._take_response(call, frame)

    def fail_all(self, error: Callable[[str], ModelhostError]) -> None:
        """Answer everything in flight with ``error(model)``, and whatever is asked from now on."""
        self._gone = error
        calls = list(self._in_flight.values())
        self._in_flight.clear()
        self._of_model.clear()
        self._backlog.clear()
        for call in calls:
            call.fail(error(call.model))

    # --- inside ---------------------------------------------------------------------------------

    def _refusal(
        self, model: str, payload: bytes, timeout_s: float | None
    ) -> ModelhostError | None:
        if self._gone is not None:
            return self._gone(model)
        if timeout_s is not None and timeout_s <= 0:
            return errors.too_late(model)
        limit = self._config.max_message_bytes
        if len(payload) > limit:
            return errors.too_large(len(payload), limit)
        if len(self._in_flight) >= self._config.queue_limit:
            return errors.queue_full(model, self._device, self._config.queue_limit)
        if self._of_model.get(model, 0) >= self._model_limit:
            return errors.queue_full(model, self._device, self._model_limit, of_model=True)
        return None

    def _write(self, data: bytes) -> None:
        self.stream.write(data)

    def _open(self, generation: int, model: str) -> Call:
        self._next += 1
        call = self._in_flight[self._next] = Call(self, self._next, generation, model)
        self._of_model[model] = self._of_model.get(model, 0) + 1
        return call

    def _close(self, call: Call) -> None:
        if call.unsent is not None and call in self._backlog:
            # The worker refused before all was sent; the rest would be a request of its own. It stays in flight:
            # who waits is told of the worker's end.
            raise ProtocolError(f"request {call.request} was answered before it was sent")
        del self._in_flight[call.request]
        left = self._of_model[call.model] - 1
        if left:
            self._of_model[call.model] = left
        else:
            del self._of_model[call.model]
        if call.slot is not None:
            self._slots.free(call.slot)
        self._inline_bytes -= call.inline_bytes

    def _head(self, instance: str, name: str, priority: int, credit: int = 0) -> bytes:
        """Return what the headers of such requests begin with: the same for each, so it is encoded once."""
        key = instance, name, priority, credit
        head = self._heads.get(key)
        if head is None:
            if len(self._heads) >= HEADS_MAX:
                self._heads.clear()
            made = worker_pb2.RequestHeader(
                instance=instance, model_name=name, priority=priority, credit=credit
            )
            head = self._heads[key] = made.SerializeToString()
        return head

    def _send(self, call: Call, head: bytes, payload: bytes, timeout_s: float | None) -> None:
        if timeout_s is not None:
            deadline_ns = time.monotonic_ns() + int(min(timeout_s, _LONGEST_S) * 1e9)
            head += worker_pb2.RequestHeader(deadline_ns=deadline_ns).SerializeToString()
        size = len(payload)
        if size < frames.ARENA_MIN_BYTES:
            data = frames.encode(
                Kind.REQUEST, 0, call.request, call.generation, head, payload=payload
            )
            self.stream.write(self._responses.owed() + data)
            return
        slot = self._slots.allocate(size)
        if slot is None:
            self._for_requests.missed(size)
            self._send_later(call, head, payload)
            return
        call.slot = slot
        self._for_requests.used(slot + size)
        head += worker_pb2.RequestHeader(slot_offset=slot, slot_length=size).SerializeToString()
        data = frames.encode(Kind.REQUEST, frames.ARENA, call.request, call.generation, head)
        data = self._responses.owed() + data
        # Last: a large copy leaves the caches cold for whatever comes after it.
        self._requests.write(slot, payload)
        self.stream.write(data)

    def _send_later(self, call: Call, head: bytes, payload: bytes) -> None:
        limit = self._config.inline_bytes
        if self._inline_bytes and self._inline_bytes + len(payload) > limit:
            self._close(call)
            call.fail(errors.bytes_full(call.model, self._device, limit))
            return
        self._inline_bytes += len(payload)
        call.inline_bytes = len(payload)
        total = worker_pb2.RequestHeader(total_length=len(payload))
        call.header = head + total.SerializeToString()
        call.unsent = memoryview(payload)
        self._backlog.append(call)
        self.pump()

    def _take_response(self, call: Call, frame: Frame) -> None:
        header, payload = self._responses.read(call, frame)
        self._close(call)
        if (reply := call.settle()) is not None:
            reply.set_result(call.answer(header, payload))

    def _take_of_stream(self, call: Call, frame: Frame, *, final: bool) -> None:
        if final:
            self._close(call)
            if call.on_message is not None:
                call.on_message(None)
            return
        if call.credit <= 0:
            raise ProtocolError(f"more responses to request {call.request} than it had credit for")
        header, payload = self._responses.read(call, frame)
        call.credit -= frames.credit_of(header.slot_length or len(payload))
        if not call.abandoned and call.on_message is not None:
            call.on_message(call.answer(header, payload))
