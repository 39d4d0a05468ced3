"""A daemon that answers as a test tells it, on a real socket, over real gRPC."""

import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent import futures
from typing import Any

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from google.rpc import code_pb2, error_details_pb2, status_pb2

from modelhost._retries import services
from tests.support import DEADLINE_S

Answer = Callable[[Any, grpc.ServicerContext], Any]

LIMITS = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.http2.min_ping_interval_without_data_ms", 1_000),
]


class Double:
    """Answers each method by what was given to ``on``; what was not is UNIMPLEMENTED.

    An answer is a message, or a callable of request and context that returns one, or yields some for
    a stream. ``calls`` has the method and the request of each call in order, ``metadata`` its headers.
    A client's stream is read whole before, but that of the methods in ``streamed``.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        self.answers: dict[str, Answer] = {}
        self.calls: list[tuple[str, Any]] = []
        self.metadata: list[dict[str, str | bytes]] = []
        self.streamed: set[str] = set()
        self._server: grpc.Server | None = None

    @property
    def target(self) -> str:
        return self.address

    def on(self, method: str, *answers: Message | Answer | Exception | list[Message]) -> None:
        """Answer ``method`` by each of ``answers`` in turn, and by the last from then on."""
        left = list(answers)
        lock = threading.Lock()

        def next_answer(request: Any, context: grpc.ServicerContext) -> Any:
            with lock:
                answer = left.pop(0) if len(left) > 1 else left[0]
            return answer(request, context) if callable(answer) else answer

        self.answers[method] = next_answer

    def requests(self, method: str) -> list[Any]:
        """Return the requests of one method so far."""
        return [request for name, request in self.calls if name == method]

    def start(self) -> "Double":
        server = grpc.server(futures.ThreadPoolExecutor(max_workers=16), options=LIMITS)
        for service in services():
            handlers = {m.name: self._handler(m) for m in service.methods}
            server.add_generic_rpc_handlers(
                (grpc.method_handlers_generic_handler(service.full_name, handlers),)
            )
        health = {"Check": grpc.unary_unary_rpc_method_handler(self._health)}
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler("grpc.health.v1.Health", health),)
        )
        port = server.add_insecure_port(self.address)
        if self.address.endswith(":0"):
            self.address = self.address[:-1] + str(port)
        server.start()
        self._server = server
        return self

    def stop(self) -> None:
        """End at once, every call with it; its answers stay, for another ``start``."""
        if self._server is not None:
            self._server.stop(None).wait()
            self._server = None

    def _handler(self, method: Any) -> grpc.RpcMethodHandler:
        kind = ("stream" if method.client_streaming else "unary") + (
            "_stream" if method.server_streaming else "_unary"
        )
        return getattr(grpc, f"{kind}_rpc_method_handler")(
            self._stream(method) if method.server_streaming else self._unary(method),
            request_deserializer=GetMessageClass(method.input_type).FromString,
            response_serializer=GetMessageClass(method.output_type).SerializeToString,
        )

    def _unary(self, method: Any) -> Answer:
        def answer(request: Any, context: grpc.ServicerContext) -> Any:
            return self._answer(method, request, context)

        return answer

    def _stream(self, method: Any) -> Callable[..., Iterator[Any]]:
        def answer(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
            yield from self._answer(method, request, context)

        return answer

    def _answer(self, method: Any, request: Any, context: grpc.ServicerContext) -> Any:
        if method.client_streaming and method.name not in self.streamed:
            request = list(request)
        self.calls.append((method.name, request))
        self.metadata.append(dict(context.invocation_metadata()))
        answer = self.answers.get(method.name)
        if answer is None:
            context.abort(grpc.StatusCode.UNIMPLEMENTED, f"{method.name} is not told an answer")
        return answer(request, context)

    def _health(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        self.calls.append(("Check", request))
        return b"\x08\x01"


def failure(
    code: grpc.StatusCode,
    reason: str = "",
    message: str = "it failed",
    metadata: Mapping[str, str] | None = None,
    *,
    retry_delay: float | None = None,
    request_id: str = "",
    domain: str = "modelhost",
) -> Answer:
    """Return an answer that fails; without a reason it is a bare status, as grpc makes them."""
    status = status_pb2.Status(code=getattr(code_pb2, code.name), message=message)
    if reason:
        info = error_details_pb2.ErrorInfo(reason=reason, domain=domain, metadata=metadata or {})
        status.details.add().Pack(info)
    if retry_delay is not None:
        delay = Duration(nanos=round(retry_delay % 1 * 1e9), seconds=int(retry_delay))
        status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=delay))
    trailing: list[tuple[str, str | bytes]] = []
    if status.details:
        trailing.append(("grpc-status-details-bin", status.SerializeToString()))
    if request_id:
        trailing.append(("x-request-id", request_id))

    def answer(request: Any, context: grpc.ServicerContext) -> Any:
        context.set_trailing_metadata(tuple(trailing))
        context.abort(code, message)

    return answer


def hold(request: Any, context: grpc.ServicerContext) -> Any:
    """Answer nothing until the caller is gone or the daemon stops."""
    ended = threading.Event()
    if context.add_callback(ended.set):
        ended.wait(DEADLINE_S)
    return context.abort(grpc.StatusCode.CANCELLED, "nobody waits")
