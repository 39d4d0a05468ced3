"""Where a client connects to, and with which channel options."""

import socket
from pathlib import Path

import pytest

import modelhost
from modelhost import _options
from modelhost._options import Options, parse_target, resolve_target
from modelhost.v1 import host_pb2
from tests.client.double import Double

HOME = {"XDG_DATA_HOME": "/data"}
USER_SOCKET = "/data/modelhost/run/modelhost.sock"
USER_ADMIN = "/data/modelhost/run/admin.sock"
SERVICE_ADMIN = "/run/modelhost/admin.sock"


@pytest.mark.parametrize(
    ("given", "environment", "alive", "target"),
    [
        ("h:1", {"MODELHOST_TARGET": "e:2"}, {_options.SERVICE_SOCKET}, "h:1"),
        (None, {"MODELHOST_TARGET": "e:2"}, {_options.SERVICE_SOCKET}, "e:2"),
        (None, HOME, {_options.SERVICE_SOCKET, USER_SOCKET}, f"unix:{_options.SERVICE_SOCKET}"),
        (None, HOME, {USER_SOCKET}, f"unix:{USER_SOCKET}"),
        (None, HOME, set(), "127.0.0.1:7411"),
        ("", {"MODELHOST_TARGET": ""}, set(), "127.0.0.1:7411"),
        (None, {"MODELHOST_HOME": "/h"}, {"/h/run/modelhost.sock"}, "unix:/h/run/modelhost.sock"),
        (None, {"MODELHOST_HOME": "/" + "h" * 120}, {"never asked"}, "127.0.0.1:7411"),
    ],
    ids=["argument", "variable", "service", "user", "loopback", "empty", "home", "long home"],
)
def test_the_target_is_the_first_that_is_there(given, environment, alive, target) -> None:
    """Argument, MODELHOST_TARGET, the service's socket, the user's socket, loopback: in this order."""
    assert resolve_target(given, environment, alive.__contains__, {"never"}.__contains__) == target


@pytest.mark.parametrize(
    ("answer", "open_", "target"),
    [
        ({USER_SOCKET}, {USER_ADMIN}, USER_ADMIN),
        ({_options.SERVICE_SOCKET, USER_SOCKET}, {USER_ADMIN}, _options.SERVICE_SOCKET),
        ({_options.SERVICE_SOCKET}, {SERVICE_ADMIN, USER_ADMIN}, SERVICE_ADMIN),
    ],
    ids=["their own", "a user of the service", "the service's operator"],
)
def test_who_may_open_the_admin_socket_is_an_operator(answer, open_, target) -> None:
    """It is taken before the users' socket of the same daemon: who runs a daemon need not ask for it."""
    found = resolve_target(None, HOME, answer.__contains__, open_.__contains__)
    assert found == f"unix:{target}"


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("host:1", "host:1"),
        ("host", "host:7411"),
        ("[::1]:5", "[::1]:5"),
        ("[::1]", "[::1]:7411"),
        ("unix:/a/b", "unix:/a/b"),
        ("unix:///a/b", "unix:/a/b"),
        ("/a/b", "unix:/a/b"),
    ],
)
def test_targets_are_understood(text, target) -> None:
    """A host alone gets the default port; a path is a unix socket."""
    assert parse_target(text, "target") == target


@pytest.mark.parametrize(
    "text",
    [
        "http://h:1",
        "h:",
        "h:x",
        "h:0",
        "h:70000",
        ":1",
        "a b:1",
        "unix:",
        "unix://h/p",
        "::1",
        "unix:/" + "a" * 107,
        "h\n:1",
    ],
)
def test_what_is_no_target_is_refused(text) -> None:
    """A target that cannot be one is InvalidArgument that names the form, before any connection."""
    with pytest.raises(modelhost.InvalidArgument) as caught:
        modelhost.Client(text)
    assert caught.value.metadata["field"] == "target"


@pytest.mark.parametrize("name", ["timeout", "infer_timeout", "max_message_bytes"])
def test_limits_must_be_above_zero(name) -> None:
    """A deadline or a limit of nothing is refused."""
    with pytest.raises(modelhost.InvalidArgument) as caught:
        modelhost.AsyncClient("h:1", **{name: 0})
    assert caught.value.metadata["field"] == name


def test_a_socket_counts_only_while_someone_listens(tmp_path: Path) -> None:
    """The file that a killed daemon leaves behind is passed over."""
    path = str(tmp_path / "s.sock")
    assert not _options.socket_answers(path)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        assert _options.socket_answers(path)
        assert _options.socket_opens(path)
    assert not _options.socket_answers(path)
    assert not _options.socket_opens(path)
    assert not _options.socket_answers(__file__)


@pytest.mark.parametrize(
    ("target", "local"),
    [
        ("unix:/a", True),
        ("127.0.0.1:1", True),
        ("localhost:1", True),
        ("[::1]:1", True),
        ("gpu-box:1", False),
        ("10.0.0.1:1", False),
    ],
)
def test_no_proxy_for_this_machine(target, local) -> None:
    """Only for a target on another machine may grpc look at http_proxy."""
    options = dict(Options(target).channel_options("{}"))
    assert (options.get("grpc.enable_http_proxy") == 0) is local


@pytest.mark.parametrize("address", ["unix", "tcp"])
def test_a_proxy_in_the_environment_is_not_used(
    address, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With every proxy variable set, loopback and unix sockets are reached directly."""
    for name in ("http_proxy", "https_proxy", "grpc_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    double = Double(f"unix:{tmp_path}/p.sock" if address == "unix" else "127.0.0.1:0").start()
    double.on("GetHost", host_pb2.Host(version="1"))
    try:
        with modelhost.Client(double.target, retries=False) as client:
            assert client.host().version == "1"
    finally:
        double.stop()


def test_retries_can_be_switched_off() -> None:
    """Without retries grpc gets no policy, and its own transparent ones are off."""
    on = dict(Options("h:1").channel_options("{}"))
    off = dict(Options("h:1", retries=False).channel_options("{}"))
    assert on["grpc.service_config"] == "{}"
    assert "grpc.service_config" not in off
    assert off["grpc.enable_retries"] == 0


def test_a_client_connects_when_it_is_first_used(tmp_path: Path) -> None:
    """Making a client for a daemon that is not there yet is no error; a closed one says so."""
    client = modelhost.Client(f"unix:{tmp_path}/later.sock", retries=False)
    double = Double(client.target).start()
    double.on("GetHost", host_pb2.Host(version="2"))
    try:
        assert client.host().version == "2"
    finally:
        client.close()
        double.stop()
    unused = modelhost.Client("h:1")
    unused.close()
    with pytest.raises(RuntimeError, match="closed"):
        unused.host()
