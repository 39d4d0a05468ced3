"""The connection of ``Client``: written by hand, like its twin in ``modelhost._async``."""

import functools
import threading
from collections.abc import Callable, Iterator
from typing import Generic, Protocol, TypeVar, cast

import grpc
from google.protobuf.message import Message

from modelhost import _calls, _health
from modelhost._options import Options
from modelhost._retries import service_config
from modelhost._status import RpcFailure, error_from_rpc
from modelhost.oip.open_inference_pb2_grpc import GRPCInferenceServiceStub
from modelhost.v1.event_service_pb2_grpc import EventServiceStub
from modelhost.v1.host_service_pb2_grpc import HostServiceStub
from modelhost.v1.inference_service_pb2_grpc import InferenceServiceStub
from modelhost.v1.model_service_pb2_grpc import ModelServiceStub
from modelhost.v1.operation_service_pb2_grpc import OperationServiceStub
from modelhost.v1.residency_service_pb2_grpc import ResidencyServiceStub

Q = TypeVar("Q", bound=Message)
R = TypeVar("R", bound=Message)
T = TypeVar("T")
R_co = TypeVar("R_co", bound=Message, covariant=True)


class Readable(Protocol[R_co]):
    """What grpc gives for a stream of answers."""

    def __iter__(self) -> Iterator[R_co]: ...

    def __next__(self) -> R_co: ...

    def cancel(self) -> object:
        """End the stream."""
        ...


class Stream(Generic[R]):
    """A stream of answers; what it fails with is an error of modelhost."""

    def __init__(self, call: "Readable[R]", name: str, target: str, timeout: float | None) -> None:
        self._call = call
        self._name = name
        self._target = target
        self._timeout = timeout

    def read(self) -> R | None:
        """Return the next message; None at the end in order."""
        try:
            return next(self._call, None)
        except grpc.RpcError as error:
            raise error_from_rpc(
                _failure(error), call=self._name, target=self._target, timeout=self._timeout
            ) from None

    def cancel(self) -> None:
        """End the stream, also from another thread; one that has ended is no error."""
        self._call.cancel()


class Transport:
    """A channel, made when it is first used, so that a process may fork before it, and its stubs."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self._closed = threading.Event()
        self._making = threading.Lock()

    @property
    def closed(self) -> bool:
        """Whether ``close`` was called."""
        return self._closed.is_set()

    def check_open(self) -> None:
        """Raise RuntimeError once closed."""
        if self.closed:
            raise RuntimeError("this client is closed")

    @functools.cached_property
    def channel(self) -> grpc.Channel:
        """The channel. Raises RuntimeError once closed."""
        with self._making:
            made = self.__dict__.get("channel")
            if made is not None:
                return cast("grpc.Channel", made)
            self.check_open()
            options = self.options.channel_options(service_config())
            # Stored under the lock: cached_property itself has none.
            self.__dict__["channel"] = grpc.insecure_channel(self.options.target, options=options)
            return cast("grpc.Channel", self.__dict__["channel"])

    @functools.cached_property
    def models(self) -> ModelServiceStub:
        """ModelService."""
        return ModelServiceStub(self.channel)

    @functools.cached_property
    def residency(self) -> ResidencyServiceStub:
        """ResidencyService."""
        return ResidencyServiceStub(self.channel)

    @functools.cached_property
    def operations(self) -> OperationServiceStub:
        """OperationService."""
        return OperationServiceStub(self.channel)

    @functools.cached_property
    def events(self) -> EventServiceStub:
        """EventService."""
        return EventServiceStub(self.channel)

    @functools.cached_property
    def host(self) -> HostServiceStub:
        """HostService."""
        return HostServiceStub(self.channel)

    @functools.cached_property
    def inference(self) -> GRPCInferenceServiceStub:
        """GRPCInferenceService."""
        return GRPCInferenceServiceStub(self.channel)

    @functools.cached_property
    def tasks(self) -> InferenceServiceStub:
        """InferenceService: inference by task."""
        return InferenceServiceStub(self.channel)

    def unary(
        self, method: "grpc.UnaryUnaryMultiCallable[Q, R]", request: Q, timeout: float | None = None
    ) -> R:
        """Make one call and return its answer. ``timeout`` in seconds; None = the client's."""
        self.check_open()
        name, seconds = _calls.begin(request, timeout, self.options)
        try:
            return method(request, timeout=seconds)
        except grpc.RpcError as error:
            raise error_from_rpc(
                _failure(error), call=name, target=self.options.target, timeout=seconds
            ) from None

    def stream(
        self,
        method: "grpc.UnaryStreamMultiCallable[Q, R]",
        request: Q,
        timeout: float | None = None,
    ) -> Stream[R]:
        """Open a stream of answers; without a timeout it goes on until it ends or is cancelled."""
        self.check_open()
        name = _calls.method_of(request)
        return Stream(method(request, timeout=timeout), name, self.options.target, timeout)

    def upload(
        self,
        method: "grpc.StreamUnaryMultiCallable[Q, R]",
        requests: Iterator[Q],
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
        try:
            return method(requests, timeout=seconds)
        except grpc.RpcError as error:
            raise error_from_rpc(
                _failure(error), call=name, target=self.options.target, timeout=seconds
            ) from None

    def blocking(self, work: Callable[[], T]) -> T:
        """Return what blocking work comes to."""
        return work()

    def health(self, service: str, timeout: float | None = None) -> str:
        """Return what grpc.health.v1 says of a service."""
        check = self.channel.unary_unary(
            _health.METHOD,
            request_serializer=_health.encode_request,
            response_deserializer=_health.decode_response,
        )
        seconds = timeout or self.options.timeout
        try:
            return check(service, timeout=seconds)
        except grpc.RpcError as error:
            raise error_from_rpc(
                _failure(error), call="Check", target=self.options.target, timeout=seconds
            ) from None

    def pause(self, seconds: float) -> None:
        """Return after ``seconds``, or when the client is closed."""
        self._closed.wait(seconds)

    def close(self) -> None:
        """Close the channel and end every call on it."""
        self._closed.set()
        if "channel" in self.__dict__:
            self.channel.close()


def _failure(error: grpc.RpcError) -> RpcFailure:
    """Return the call that an error of grpc is: every one that a call raises is both."""
    return cast("RpcFailure", error)
