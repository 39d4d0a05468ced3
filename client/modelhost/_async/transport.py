"""The connection of ``AsyncClient``: written by hand, like its twin in ``modelhost._sync``."""
# ruff: noqa: ASYNC109 - a timeout is sent with the call, so that the daemon keeps it, too

import asyncio
import functools
from collections.abc import AsyncIterator, Callable, Iterator
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

import grpc
from google.protobuf.message import Message

from modelhost import _calls, _health
from modelhost._options import Options
from modelhost._retries import service_config
from modelhost._status import error_from_rpc
from modelhost.oip.open_inference_pb2_grpc import GRPCInferenceServiceStub
from modelhost.v1.event_service_pb2_grpc import EventServiceStub
from modelhost.v1.host_service_pb2_grpc import HostServiceStub
from modelhost.v1.inference_service_pb2_grpc import InferenceServiceStub
from modelhost.v1.model_service_pb2_grpc import ModelServiceStub
from modelhost.v1.operation_service_pb2_grpc import OperationServiceStub
from modelhost.v1.residency_service_pb2_grpc import ResidencyServiceStub

if TYPE_CHECKING:
    from modelhost.oip.open_inference_pb2_grpc import GRPCInferenceServiceAsyncStub
    from modelhost.v1.event_service_pb2_grpc import EventServiceAsyncStub
    from modelhost.v1.host_service_pb2_grpc import HostServiceAsyncStub
    from modelhost.v1.inference_service_pb2_grpc import InferenceServiceAsyncStub
    from modelhost.v1.model_service_pb2_grpc import ModelServiceAsyncStub
    from modelhost.v1.operation_service_pb2_grpc import OperationServiceAsyncStub
    from modelhost.v1.residency_service_pb2_grpc import ResidencyServiceAsyncStub

Q = TypeVar("Q", bound=Message)
R = TypeVar("R", bound=Message)
T = TypeVar("T")


# What grpc.aio says of a call when the daemon ended it while a message was being sent. It takes the place of the
# daemon's own status, or the other way round: what the call ended with first and what it says at last are the two.
_CORE = "Internal error from Core"


def own_status(
    call: "grpc.aio.Call",
) -> Callable[[grpc.aio.AioRpcError], grpc.aio.AioRpcError]:
    """Return what turns the error of a call that sends a stream into the one that the daemon ended it with."""
    first: list[grpc.aio.AioRpcError] = []
    call.add_done_callback(lambda _: first.extend(_status_now(call)))
    return lambda error: first[0] if first and error.details() == _CORE else error


def _status_now(call: "grpc.aio.Call") -> Iterator[grpc.aio.AioRpcError]:
    """Yield what a call has just ended with, before anything can take its place."""

    async def status() -> grpc.aio.AioRpcError:
        trailing = await call.trailing_metadata()
        return grpc.aio.AioRpcError(
            await call.code(), grpc.aio.Metadata(), trailing, details=await call.details()
        )

    asked = status()
    try:
        asked.send(None)  # it has ended: there is nothing to wait for
    except StopIteration as found:
        yield found.value
    finally:
        asked.close()


class AsyncStream(Generic[R]):
    """A stream of answers; what it fails with is an error of modelhost."""

    def __init__(
        self,
        call: "grpc.aio.UnaryStreamCall[Any, R]",
        name: str,
        target: str,
        timeout: float | None,
    ) -> None:
        self._call = call
        self._name = name
        self._target = target
        self._timeout = timeout

    async def read(self) -> R | None:
        """Return the next message; None at the end in order."""
        try:
            message = await self._call.read()
        except grpc.aio.AioRpcError as error:
            raise error_from_rpc(
                error, call=self._name, target=self._target, timeout=self._timeout
            ) from None
        return None if message is grpc.aio.EOF else cast("R", message)

    def cancel(self) -> None:
        """End the stream, also from another task; one that has ended is no error."""
        self._call.cancel()


