"""The servers: where they listen and for whom, health, reflection, and an end that always comes."""

import asyncio
import os
import socket
import stat
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from modelhost.v1 import (
    event_service_pb2,
    host_pb2,
    host_service_pb2,
    model_service_pb2,
    operation_service_pb2,
    options_pb2,
    residency_service_pb2,
)
from modelhostd.api.listeners import listeners
from modelhostd.api.server import ApiConfig, build
from modelhostd.api.unimplemented import UNIMPLEMENTED_METHODS
from modelhostd.core.errors import ModelhostError
from tests.api.support import CALL_S, Limits, Served, Tcp, Unix, failure, failure_of, served
from tests.support import wait_until_async

PINNED = residency_service_pb2.PinModelRequest(name="models/minilm")


# --- who may do what, by where the call comes in --------------------------------------------------


async def test_the_socket_says_who_calls(tmp_path: Path) -> None:
    """Each listener has its principal and its rights: OPERATE is the admin socket's alone."""
    async with served(tmp_path, loopback_is_operator=False) as it:
        await it.add()
        for stubs in (it.tcp, it.user):
            found = await failure(stubs.residency.PinModel(PINNED))
            assert found.code is grpc.StatusCode.PERMISSION_DENIED
            assert found.metadata == {"method": "PinModel", "right": "OPERATE"}
            assert "admin socket" in found.message
        assert not it.host.models.get("minilm").pinned
        assert (await it.admin.residency.PinModel(PINNED, timeout=CALL_S)).pinned
        seen = [
            (await s.host.GetHost(host_service_pb2.GetHostRequest(), timeout=CALL_S)).principal
            for s in (it.tcp, it.user, it.admin)
        ]
        assert seen == [f"tcp:{it.server.addresses[0]}", "uds:user", "uds:admin"]


async def test_loopback_may_be_an_operator(tmp_path: Path) -> None:
    """With loopback_is_operator the port grants OPERATE, and the users' socket still does not."""
    async with served(tmp_path, loopback_is_operator=True) as it:
        await it.add()
        assert (await it.tcp.residency.PinModel(PINNED, timeout=CALL_S)).pinned
        assert (await failure(it.user.residency.PinModel(PINNED))).reason == "PERMISSION_DENIED"


async def test_a_field_can_need_a_right_of_its_own(tmp_path: Path) -> None:
    """allow_unsafe needs OPERATE where the method needs MANAGE, and is refused before any effect."""
    async with served(tmp_path) as it:
        await it.add()
        request = model_service_pb2.DownloadModelRequest(name="models/minilm", allow_unsafe=True)
        found = await failure(it.user.models.DownloadModel(request))
        assert (found.reason, found.metadata["right"]) == ("PERMISSION_DENIED", "OPERATE")
        assert not it.host.operations.list()
        await it.admin.models.DownloadModel(request, timeout=CALL_S)
        assert it.host.models.get("minilm").artifacts[-1].allow_unsafe


async def test_the_sockets_have_their_modes(tmp_path: Path) -> None:
    """The users' socket is for its group, the admin's for its owner."""
    async with served(tmp_path):
        modes = {
            name: stat.S_IMODE(os.lstat(tmp_path / name).st_mode)
            for name in ("modelhost.sock", "admin.sock")
        }
    assert modes == {"modelhost.sock": 0o660, "admin.sock": 0o600}
    assert not _sockets(tmp_path)


def _sockets(folder: Path) -> list[Path]:
    return list(folder.glob("*.sock"))


# --- addresses that cannot be had -----------------------------------------------------------------


def _config(tmp_path: Path, *addresses: Any, admin: Path | None = None) -> ApiConfig:
    return ApiConfig(
        addresses=addresses, admin_socket=admin, limits=Limits(), home=tmp_path, version="1"
    )


async def _refused(it: Served, config: ApiConfig) -> ModelhostError:
    server = build(it.host, config)
    with pytest.raises(ModelhostError) as caught:
        await server.start()
    assert caught.value.reason == "WRONG_STATE"
    assert "choose another address" in caught.value.message
    assert not server.addresses
    return caught.value


