"""Every call goes through here: one place for what holds for all of them.

1. A handler is registered while it runs; draining waits for that registry.
2. A cancellation that nobody asked of this call becomes UNAVAILABLE, WORKER_LOST; a genuine one goes on.
3. An exception that nobody expected becomes INTERNAL with an opaque id; its text is in the log only.
4. What a call holds (permit, generator) is given back before its status is sent, which can take for ever.
5. Admission by group and method, streams apart from unary calls.
6. A write that is not read for STALL_S frees what the stream holds; the call is left to the limits of
   the connection.
7. Each call is counted in when it comes and out when its outcome is known, with its code and its time.
"""

import asyncio
import itertools
import re
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextvars import ContextVar
from typing import Any

import grpc
import structlog
from structlog.contextvars import STRUCTLOG_KEY_PREFIX

from modelhostd.api import errors
from modelhostd.api.admission import Admission, Gate, Group
from modelhostd.api.calls import Call, Caller, Calls, denied
from modelhostd.api.compression import FIRST, Unpacker
from modelhostd.api.counted import Counted, counts_of
from modelhostd.api.held import STALL_S, GoneError, Held
from modelhostd.api.messages import encoded, parsed, read_on, requests, taken
from modelhostd.api.methods import Method, Service
from modelhostd.core.errors import Code, ModelhostError, Reason
from modelhostd.core.rpc_stats import OK, RpcStats

log = structlog.get_logger(__name__)

# What every line of a call carries. structlog's own bind_contextvars takes 2 us for this.
_METHOD = ContextVar[str](f"{STRUCTLOG_KEY_PREFIX}method")
_REQUEST = ContextVar[str](f"{STRUCTLOG_KEY_PREFIX}request_id")
_PRINCIPAL = ContextVar[str](f"{STRUCTLOG_KEY_PREFIX}principal")

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")

Context = grpc.aio.ServicerContext[Any, Any]


