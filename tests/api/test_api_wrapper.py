"""The handler wrapper: each of its rules with handlers that misbehave, on a real socket."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import pytest
import structlog

from modelhost.v1 import host_service_pb2, operation_service_pb2, operations_pb2
from modelhostd.api.admission import Admission, AdmissionLimits, Group
from modelhostd.api.calls import USER_RIGHTS, Call
from modelhostd.api.errors import unimplemented
from modelhostd.api.methods import Service, snake
from modelhostd.api.unimplemented import UNIMPLEMENTED_METHODS
from modelhostd.core.errors import ModelhostError, Reason
from tests.api.serving import Serving, serving
from tests.api.support import CALL_S, failure, failure_of
from tests.support import wait_until_async

GET = "/modelhost.v1.OperationService/GetOperation"
WATCH = "/modelhost.v1.OperationService/WatchOperation"
IMPORT = "/modelhost.v1.HostService/ImportRegistry"

DESCRIPTOR = operation_service_pb2.DESCRIPTOR.services_by_name["OperationService"]


class Servicer:
    """An OperationService whose GetOperation and WatchOperation are the test's."""

    def __init__(self, get: Callable[..., Any] | None = None, watch: Any = None) -> None:
        for method in DESCRIPTOR.methods:
            setattr(self, snake(method.name), self.nothing)
        if get is not None:
            self.get_operation = get
        if watch is not None:
            self.watch_operation = watch

    async def nothing(self, request: Any, call: Call) -> operations_pb2.Operation:
        return operations_pb2.Operation(name=request.name)


def one(get: Any = None, watch: Any = None, **service: Any) -> list[Service]:
    return [Service(DESCRIPTOR, Servicer(get, watch), **service)]


def get(scene: Serving, data: bytes = b"", **options: Any) -> Any:
    return scene.channel().unary_unary(GET)(data, timeout=CALL_S, **options)


def watch(scene: Serving, *options: tuple[str, int]) -> Any:
    return scene.channel(*options).unary_stream(WATCH)(b"", timeout=CALL_S)


# --- what becomes of exceptions ------------------------------------------------------------------


async def test_a_stray_cancellation_becomes_unavailable() -> None:
    """A handler that is cancelled by a future of its own answers WORKER_LOST with a RetryInfo."""

    async def stray(request: Any, call: Call) -> Any:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        future.cancel()
        await future

    async with serving(one(stray)) as scene:
        found = await failure(get(scene))
    assert (found.code, found.reason) == (grpc.StatusCode.UNAVAILABLE, "WORKER_LOST")
    assert "RetryInfo" in found.details


async def test_a_genuine_cancellation_goes_through_the_handler() -> None:
    """When the client goes away the handler is cancelled, and nothing of the call is left."""
    reached, cancelled = asyncio.Event(), asyncio.Event()

    async def hang(request: Any, call: Call) -> Any:
        reached.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.set()
            raise

    async with serving(one(hang)) as scene:
        call = get(scene)
        task = asyncio.ensure_future(_status(call))
        await reached.wait()
        call.cancel()
        async with asyncio.timeout(CALL_S):
            await cancelled.wait()
            assert await scene.calls.wait_idle(CALL_S)
            await task


async def _status(call: Any) -> None:
    try:
        await call
    except (grpc.aio.AioRpcError, asyncio.CancelledError):
        return


async def test_an_unexpected_exception_is_told_by_an_opaque_id_only() -> None:
    """INTERNAL carries a fixed text and an id; class, text and stack stand in the log under that id."""

    async def broken(request: Any, call: Call) -> Any:
        raise KeyError("/secret/path of a token")

    async with serving(one(broken)) as scene:
        with structlog.testing.capture_logs() as logs:
            found = await failure(get(scene))
    assert (found.code, found.reason) == (grpc.StatusCode.INTERNAL, "INTERNAL")
    assert "secret" not in found.message
    assert "KeyError" not in found.message
    entry = next(e for e in logs if e.get("error_id") == found.metadata["errorId"])
    assert "secret" in str(entry["exc_info"])


async def test_a_timeout_that_a_handler_lets_out_is_a_bug() -> None:
    """A TimeoutError that is not the wrapper's own limit is INTERNAL, not DEADLINE_EXCEEDED."""

    async def late(request: Any, call: Call) -> Any:
        raise TimeoutError

    async with serving(one(late)) as scene:
        assert (await failure(get(scene))).reason == "INTERNAL"


