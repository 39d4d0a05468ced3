"""A server on real sockets over a host of fakes, and the shortest ways to call it."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from modelhost._async.transport import own_status
from modelhost.v1 import (
    event_service_pb2_grpc,
    host_service_pb2_grpc,
    model_service_pb2,
    model_service_pb2_grpc,
    models_pb2,
    operation_service_pb2,
    operation_service_pb2_grpc,
    operations_pb2,
    residency_service_pb2,
    residency_service_pb2_grpc,
)
from modelhostd.api.errors import DETAILS_KEY
from modelhostd.api.server import ApiConfig, ApiServer, build
from tests.fakes.clock import FakeClock
from tests.host.support import Running, World

CALL_S = 60.0
CLIENT_OPTIONS = [
    ("grpc.enable_http_proxy", 0),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
]


@dataclass
class Tcp:
    host: str = "127.0.0.1"
    port: int = 0
    path: Path | None = None


@dataclass
class Unix:
    path: Path
    host: str = ""
    port: int = 0


@dataclass
class Limits:
    inference_message_bytes: int = 4 * 2**20
    control_message_bytes: int = 256 * 1024
    inference_bytes_in_flight: int = 16 * 2**20
    max_connections: int = 256
    max_concurrent_streams: int = 128
    max_unary_calls: int = 512
    max_inference_calls: int = 1024
    max_streams: int = 512


class Stubs:
    """A stub of each service on one channel, with a deadline on every call."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.channel = channel
        self.models = model_service_pb2_grpc.ModelServiceStub(channel)
        self.residency = residency_service_pb2_grpc.ResidencyServiceStub(channel)
        self.operations = operation_service_pb2_grpc.OperationServiceStub(channel)
        self.events = event_service_pb2_grpc.EventServiceStub(channel)
        self.host = host_service_pb2_grpc.HostServiceStub(channel)

    def raw(self, path: str) -> Callable[..., Any]:
        """Return a call of any unary method that sends and receives bytes."""
        return self.channel.unary_unary(path)


@dataclass
class Served:
    """A started server and everything behind it."""

    running: Running
    server: ApiServer
    tcp: Stubs
    user: Stubs
    admin: Stubs
    _stack: AsyncExitStack = field(default_factory=AsyncExitStack)

    @property
    def host(self) -> Any:
        """The host."""
        return self.running.host

    async def add(self, model: str = "minilm", size: int = 400) -> models_pb2.Model:
        """Put a source there and register a model of it over the wire."""
        content = {"config.json": b"{}", "model.safetensors": b"w" * (size - 2)}
        self.running.world.downloads.add(
            f"hf://org/{model}", content, task="feature-extraction", predicted_bytes=size
        )
        request = model_service_pb2.CreateModelRequest(model_id=model)
        request.model.source.uri = f"hf://org/{model}"
        return await self.tcp.models.CreateModel(request, timeout=CALL_S)

    async def have(self, model: str = "minilm", size: int = 400) -> models_pb2.Model:
        """Register a model and bring its files to disk."""
        await self.add(model, size)
        return await self.have_again(model)

    async def have_again(self, model: str = "minilm") -> models_pb2.Model:
        """Bring the files of a model that is registered to disk."""
        name = f"models/{model}"
        request = model_service_pb2.DownloadModelRequest(name=name)
        await self.end(await self.tcp.models.DownloadModel(request, timeout=CALL_S))
        return await self.tcp.models.GetModel(
            model_service_pb2.GetModelRequest(name=name), timeout=CALL_S
        )

    async def load(self, model: str = "minilm") -> operations_pb2.Operation:
        """Load a model that is on disk."""
        request = residency_service_pb2.LoadModelRequest(name=f"models/{model}")
        return await self.end(await self.tcp.residency.LoadModel(request, timeout=CALL_S))

    async def end(self, operation: operations_pb2.Operation) -> operations_pb2.Operation:
        """Return an operation once it has ended well."""
        request = operation_service_pb2.WaitOperationRequest(name=operation.name)
        done = await self.tcp.operations.WaitOperation(request, timeout=CALL_S)
        assert done.state == operations_pb2.Operation.SUCCEEDED, done
        return done

    async def connect(self, address: str, options: list[tuple[str, Any]] | None = None) -> Stubs:
        """Return stubs on a channel of their own, closed at the end."""
        channel = grpc.aio.insecure_channel(address, options=[*CLIENT_OPTIONS, *(options or [])])
        await self._stack.enter_async_context(channel)
        return Stubs(channel)


@asynccontextmanager
async def served(
    tmp_path: Path,
    *,
    limits: Limits | None = None,
    loopback_is_operator: bool = True,
    budget: int = 1000,
    devices: int = 1,
    **config: Any,
) -> AsyncIterator[Served]:
    """Serve a host of fakes on a free port and two unix sockets."""
    world = World(tmp_path, clock=FakeClock())
    async with AsyncExitStack() as stack:
        running = await stack.enter_async_context(world.host(budget=budget, devices=devices))
        server = build(
            running.host,
            ApiConfig(
                addresses=[Tcp(), Unix(tmp_path / "modelhost.sock")],
                admin_socket=tmp_path / "admin.sock",
                limits=limits or Limits(),
                loopback_is_operator=loopback_is_operator,
                home=tmp_path,
                version="1.2.3",
                **config,
            ),
        )
        await server.start()
        made = Served(running, server, None, None, None, stack)  # type: ignore[arg-type]
        made.tcp, made.user, made.admin = [await made.connect(a) for a in server.addresses]
        try:
            yield made
        finally:
            await server.stop(grace_s=1.0)


@dataclass
class Failure:
    """An error as a client sees it."""

    code: grpc.StatusCode
    message: str
    reason: str
    metadata: dict[str, str]
    details: dict[str, Message]
    request_id: str


async def failure(call: Any) -> Failure:
    """Return the error that a call ends with."""
    told = own_status(call) if isinstance(call, grpc.aio.Call) else None
    try:
        async with asyncio.timeout(CALL_S):
            answer = await call
    except grpc.aio.AioRpcError as error:
        return failure_of(told(error) if told else error)
    raise AssertionError(f"no error but {answer!r}")


def failure_of(error: grpc.aio.AioRpcError) -> Failure:
    """Return what an error carries."""
    trailers = dict(error.trailing_metadata() or ())
    status = status_pb2.Status.FromString(trailers.get(DETAILS_KEY, b""))
    details: dict[str, Message] = {}
    for packed in status.details:
        name = packed.TypeName().removeprefix("google.rpc.")
        detail = getattr(error_details_pb2, name)()
        packed.Unpack(detail)
        assert name not in details, f"{name} comes twice"
        details[name] = detail
    info = details.get("ErrorInfo", error_details_pb2.ErrorInfo())
    if details:
        assert info.domain == "modelhost"
        assert status.message == error.details()
        assert status.code == error.code().value[0]
    return Failure(
        error.code(),
        error.details() or "",
        info.reason,
        dict(info.metadata),
        details,
        str(trailers.get("x-request-id", "")),
    )
