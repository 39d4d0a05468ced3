"""How to reach a daemon: the target, the channel's options, the deadlines. Needs no grpc."""

import os
import re
import socket
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from modelhost._errors import invalid

DEFAULT_PORT = 7411
SERVICE_SOCKET = "/run/modelhost/modelhost.sock"
"""Where the daemon listens when systemd runs it."""
ADMIN_SOCKET = "admin.sock"
"""Beside the users' socket: who may open it is an operator, as is who runs the daemon."""

UNIX_PATH_MAX = 107
"""Bytes of a socket's path. Source: unix(7), sun_path less its final NUL."""

MESSAGE_BYTES_MAX = 2**31 - 1
"""The largest message that protobuf can hold."""

ChannelOptions = tuple[tuple[str, int | str], ...]


@dataclass(frozen=True, slots=True)
class Options:
    """What a client is made with; times in seconds."""

    target: str
    """As grpc understands it: ``host:port`` or ``unix:/path``."""
    timeout: float = 30.0
    """Deadline of every call that has none of its own."""
    infer_timeout: float = 300.0
    """The same for inference, which may have to wait until its model is loaded."""
    retries: bool = True
    """Whether calls that are safe to repeat are repeated when the daemon is UNAVAILABLE."""
    max_message_bytes: int = MESSAGE_BYTES_MAX
    """The largest message to send or take; the daemon has a limit of its own for what it takes."""

    def channel_options(self, service_config: str) -> ChannelOptions:
        """Return grpc's channel options; ``service_config`` is used when ``retries`` is on."""
        options: list[tuple[str, int | str]] = [
            ("grpc.max_send_message_length", self.max_message_bytes),
            ("grpc.max_receive_message_length", self.max_message_bytes),
            # A watch is silent while nothing happens: notice a host that is gone.
            ("grpc.keepalive_time_ms", 30_000),
            ("grpc.keepalive_timeout_ms", 10_000),
            ("grpc.http2.max_pings_without_data", 0),
            # grpc's own back-off goes up to two minutes, far longer than a daemon takes to restart.
            ("grpc.initial_reconnect_backoff_ms", 200),
            ("grpc.max_reconnect_backoff_ms", 1_000),
            (
                "grpc.min_reconnect_backoff_ms",
                5_000,
            ),  # In spite of its name: how long one try may take.
            ("grpc.service_config_disable_resolution", 1),
        ]
        if is_local(self.target):
            # With http_proxy set, grpc would send even loopback through the proxy.
            options.append(("grpc.enable_http_proxy", 0))
        if self.retries:
            options.append(("grpc.service_config", service_config))
        else:
            options.append(("grpc.enable_retries", 0))
        return tuple(options)


def make_options(
    target: str | None,
    *,
    timeout: float,
    infer_timeout: float,
    retries: bool,
    max_message_bytes: int,
) -> Options:
    """Return the options of a client, its arguments checked. Raises InvalidArgument."""
    for name, value in (("timeout", timeout), ("infer_timeout", infer_timeout)):
        if not value > 0:
            raise invalid(name, "seconds above 0", str(value))
    if not 0 < max_message_bytes <= MESSAGE_BYTES_MAX:
        raise invalid("max_message_bytes", f"1 to {MESSAGE_BYTES_MAX}", str(max_message_bytes))
    return Options(
        target=resolve_target(target, os.environ, socket_answers, socket_opens),
        timeout=timeout,
        infer_timeout=infer_timeout,
        retries=retries,
        max_message_bytes=max_message_bytes,
    )


def resolve_target(
    given: str | None,
    environment: Mapping[str, str],
    answers: Callable[[str], bool],
    opens: Callable[[str], bool],
) -> str:
    """Return the target: what is given, MODELHOST_TARGET, a unix socket, or loopback.

    ``answers`` tells whether someone listens on a socket's path: the file of a daemon that was killed
    stays behind. ``opens`` tells the same of a socket that this user may open. Raises InvalidArgument for a target
    that cannot be one.
    """
    if given:
        return parse_target(given, "target")
    named = environment.get("MODELHOST_TARGET", "")
    if named:
        return parse_target(named, "MODELHOST_TARGET")
    for path in (SERVICE_SOCKET, user_socket(environment)):
        if len(os.fsencode(path)) > UNIX_PATH_MAX:
            continue
        admin = os.path.join(os.path.dirname(path), ADMIN_SOCKET)
        if opens(admin):
            return f"unix:{admin}"
        if answers(path):
            return f"unix:{path}"
    return f"127.0.0.1:{DEFAULT_PORT}"


def parse_target(text: str, field: str) -> str:
    """Return a target in grpc's form; a path is a unix socket, a host alone gets the default port."""
    if any(c <= " " or c == "\x7f" or "\ud800" <= c <= "\udfff" for c in text):
        raise invalid(field, "HOST:PORT or unix:PATH, in UTF-8 without spaces", ascii(text))
    if text.startswith(("/", "unix:")):
        path = text.removeprefix("unix:")
        path = path[2:] if path.startswith("///") else path
        if not path or path.startswith("//") or len(os.fsencode(path)) > UNIX_PATH_MAX:
            raise invalid(field, f"unix:PATH of at most {UNIX_PATH_MAX} bytes", repr(text))
        return f"unix:{os.path.abspath(path)}"
    if "://" in text:
        raise invalid(field, "HOST:PORT or unix:PATH, without a scheme", repr(text))
    host, port = _split(text)
    if not host or not re.fullmatch("[0-9]{1,5}", port) or not 0 < int(port) < 65536:
        raise invalid(field, "HOST:PORT or unix:PATH", repr(text))
    return f"{host}:{port}"


def is_local(target: str) -> bool:
    """Whether a target in grpc's form is on this machine."""
    if target.startswith("unix:"):
        return True
    host = _split(target)[0].strip("[]")
    return host in ("localhost", "::1") or host.startswith("127.")


def user_socket(environment: Mapping[str, str]) -> str:
    """Return the socket of a daemon that the user runs, below the default home directory."""
    home = environment.get("MODELHOST_HOME", "")
    if not home:
        data = environment.get("XDG_DATA_HOME", "")
        base = data if os.path.isabs(data) else os.path.expanduser("~/.local/share")
        home = os.path.join(base, "modelhost")
    return os.path.join(home, "run", "modelhost.sock")


def socket_answers(path: str) -> bool:
    """Whether someone listens on a unix socket, as far as this user can tell.

    A socket that may not be opened counts: the error is then about that, not about another target.
    """
    try:
        return _listens(path)
    except PermissionError:
        return True


def socket_opens(path: str) -> bool:
    """Whether someone listens on a unix socket that this user may open."""
    try:
        return _listens(path)
    except PermissionError:
        return False


def _listens(path: str) -> bool:
    """Whether someone listens on a unix socket. Raises PermissionError where this user cannot tell."""
    try:
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            return False
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.setblocking(False)
            probe.connect(path)
    except BlockingIOError:
        return True
    except PermissionError:
        raise
    except OSError:
        return False
    return True


def _split(text: str) -> tuple[str, str]:
    """Return host and port; ``[::1]`` keeps its brackets."""
    if text.startswith("["):
        host, _, rest = text.partition("]")
        return host + "]", rest.removeprefix(":") or str(DEFAULT_PORT)
    host, colon, port = text.rpartition(":")
    if not colon:
        return text, str(DEFAULT_PORT)
    return (host, port) if ":" not in host else ("", "")