async def test_a_method_ends_at_its_own_limit() -> None:
    """A control method that does not end is ended, with the limit in the text."""

    async def hang(request: Any, call: Call) -> Any:
        await asyncio.Event().wait()

    async with serving(one(hang, timeouts={"GetOperation": 0.05})) as scene:
        found = await failure(get(scene))
    assert found.reason == "DEADLINE_EXCEEDED"
    assert "0.05 s" in found.message


async def test_a_typed_error_keeps_all_that_it_carries() -> None:
    """Reason, metadata, RetryInfo and text arrive as they were raised."""

    async def full(request: Any, call: Call) -> Any:
        raise ModelhostError(
            Reason.QUEUE_FULL, "the queue is full; wait", {"queue": "3", "limit": "3"}, 1.5
        )

    async with serving(one(full)) as scene:
        found = await failure(get(scene))
    assert found.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert (found.message, found.metadata) == (
        "the queue is full; wait",
        {"queue": "3", "limit": "3"},
    )
    assert found.details["RetryInfo"].retry_delay.ToMilliseconds() == 1500


async def test_an_error_of_any_size_arrives() -> None:
    """A text beyond what trailers may hold, in any script, still arrives with its reason."""

    async def long(request: Any, call: Call) -> Any:
        raise ModelhostError(
            Reason.MODEL_BLOCKED, "模型" * 20_000, {"stderr": "é" * 50_000, "model": "m"}
        )

    async with serving(one(long)) as scene:
        found = await failure(get(scene))
    assert found.reason == "MODEL_BLOCKED"
    assert found.message.endswith("...")


# --- what is checked before a handler runs ------------------------------------------------------


async def test_a_message_is_measured_before_it_is_parsed() -> None:
    """A control message above 256 KiB is MESSAGE_TOO_LARGE with both numbers, and no handler runs."""
    ran: list[Any] = []

    async def seen(request: Any, call: Call) -> Any:
        ran.append(request)
        return operations_pb2.Operation()

    async with serving(one(seen)) as scene:
        found = await failure(get(scene, b"\x0a" * 262_145))
        assert found.reason == "MESSAGE_TOO_LARGE"
        assert found.metadata == {"limitBytes": "262144", "actualBytes": "262145"}
        assert (await failure(get(scene, b"\xff"))).reason == "INVALID_ARGUMENT"
        assert not ran


async def test_a_right_that_the_listener_lacks_is_refused() -> None:
    """A caller without the method's right gets PERMISSION_DENIED with method and right."""
    ran: list[Any] = []

    async def seen(request: Any, call: Call) -> Any:
        ran.append(request)
        return operations_pb2.Operation()

    async with serving(one(seen, rights={"GetOperation": 4})) as scene:
        scene.wrapper._caller = type(scene.wrapper._caller)("uds:user", USER_RIGHTS)
        found = await failure(get(scene))
    assert found.code is grpc.StatusCode.PERMISSION_DENIED
    assert found.metadata == {"method": "GetOperation", "right": "OPERATE"}
    assert not ran


async def test_an_unknown_method_is_told_in_type() -> None:
    """A method, or a service, that does not exist is UNIMPLEMENTED with details."""
    async with serving(one()) as scene:
        for path in ("/modelhost.v1.OperationService/No", "/no.Service/No"):
            call = scene.channel().unary_unary(path)(b"", timeout=CALL_S)
            found = await failure(call)
            assert (found.reason, found.metadata["method"]) == ("UNIMPLEMENTED", path)


@pytest.mark.parametrize(
    ("sent", "kept"),
    [("trace-1", True), ("", False), ("a b", False), ("x" * 129, False)],
    ids=["good", "empty", "space", "long"],
)
async def test_the_request_id_comes_back(sent: str, kept: bool) -> None:
    """A caller's x-request-id is echoed on success and error; one that could spoil a log is replaced."""

    async def get_it(request: Any, call: Call) -> Any:
        if request.name:
            raise unimplemented(call.method)
        return operations_pb2.Operation(name=call.request_id)

    async with serving(one(get_it)) as scene:
        metadata = (("x-request-id", sent),) if sent else ()
        call = get(scene, metadata=metadata)
        made = operations_pb2.Operation.FromString(await call).name
        trailers = dict(await call.trailing_metadata())
        assert trailers["x-request-id"] == made
        assert (made == sent) is kept
        assert made
        request = operation_service_pb2.GetOperationRequest(name="x").SerializeToString()
        found = await failure(get(scene, request, metadata=metadata))
        assert (found.request_id == sent) is kept
        assert found.request_id