async def test_a_port_in_use_is_told_and_left_alone(tmp_path: Path) -> None:
    """A second server on a taken port is refused by name, keeps nothing bound, and hurts nobody."""
    async with served(tmp_path) as it:
        port = int(it.server.addresses[0].rpartition(":")[2])
        free = tmp_path / "free.sock"
        error = await _refused(it, _config(tmp_path, Unix(free), Tcp(port=port)))
        assert error.metadata["name"] == f"127.0.0.1:{port}"
        assert not free.exists()
        await it.tcp.host.GetHost(host_service_pb2.GetHostRequest(), timeout=CALL_S)


async def test_a_living_socket_is_not_stolen(tmp_path: Path) -> None:
    """A unix socket that somebody answers on is left to them."""
    async with served(tmp_path) as it:
        await _refused(it, _config(tmp_path, Unix(tmp_path / "modelhost.sock")))
        await it.user.host.GetHost(host_service_pb2.GetHostRequest(), timeout=CALL_S)


async def test_a_dead_socket_is_replaced_and_a_file_is_not(tmp_path: Path) -> None:
    """What a dead process left is removed; anything else at the path is an error that names it."""
    dead, file, far = tmp_path / "dead.sock", tmp_path / "file.sock", tmp_path / ("x" * 108)
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(dead))
    file.write_text("mine")
    async with served(tmp_path) as it:
        server = build(it.host, _config(tmp_path, Unix(dead)))
        await server.start()
        stubs = await it.connect(f"unix:{dead}")
        await stubs.host.GetHost(host_service_pb2.GetHostRequest(), timeout=CALL_S)
        await server.stop(0.0)
        assert "not a socket" in (await _refused(it, _config(tmp_path, Unix(file)))).message
        assert "107 bytes" in (await _refused(it, _config(tmp_path, Unix(far)))).message
    assert file.read_text() == "mine"


@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.1", "::", "example.org", ""])
def test_nothing_beyond_loopback_is_bound(host: str) -> None:
    """Without TLS and authentication any other address is refused before anything is bound."""
    with pytest.raises(ModelhostError, match="loopback") as caught:
        listeners([Tcp(host=host, port=7411)], None, 0o660, True)
    assert caught.value.reason == "WRONG_STATE"


def test_every_loopback_address_will_do() -> None:
    """127.0.0.0/8, ::1 and localhost are loopback."""
    addresses = [Tcp(host=h, port=1) for h in ("127.0.0.1", "127.1.2.3", "::1", "localhost")]
    found = listeners(addresses, None, 0o660, True)
    assert [one.address for one in found] == [
        "127.0.0.1:1",
        "127.1.2.3:1",
        "[::1]:1",
        "127.0.0.1:1",
    ]


# --- the contract as a whole ----------------------------------------------------------------------