class Wrapper:
    """Turns the methods of services into gRPC handlers for one listener, whose caller they serve."""

    def __init__(
        self,
        caller: Caller,
        calls: Calls,
        admission: Admission,
        *,
        stall_s: float = STALL_S,
        stats: RpcStats | None = None,
        unpacker: Unpacker | None = None,
    ) -> None:
        self._caller = caller
        self.calls = calls
        self._admission = admission
        self.stall_s = stall_s
        self.stats = stats if stats is not None else RpcStats()
        self._unpacker = unpacker if unpacker is not None else Unpacker()
        self._prefix = secrets.token_hex(4)
        self._numbers = itertools.count(1)
        self.stalled_count = 0

    def handlers(
        self, services: Sequence[Service], control_bytes_max: int
    ) -> Sequence[grpc.GenericRpcHandler]:
        """Return the handlers of all methods, with one at the end that answers whatever else comes."""
        made: list[grpc.GenericRpcHandler] = [
            grpc.method_handlers_generic_handler(
                service.name,
                {
                    name: self._handler(method)
                    for name, method in service.methods(control_bytes_max).items()
                },
            )
            for service in services
        ]
        return [*made, _Unknown(self._unknown)]

    def _handler(self, method: Method) -> "grpc.RpcMethodHandler[Any, Any]":
        # No (de)serializers: bytes come and go, so that limits are checked before anything is parsed.
        if method.server_streaming and method.client_streaming:
            return grpc.stream_stream_rpc_method_handler(self._streaming(method))
        if method.server_streaming:
            return grpc.unary_stream_rpc_method_handler(self._streaming(method))
        if method.client_streaming:
            return grpc.stream_unary_rpc_method_handler(self._gathering(method))
        return grpc.unary_unary_rpc_method_handler(self._unary(method))

    # --- one function for each kind of method -----------------------------------------------------

    def _unary(self, method: Method) -> Callable[..., Any]:
        if method.timeout_s is None:
            # The way of ModelInfer: no coroutine and no timer more than it needs.
            def work(raw: Any, call: Call) -> Awaitable[Any]:
                if raw[:1] in FIRST:
                    return unpacked(raw, call)
                answer: Awaitable[Any] = method.handler(parsed(method, raw), call)
                return answer

            async def unpacked(raw: bytes, call: Call) -> Any:
                return await method.handler(await taken(method, raw, self._unpacker), call)

            return self._answering(method, work)

        async def limited(raw: Any, call: Call) -> Any:
            limit = asyncio.timeout(method.timeout_s)
            try:
                async with limit:
                    return await method.handler(await taken(method, raw, self._unpacker), call)
            except TimeoutError:
                if limit.expired():
                    raise _too_long(method) from None
                raise

        return self._answering(method, limited)

    def _gathering(self, method: Method) -> Callable[..., Any]:
        async def work(messages: Any, call: Call) -> Any:
            try:
                return await method.handler(requests(method, messages, self._unpacker), call)
            except Exception:
                await read_on(messages)
                raise

        return self._answering(method, work)

    def _streaming(self, method: Method) -> Callable[..., Any]:
        counts = counts_of(method, self.stats)
        gate = self.gate(method)

        async def handle(given: bytes | AsyncIterator[bytes], context: Context) -> None:
            counted = Counted(counts, context)
            call = self._call(method.path, context)
            failure: ModelhostError | None = None
            held = Held(self, method, gate)
            try:
                held.take()
                request = (
                    await taken(method, given, self._unpacker)
                    if isinstance(given, bytes)
                    # Such a stream may be idle for hours between two requests.
                    else requests(method, given, self._unpacker, idle_s=None)
                )
                items = method.handler(request, call)
                held.items = items
                async for item in items:
                    await held.write(context, encoded(item))
                counted.code = OK
            except GoneError:
                # Nobody is there for a status. gRPC takes this for the end of the call; after a plain
                # return it would try to send one, and log a traceback for each such client.
                raise asyncio.CancelledError from None
            except (asyncio.CancelledError, Exception) as error:
                if held.writing:
                    # gRPC takes no status while a write is under way, however the handler ends.
                    raise
                failure = self._failure(error)
                counted.code = failure.code
            finally:
                counted.end()
                await held.free()
            if failure is not None:
                await errors.abort(context, failure, call.request_id)
            context.set_trailing_metadata(((errors.REQUEST_ID_KEY, call.request_id),))

        return handle

    async def _unknown(self, path: str, context: Context) -> None:
        self.stats.unknown.begin()
        self.stats.unknown.end(Code.UNIMPLEMENTED, 0.0)
        call = self._call(path, context)
        error = ModelhostError(
            Reason.UNIMPLEMENTED,
            f"{path[:200]} is not a method of this daemon; reflection on the admin socket lists them",
            {"method": path[:200]},
        )
        await errors.abort(context, error, call.request_id)

    # --- what they share --------------------------------------------------------------------------

    def _answering(
        self, method: Method, work: Callable[[Any, Call], Awaitable[Any]]
    ) -> Callable[..., Any]:
        """Return the handler of a method with one answer, which is what ``work`` returns or raises."""
        counts = counts_of(method, self.stats)
        gate = self.gate(method)
        path = method.path
        logged = method.group is Group.CONTROL
        # An id that nobody knows of is for errors and for the log; as a trailer it is 2 % of a small inference.
        told = method.group is not Group.INFERENCE

        async def handle(given: Any, context: Context) -> bytes:  # noqa: RET503  (abort never returns)
            counted = Counted(counts, context)
            call = self._call(path, context)
            ticket = 0
            try:
                ticket = self.admit(method, gate)
                answer = encoded(await work(given, call))
                counted.code = OK
            except (asyncio.CancelledError, Exception) as error:
                failure = self._failure(error)
                counted.code = failure.code
            else:
                if told or call.named:
                    context.set_trailing_metadata(((errors.REQUEST_ID_KEY, call.request_id),))
                if logged:
                    ms = round((time.monotonic() - counted.started) * 1e3, 1)
                    log.debug("call", ms=ms, code="OK")
                return answer
            finally:
                if ticket:
                    self.release(gate, ticket)
                counted.end()
            # gRPC holds this frame by its AbortError until the collector comes by: not a request of 16 MiB with it.
            given = None
            await errors.abort(context, failure, call.request_id)

        return handle

    def _call(self, path: str, context: Context) -> Call:
        request_id = ""
        for key, value in context.invocation_metadata() or ():
            if key == errors.REQUEST_ID_KEY and isinstance(value, str):
                request_id = value
        named = bool(request_id) and _REQUEST_ID.fullmatch(request_id) is not None
        if not named:
            request_id = f"{self._prefix}-{next(self._numbers):x}"
        # Each call runs in a task, and so in a context, of its own.
        _METHOD.set(path)
        _REQUEST.set(request_id)
        _PRINCIPAL.set(self._caller.principal)
        return Call(path, self._caller, request_id, self.calls, context, named)

    def _failure(self, error: BaseException) -> ModelhostError:
        """Return what the caller is told of an exception; raises a genuine cancellation again."""
        if isinstance(error, asyncio.CancelledError):
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                if self.calls.closing and task.uncancel() == 0:
                    # Ours, when the time for draining is over: the client is there and is told.
                    return errors.shutting_down()
                raise error
            return ModelhostError(
                Reason.WORKER_LOST,
                "the work behind this call was given up, because its worker is gone; repeat the call "
                "if doing it twice is harmless",
                retry_delay_s=1.0,
            )
        if isinstance(error, grpc.aio.AbortError):
            raise error
        if isinstance(error, ModelhostError):
            log.debug("call", code=error.code.name, reason=error.reason.value)
            return error
        error_id = errors.new_error_id()
        log.error("a call failed unexpectedly", error_id=error_id, exc_info=error)
        return errors.internal(error_id)

    def gate(self, method: Method) -> Gate:
        """Return what calls of a method are counted in and out by."""
        return self._admission.gate(method.group, method.path)

    def admit(self, method: Method, gate: Gate) -> int:
        """Let a call in and return its ticket, or raise why not."""
        if method.right not in self._caller.rights:
            raise denied(method.path, method.right, self._caller.principal)
        if self.calls.draining.is_set() and method.group is not Group.HEALTH:
            raise errors.shutting_down()
        gate.enter()
        return self.calls.enter(method.path)

    def release(self, gate: Gate, ticket: int) -> None:
        """Count a call out."""
        self.calls.leave(ticket)
        gate.leave()


class _Unknown(grpc.GenericRpcHandler):
    """Answers methods that no service has with a typed error."""

    def __init__(self, answer: Callable[[str, Context], Any]) -> None:
        self._answer = answer

    def service(
        self, handler_call_details: grpc.HandlerCallDetails
    ) -> "grpc.RpcMethodHandler[Any, Any]":
        path = handler_call_details.method

        async def handle(_: AsyncIterator[bytes], context: Context) -> None:
            await self._answer(path, context)

        return grpc.stream_stream_rpc_method_handler(handle)


def _too_long(method: Method) -> ModelhostError:
    return ModelhostError(
        Reason.DEADLINE_EXCEEDED,
        f"{method.name} took longer than {method.timeout_s:g} s; what it started goes on, look at "
        f"its state before you repeat it",
        {"method": method.name},
    )