async def test_an_inference_answer_has_no_request_id_that_nobody_asked_for() -> None:
    """Of an inference a caller's own x-request-id comes back, and each error has one."""

    async def get_it(request: Any, call: Call) -> Any:
        if request.name:
            raise unimplemented(call.method)
        return operations_pb2.Operation()

    async with serving(one(get_it, groups={"GetOperation": Group.INFERENCE})) as scene:
        for metadata in ((), (("x-request-id", "mine"),)):
            call = get(scene, metadata=metadata)
            await call
            assert tuple(await call.trailing_metadata()) == metadata
        request = operation_service_pb2.GetOperationRequest(name="x").SerializeToString()
        assert (await failure(get(scene, request))).request_id


# --- admission ----------------------------------------------------------------------------------


async def test_calls_beyond_the_limit_are_refused_at_once() -> None:
    """With all places taken by unary calls, one more is QUEUE_FULL with RetryInfo, and a stream is not."""
    gate, reached = asyncio.Event(), asyncio.Semaphore(0)

    async def hang(request: Any, call: Call) -> Any:
        reached.release()
        await gate.wait()
        return operations_pb2.Operation()

    async def stream(request: Any, call: Call) -> AsyncIterator[Any]:
        yield operations_pb2.Operation()

    async with serving(one(hang, stream)) as scene:
        scene.wrapper._admission.limits = AdmissionLimits(control=4, stream=4)
        calls = [get(scene) for _ in range(3)]
        for _ in calls:
            await reached.acquire()
        found = await failure(get(scene))
        assert (found.code, found.reason) == (
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "QUEUE_FULL",
        )
        assert found.metadata == {"queue": "3", "limit": "3"}
        assert "RetryInfo" in found.details
        assert [b"" async for _ in watch(scene)] == [b""]
        gate.set()
        for call in calls:
            await call
        await get(scene)


def test_one_method_leaves_places_for_the_others() -> None:
    """A method takes three quarters of its group at most; the group's limit holds for all of them."""
    admission = Admission(AdmissionLimits(control=4))
    for _ in range(3):
        admission.enter(Group.CONTROL, "/a")
    with pytest.raises(ModelhostError, match="limit 3"):
        admission.enter(Group.CONTROL, "/a")
    admission.enter(Group.CONTROL, "/b")
    with pytest.raises(ModelhostError, match="limit 4"):
        admission.enter(Group.CONTROL, "/c")
    admission.leave(Group.CONTROL, "/a")
    admission.enter(Group.CONTROL, "/c")
    admission.enter(Group.HEALTH, "/health")
    assert admission.count(Group.CONTROL) == 4


# --- streams ------------------------------------------------------------------------------------

SMALL_WINDOW = (("grpc.http2.lookahead_bytes", 65_535), ("grpc.http2.bdp_probe", 0))


async def test_a_stream_that_nobody_reads_holds_nothing() -> None:
    """A write that stays unread closes the generator and frees the place, while the call lives on."""
    closed = asyncio.Event()

    async def flood(request: Any, call: Call) -> AsyncIterator[bytes]:
        try:
            while True:
                yield b"x" * 16_384
        finally:
            closed.set()

    async with serving(one(watch=flood), stall_s=0.05) as scene:
        call = watch(scene, *SMALL_WINDOW)
        async with asyncio.timeout(CALL_S):
            await closed.wait()
            assert await scene.calls.wait_idle(CALL_S)
        assert scene.wrapper.stalled_count == 1
        assert scene.wrapper._admission.count(Group.STREAM) == 0
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async with asyncio.timeout(CALL_S):
                while True:
                    await call.read()
        assert failure_of(caught.value).reason == "DEADLINE_EXCEEDED"


async def test_an_error_on_an_unread_stream_frees_before_it_is_sent() -> None:
    """A stream that ends with an error while its window is full has given back its place already."""

    async def fail(request: Any, call: Call) -> AsyncIterator[bytes]:
        yield b"x" * 60_000
        raise ModelhostError(Reason.SEQUENCE_COMPACTED, "gone")

    async with serving(one(watch=fail)) as scene:
        call = watch(scene, *SMALL_WINDOW)
        await wait_until_async(lambda: scene.wrapper._admission.count(Group.STREAM) == 0)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in call:
                pass
        assert failure_of(caught.value).reason == "SEQUENCE_COMPACTED"