class AsyncTransport:
    """A channel, made when it is first used and bound to the loop it is used in, and its stubs."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self._closed = asyncio.Event()

    @property
    def closed(self) -> bool:
        """Whether ``close`` was called."""
        return self._closed.is_set()

    def check_open(self) -> None:
        """Raise RuntimeError once closed."""
        if self.closed:
            raise RuntimeError("this client is closed")

    @functools.cached_property
    def channel(self) -> grpc.aio.Channel:
        """The channel. Raises RuntimeError once closed."""
        self.check_open()
        options = self.options.channel_options(service_config())
        return grpc.aio.insecure_channel(self.options.target, options=options)

    @functools.cached_property
    def models(self) -> "ModelServiceAsyncStub":
        """ModelService."""
        return ModelServiceStub(self.channel)

    @functools.cached_property
    def residency(self) -> "ResidencyServiceAsyncStub":
        """ResidencyService."""
        return ResidencyServiceStub(self.channel)

    @functools.cached_property
    def operations(self) -> "OperationServiceAsyncStub":
        """OperationService."""
        return OperationServiceStub(self.channel)

    @functools.cached_property
    def events(self) -> "EventServiceAsyncStub":
        """EventService."""
        return EventServiceStub(self.channel)

    @functools.cached_property
    def host(self) -> "HostServiceAsyncStub":
        """HostService."""
        return HostServiceStub(self.channel)

    @functools.cached_property
    def inference(self) -> "GRPCInferenceServiceAsyncStub":
        """GRPCInferenceService."""
        return GRPCInferenceServiceStub(self.channel)

    @functools.cached_property
    def tasks(self) -> "InferenceServiceAsyncStub":
        """InferenceService: inference by task."""
        return InferenceServiceStub(self.channel)

    async def unary(
        self,
        method: "grpc.aio.UnaryUnaryMultiCallable[Q, R]",
        request: Q,
        timeout: float | None = None,
    ) -> R:
        """Make one call and return its answer. ``timeout`` in seconds; None = the client's."""
        self.check_open()
        name, seconds = _calls.begin(request, timeout, self.options)
        try:
            return await method(request, timeout=seconds)
        except grpc.aio.AioRpcError as error:
            raise error_from_rpc(
                error, call=name, target=self.options.target, timeout=seconds
            ) from None

    def stream(
        self,
        method: "grpc.aio.UnaryStreamMultiCallable[Q, R]",
        request: Q,
        timeout: float | None = None,
    ) -> AsyncStream[R]:
        """Open a stream of answers; without a timeout it goes on until it ends or is cancelled."""
        self.check_open()
        name = _calls.method_of(request)
        return AsyncStream(method(request, timeout=timeout), name, self.options.target, timeout)

    async def upload(
        self,
        method: "grpc.aio.StreamUnaryMultiCallable[Q, R]",
        requests: Iterator[Q] | AsyncIterator[Q],
        name: str,
        timeout: float | None = None,
        *,
        lasting: bool = False,
    ) -> R:
        """Send a stream of requests and return the one answer.

        A ``lasting`` one has no end but ``timeout``; others have the client's.
        """
        self.check_open()
        seconds = timeout or (None if lasting else self.options.timeout)
        call = method(requests, timeout=seconds)
        told = own_status(call)
        try:
            return await call
        except grpc.aio.AioRpcError as error:
            raise error_from_rpc(
                told(error), call=name, target=self.options.target, timeout=seconds
            ) from None

    async def blocking(self, work: Callable[[], T]) -> T:
        """Return what blocking work comes to."""
        return await asyncio.to_thread(work)

    async def health(self, service: str, timeout: float | None = None) -> str:
        """Return what grpc.health.v1 says of a service."""
        check = self.channel.unary_unary(
            _health.METHOD,
            request_serializer=_health.encode_request,
            response_deserializer=_health.decode_response,
        )
        seconds = timeout or self.options.timeout
        try:
            return await check(service, timeout=seconds)
        except grpc.aio.AioRpcError as error:
            raise error_from_rpc(
                error, call="Check", target=self.options.target, timeout=seconds
            ) from None

    async def pause(self, seconds: float) -> None:
        """Return after ``seconds``, or when the client is closed."""
        try:
            async with asyncio.timeout(seconds):
                await self._closed.wait()
        except TimeoutError:
            return

    async def close(self) -> None:
        """Close the channel and end every call on it."""
        self._closed.set()
        if "channel" in self.__dict__:
            await self.channel.close()