FILES = (
    model_service_pb2,
    residency_service_pb2,
    operation_service_pb2,
    event_service_pb2,
    host_service_pb2,
)
METHODS = [
    method
    for file in FILES
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_every_method_states_its_right(method: Any) -> None:
    """A method without a right would be refused to everyone."""
    assert method.GetOptions().Extensions[options_pb2.right] in options_pb2.Right.values()[1:]


async def test_what_is_not_implemented_says_so(tmp_path: Path) -> None:
    """Every method of the table answers UNIMPLEMENTED with details, and every other one is served."""
    async with served(tmp_path) as it:
        for method in METHODS:
            name = f"{method.containing_service.full_name}/{method.name}"
            assert any(s.name == method.containing_service.full_name for s in it.server.services)
            if name not in UNIMPLEMENTED_METHODS:
                continue
            kind = {
                (False, False): it.admin.channel.unary_unary,
                (True, False): it.admin.channel.stream_unary,
                (False, True): it.admin.channel.unary_stream,
            }[method.client_streaming, method.server_streaming]
            call = kind("/" + name)(iter([b""]) if method.client_streaming else b"")
            if method.server_streaming:
                call = _first(call)
            found = await failure(call)
            assert (found.reason, found.metadata) == ("UNIMPLEMENTED", {"method": method.name})
            assert "README" in found.message


async def _first(call: Any) -> Any:
    async for message in call:
        return message
    return None


# --- health ---------------------------------------------------------------------------------------


def _health(stubs: Any) -> Any:
    return health_pb2_grpc.HealthStub(stubs.channel)


def _asked(name: str) -> Any:
    return health_pb2.HealthCheckRequest(service=name)


async def test_health_of_the_daemon_its_services_and_its_models(tmp_path: Path) -> None:
    """The daemon and each service serve; a model serves when a request for it would be served now."""
    async with served(tmp_path) as it:
        health = _health(it.user)
        for name in ("", "modelhost.v1.ModelService", "inference.GRPCInferenceService"):
            answer = await health.Check(_asked(name), timeout=CALL_S)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING, name
        found = await failure(health.Check(_asked("model/minilm")))
        assert found.code is grpc.StatusCode.NOT_FOUND
        await it.add()
        answer = await health.Check(_asked("model/minilm"), timeout=CALL_S)
        assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert (await failure(health.Check(_asked("no.Service")))).code is (
            grpc.StatusCode.NOT_FOUND
        )


async def test_a_watcher_of_health_sees_each_change(tmp_path: Path) -> None:
    """A watch of a model tells unknown, not serving, serving; a stop tells NOT_SERVING, then ends."""
    status = health_pb2.HealthCheckResponse
    async with served(tmp_path) as it:
        watch = _health(it.user).Watch(_asked("model/minilm"), timeout=CALL_S)
        assert (await watch.read()).status == status.SERVICE_UNKNOWN
        await it.add()
        assert (await watch.read()).status == status.NOT_SERVING
        await it.have("other")
        request = model_service_pb2.DownloadModelRequest(name="models/minilm")
        await it.end(await it.tcp.models.DownloadModel(request, timeout=CALL_S))
        assert (await watch.read()).status == status.SERVING
        stopping = asyncio.ensure_future(it.server.stop(CALL_S))
        assert (await watch.read()).status == status.NOT_SERVING
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await watch.read()
        assert failure_of(caught.value).reason == "SHUTTING_DOWN"
        await stopping


async def test_a_watcher_that_never_reads_stops_nobody(tmp_path: Path) -> None:
    """Health can be changed and asked, and the server stopped, beside watchers that never read."""
    options = [("grpc.http2.lookahead_bytes", 0), ("grpc.http2.bdp_probe", 0)]
    async with served(tmp_path) as it:
        stubs = await it.connect(it.server.addresses[0], options)
        watches = [_health(stubs).Watch(_asked("")) for _ in range(8)]
        await wait_until_async(lambda: len(it.server.calls) >= len(watches))
        for serving in [False, True] * 500:
            it.server.health.set_serving(serving)
            await asyncio.sleep(0)
        answer = await _health(it.user).Check(_asked(""), timeout=CALL_S)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        async with asyncio.timeout(CALL_S):
            await it.server.stop(0.0)
        for watch in watches:
            watch.cancel()


# --- reflection -----------------------------------------------------------------------------------


async def test_reflection_tells_both_pools(tmp_path: Path) -> None:
    """A client without protos finds the services, ours and inference's, and their types."""
    async with served(tmp_path) as it:
        call = reflection_pb2_grpc.ServerReflectionStub(it.admin.channel).ServerReflectionInfo
        asked = [
            reflection_pb2.ServerReflectionRequest(list_services=""),
            *(
                reflection_pb2.ServerReflectionRequest(file_containing_symbol=symbol)
                for symbol in (
                    "modelhost.v1.ModelService",
                    "inference.GRPCInferenceService",
                    "google.rpc.ErrorInfo",
                )
            ),
        ]
        answers = [a async for a in call(iter(asked), timeout=CALL_S)]
        names = {s.name for s in answers[0].list_services_response.service}
        assert {
            "modelhost.v1.HostService",
            "inference.GRPCInferenceService",
            "grpc.health.v1.Health",
            "grpc.reflection.v1.ServerReflection",
        } <= names
        assert all(a.file_descriptor_response.file_descriptor_proto for a in answers[1:])
        newer = it.admin.channel.stream_stream(
            "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"
        )
        raw = [r async for r in newer(iter([asked[0].SerializeToString()]), timeout=CALL_S)]
        assert reflection_pb2.ServerReflectionResponse.FromString(raw[0]) == answers[0]


async def test_the_users_socket_has_no_reflection(tmp_path: Path) -> None:
    """Reflection is on the admin socket and the loopback port only."""
    async with served(tmp_path) as it:
        path = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
        # Without a message: one on its way would hide what it is refused with (client, own_status).
        call = it.user.channel.stream_stream(path)(timeout=CALL_S)
        assert (await failure(call.read())).reason == "UNIMPLEMENTED"
        tcp = it.tcp.channel.stream_stream(path)(iter([b"\x3a\x00"]), timeout=CALL_S)
        assert await _first(tcp)


# --- stopping -------------------------------------------------------------------------------------


async def test_a_stop_ends_beside_every_kind_of_client(tmp_path: Path) -> None:
    """Watches are told to come back, waits end, stalled streams hold nothing, and the sockets go."""
    async with served(tmp_path) as it:
        hold = it.running.world.downloads.hold("hf://org/minilm")
        await it.add()
        request = model_service_pb2.DownloadModelRequest(name="models/minilm")
        operation = await it.tcp.models.DownloadModel(request, timeout=CALL_S)
        await hold.reached.wait()
        watch = it.tcp.operations.WatchOperation(
            operation_service_pb2.WatchOperationRequest(name=operation.name)
        )
        await watch.read()
        wait = asyncio.ensure_future(
            failure(
                it.user.operations.WaitOperation(
                    operation_service_pb2.WaitOperationRequest(name=operation.name)
                )
            )
        )
        await wait_until_async(lambda: len(it.server.calls) == 2)
        async with asyncio.timeout(CALL_S):
            await it.server.stop(CALL_S)
        assert (await wait).reason == "SHUTTING_DOWN"
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            while True:
                await watch.read()
        assert failure_of(caught.value).reason == "SHUTTING_DOWN"
        assert not len(it.server.calls)
        assert not _sockets(tmp_path)
        found = await failure(it.tcp.host.GetHost(host_service_pb2.GetHostRequest()))
        assert found.code is grpc.StatusCode.UNAVAILABLE
        hold.release()


async def test_a_watcher_that_never_reads_does_not_use_up_the_grace(tmp_path: Path) -> None:
    """A stream stuck in a write is let go once those that read had their last word; the stop is clean."""
    options = [("grpc.http2.lookahead_bytes", 0), ("grpc.http2.bdp_probe", 0)]
    async with served(tmp_path) as it:
        for number in range(20):
            await it.add(f"m{number}")
        stubs = await it.connect(it.server.addresses[0], options)
        request = event_service_pb2.WatchEventsRequest(include_snapshot=True)
        watches = [stubs.events.WatchEvents(request) for _ in range(4)]
        await wait_until_async(lambda: len(it.server.calls.writing) == len(watches))
        loop = asyncio.get_running_loop()
        problems: list[Any] = []
        loop.set_exception_handler(lambda _, context: problems.append(context))
        # Far above the test's own timeout: waiting for the grace would be found.
        await it.server.stop(600.0)
        assert not len(it.server.calls)
        assert not problems
        for watch in watches:
            watch.cancel()


async def test_listeners_are_shown(tmp_path: Path) -> None:
    """GetHost lists every listener with its role."""
    async with served(tmp_path) as it:
        host = await it.tcp.host.GetHost(host_service_pb2.GetHostRequest(), timeout=CALL_S)
    roles = host_pb2.Host.Listener.Role
    assert [roles.Name(one.role) for one in host.listeners] == ["USER", "USER", "ADMIN"]