async def test_a_reader_that_goes_away_ends_the_generator() -> None:
    """When the client cancels a stream its generator's cleanup runs, whether it yields or waits."""
    for waits in (True, False):
        started, closed = asyncio.Event(), asyncio.Event()

        async def stream(
            request: Any,
            call: Call,
            waits: bool = waits,
            started: asyncio.Event = started,
            closed: asyncio.Event = closed,
        ) -> AsyncIterator[bytes]:
            try:
                yield b"first"
                started.set()
                while not waits:
                    yield b"x" * 16_384
                await asyncio.Event().wait()
            finally:
                closed.set()

        async with serving(one(watch=stream)) as scene:
            call = watch(scene, *SMALL_WINDOW)
            await call.read()
            await started.wait()
            call.cancel()
            async with asyncio.timeout(CALL_S):
                await closed.wait()
                assert await scene.calls.wait_idle(CALL_S)


async def test_a_clients_stream_is_checked_message_by_message() -> None:
    """Each message of a client's stream has the limit of one, and must parse."""
    descriptor = host_service_pb2.DESCRIPTOR.services_by_name["HostService"]

    class Hosts:
        async def import_registry(self, requests: Any, call: Call) -> Any:
            count = 0
            async for _ in requests:
                count += 1
            return host_service_pb2.ImportRegistryResponse(sequence=count)

        def __getattr__(self, name: str) -> Any:
            async def nothing(request: Any, call: Call) -> None:
                return None

            if name in {snake(m.rpartition("/")[2]) for m in UNIMPLEMENTED_METHODS}:
                raise AttributeError(name)
            return nothing

    async with serving([Service(descriptor, Hosts())]) as scene:
        call = scene.channel().stream_unary(IMPORT)
        answer = await call(iter([b"", b""]), timeout=CALL_S)
        assert host_service_pb2.ImportRegistryResponse.FromString(answer).sequence == 2
        large = await failure(call(iter([b"", b"\0" * 300_000]), timeout=CALL_S))
        assert large.reason == "MESSAGE_TOO_LARGE"
        broken = await failure(call(iter([b"\xff\xff"]), timeout=CALL_S))
        assert broken.reason == "INVALID_ARGUMENT"


# --- draining -----------------------------------------------------------------------------------


async def test_draining_refuses_what_comes_and_lets_finish_what_runs() -> None:
    """Once draining begins new calls are SHUTTING_DOWN, waits end, and a call under way is answered."""
    gate, reached = asyncio.Event(), asyncio.Event()

    async def hang(request: Any, call: Call) -> Any:
        if request.name == "wait":
            await call.or_shutdown(asyncio.Event().wait())
        reached.set()
        await gate.wait()
        return operations_pb2.Operation(name="done")

    async def stream(request: Any, call: Call) -> AsyncIterator[Any]:
        async def forever() -> AsyncIterator[bytes]:
            yield b"one"
            await asyncio.Event().wait()

        async for item in call.until_shutdown(forever()):
            yield item

    async with serving(one(hang, stream)) as scene:
        running = get(scene)
        name = operation_service_pb2.GetOperationRequest(name="wait").SerializeToString()
        waiting = asyncio.ensure_future(failure(get(scene, name)))
        streaming = watch(scene)
        assert await streaming.read() == b"one"
        await reached.wait()
        await wait_until_async(lambda: len(scene.calls) == 3)
        scene.calls.draining.set()
        assert (await waiting).reason == "SHUTTING_DOWN"
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await streaming.read()
        assert failure_of(caught.value).reason == "SHUTTING_DOWN"
        refused = await failure(get(scene))
        assert (refused.code, refused.reason) == (grpc.StatusCode.UNAVAILABLE, "SHUTTING_DOWN")
        assert "RetryInfo" in refused.details
        assert not await scene.calls.wait_idle(0)
        gate.set()
        assert operations_pb2.Operation.FromString(await running).name == "done"
        assert await scene.calls.wait_idle(CALL_S)


async def test_what_does_not_end_in_time_is_told() -> None:
    """A handler that is cut off when draining is over answers SHUTTING_DOWN, not silence."""
    reached = asyncio.Event()

    async def hang(request: Any, call: Call) -> Any:
        reached.set()
        await asyncio.Event().wait()

    async with serving(one(hang)) as scene:
        call = asyncio.ensure_future(failure(get(scene)))
        await reached.wait()
        scene.calls.draining.set()
        assert scene.calls.cancel_all() == [GET]
        assert (await call).reason == "SHUTTING_DOWN"
        assert await scene.calls.wait_idle(CALL_S)
