"""How calls over a real socket are counted: each once, with the code that it ended with."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import grpc

from bench.raw_connection import RawConnection
from bench.raw_connection import request as raw_request
from modelhost.v1 import operation_service_pb2, operations_pb2
from modelhostd.api.calls import Call
from modelhostd.api.methods import Service, snake
from modelhostd.core.errors import Code, ModelhostError, Reason
from modelhostd.core.rpc_stats import RpcStats
from modelhostd.gateway.metrics import rpc
from tests.api.serving import Serving, serving
from tests.gateway.support import DEADLINE_S, value
from tests.support import wait_until_async

GET = "/modelhost.v1.OperationService/GetOperation"
WATCH = "/modelhost.v1.OperationService/WatchOperation"
DESCRIPTOR = operation_service_pb2.DESCRIPTOR.services_by_name["OperationService"]


class Servicer:
    """GetOperation and WatchOperation do what the operation's name says."""

    def __init__(self) -> None:
        for method in DESCRIPTOR.methods:
            setattr(self, snake(method.name), self.get_operation)
        self.watch_operation = self._watch
        self.reached = asyncio.Event()

    async def get_operation(self, request: Any, call: Call) -> operations_pb2.Operation:
        await self._do(request.name)
        return operations_pb2.Operation(name=request.name)

    async def _watch(self, request: Any, call: Call) -> AsyncIterator[operations_pb2.Operation]:
        yield operations_pb2.Operation()
        await self._do(request.name)

    async def _do(self, what: str) -> None:
        if what == "refuse":
            raise ModelhostError(Reason.QUEUE_FULL, "the queue is full")
        if what == "break":
            raise ZeroDivisionError
        if what == "hang":
            self.reached.set()
            await asyncio.Event().wait()


def request(what: str) -> bytes:
    return operation_service_pb2.GetOperationRequest(name=what).SerializeToString()


def stats_of(scene: Serving) -> RpcStats:
    return scene.wrapper.stats


async def code_of(call: Any) -> grpc.StatusCode:
    """Return how a call ended for its client."""
    async with asyncio.timeout(DEADLINE_S):
        if isinstance(call, grpc.aio.UnaryStreamCall):
            with contextlib.suppress(grpc.aio.AioRpcError):
                async for _ in call:
                    pass
        return await call.code()


async def counted(scene: Serving, path: str, *codes: int) -> None:
    """Wait until the calls of a method are counted out with exactly these codes."""
    wanted = {code: codes.count(code) for code in codes}
    counts = stats_of(scene).method(path, "")
    await wait_until_async(lambda: counts.handled == wanted, what=f"{wanted} at {path}")
    assert counts.started == counts.seconds.count == len(codes)


def handled(text: str) -> float | None:
    """Return how many calls of methods that nobody offers have ended."""
    return value(text, "grpc_server_handled_total", grpc_service="_unknown")


async def test_each_outcome_has_its_code() -> None:
    """An answer, a typed refusal and a bug are OK, their own code and INTERNAL."""
    async with serving([Service(DESCRIPTOR, Servicer())]) as scene:
        for path, kind in ((GET, "unary_unary"), (WATCH, "unary_stream")):
            channel = scene.channel()
            for what in ("", "refuse", "break"):
                await code_of(getattr(channel, kind)(path)(request(what)))
            await counted(scene, path, 0, Code.RESOURCE_EXHAUSTED, Code.INTERNAL)


async def test_a_call_under_way_is_started_only() -> None:
    """Started less handled is what is under way; the client's cancellation ends it as CANCELLED."""
    servicer = Servicer()
    async with serving([Service(DESCRIPTOR, servicer)]) as scene:
        call = scene.channel().unary_unary(GET)(request("hang"))
        await servicer.reached.wait()
        counts = stats_of(scene).method(GET, "")
        assert (counts.started, counts.handled) == (1, {})
        call.cancel()
        await counted(scene, GET, Code.CANCELLED)


async def test_the_end_of_a_deadline_is_no_cancellation() -> None:
    """What the caller had no more time for is DEADLINE_EXCEEDED, unary or stream."""
    async with serving([Service(DESCRIPTOR, Servicer())]) as scene:
        # Whose clock is a little before the server's cancels the call before that sees its deadline: this one
        # says what time it has, and no more.
        with RawConnection(scene.target).begin() as connection:
            for path in (GET, WATCH):
                stream = connection.next_stream()
                connection.send(raw_request(stream, path, request("hang"), grpc_timeout="1000m"))
            await counted(scene, GET, Code.DEADLINE_EXCEEDED)
            await counted(scene, WATCH, Code.DEADLINE_EXCEEDED)


async def test_a_refused_call_is_counted_too() -> None:
    """What admission, the size limit or draining refuses has come in and ended."""
    async with serving([Service(DESCRIPTOR, Servicer(), limits={"GetOperation": 8})]) as scene:
        channel = scene.channel()
        await code_of(channel.unary_unary(GET)(request("x" * 100)))
        scene.calls.draining.set()
        await code_of(channel.unary_unary(GET)(request("")))
        await counted(scene, GET, Code.RESOURCE_EXHAUSTED, Code.UNAVAILABLE)


async def test_callers_cannot_make_labels() -> None:
    """Methods that nobody offers are one series, whatever they are called."""
    async with serving([Service(DESCRIPTOR, Servicer())]) as scene:
        channel = scene.channel()
        for i in range(5):
            await code_of(channel.unary_unary(f"/evil.Service{i}/Method{i}")(b""))
        # A client may have its answer before the call is counted out.
        await wait_until_async(lambda: handled("".join(rpc(stats_of(scene)))) == 5)
        text = "".join(rpc(stats_of(scene)))
    assert "evil" not in text
    assert handled(text) == 5
    assert value(text, "grpc_server_handled_total", grpc_code="Unimplemented") == 5


async def test_the_names_are_go_grpcs() -> None:
    """Type, service, method and code stand in the labels that boards ask for."""
    async with serving([Service(DESCRIPTOR, Servicer())]) as scene:
        await code_of(scene.channel().unary_unary(GET)(request("refuse")))
        await code_of(scene.channel().unary_stream(WATCH)(request("")))
        await counted(scene, GET, Code.RESOURCE_EXHAUSTED)
        await counted(scene, WATCH, 0)
        text = "".join(rpc(stats_of(scene)))
    service = "modelhost.v1.OperationService"
    labels = {"grpc_service": service, "grpc_method": "GetOperation", "grpc_type": "unary"}
    assert value(text, "grpc_server_started_total", **labels) == 1
    assert value(text, "grpc_server_handled_total", grpc_code="ResourceExhausted", **labels) == 1
    assert value(text, "grpc_server_handling_seconds_count", **labels) == 1
    assert value(text, "grpc_server_handling_seconds_bucket", le="+Inf", **labels) == 1
    assert value(text, "grpc_server_handled_total", grpc_type="server_stream", grpc_code="OK") == 1
