"""Where the server listens: addresses checked before gRPC binds them, so that nothing is taken over.

gRPC itself would unlink the unix socket of another process, and share a TCP port in silence.
"""

import errno
import os
import socket
import stat
from collections.abc import Sequence
from dataclasses import field
from ipaddress import ip_address
from pathlib import Path
from typing import Protocol

import grpc
import structlog

from modelhostd.api.calls import OPERATOR_RIGHTS, USER_RIGHTS, Caller
from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.values import dataclass

log = structlog.get_logger(__name__)

SOCKET_PATH_BYTES_MAX = 107
ADMIN_MODE = 0o600
USER, ADMIN = "USER", "ADMIN"


class Address(Protocol):
    """Where to listen: ``host`` and ``port``, or a unix socket's ``path``."""

    @property
    def host(self) -> str:
        """An address of this machine; empty for a unix socket."""

    @property
    def port(self) -> int:
        """The TCP port; 0 = a free one."""

    @property
    def path(self) -> Path | None:
        """The unix socket."""


@dataclass(slots=True, eq=False)
class Listener:
    """One address with its server. ``mode`` is of the unix socket."""

    role: str
    rights: frozenset[int]
    host: str = ""
    port: int = 0
    path: Path | None = None
    mode: int = 0o660
    reflection: bool = False
    server: grpc.aio.Server = field(init=False)
    _inode: int = 0

    @property
    def caller(self) -> Caller:
        """Who calls here: the socket is all that is known of them."""
        if self.path is not None:
            return Caller("uds:admin" if self.role == ADMIN else "uds:user", self.rights)
        return Caller(f"tcp:{self.address}", self.rights)

    @property
    def address(self) -> str:
        """The address as people and clients write it."""
        if self.path is not None:
            return f"unix:{self.path}"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def bind(self) -> None:
        """Bind the server to the address. Raises WRONG_STATE with what is in the way."""
        if self.path is not None:
            self._bind_unix(self.path)
            return
        _check_port(self.host, self.port, self.address)
        try:
            bound = self.server.add_insecure_port(self.address)
        except RuntimeError as error:
            raise _cannot(self.address, str(error)) from None
        if not bound:
            raise _cannot(self.address, "it cannot be bound")
        self.port = bound

    def _bind_unix(self, path: Path) -> None:
        _free_socket(path)
        try:
            path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            bound = self.server.add_insecure_port(f"unix:{path}")
            if not bound:
                raise _cannot(self.address, "it cannot be bound")
            # Until here the process's umask holds, which is the stricter of the two.
            os.chmod(path, self.mode)
            self._inode = os.lstat(path).st_ino
        except (RuntimeError, OSError) as error:
            raise _cannot(self.address, str(error)) from None

    def clean(self) -> None:
        """Remove the unix socket, if it is still this one."""
        if self.path is None or not self._inode:
            return
        try:
            if os.lstat(self.path).st_ino == self._inode:
                os.unlink(self.path)
        except FileNotFoundError:
            return
        except OSError as error:
            log.warning("the socket stays", path=str(self.path), error=str(error))


def listeners(
    addresses: Sequence[Address],
    admin_socket: Path | None,
    socket_mode: int,
    loopback_is_operator: bool,
) -> Sequence[Listener]:
    """Return the listeners of a configuration, not yet bound.

    Which listener a call comes by says who calls. Raises WRONG_STATE for an address beyond loopback:
    there is no TLS and no authentication.
    """
    found = []
    for address in addresses:
        if address.path is not None:
            found.append(Listener(USER, USER_RIGHTS, path=address.path, mode=socket_mode))
            continue
        if not _is_loopback(address.host):
            raise ModelhostError(
                Reason.WRONG_STATE,
                f"{address.host} is not a loopback address, and there is neither TLS nor "
                f"authentication: whoever reaches it could do everything; listen on 127.0.0.1",
                {"name": address.host, "state": "no TLS"},
            )
        rights = OPERATOR_RIGHTS if loopback_is_operator else USER_RIGHTS
        host = "127.0.0.1" if address.host == "localhost" else address.host
        found.append(Listener(USER, rights, host=host, port=address.port, reflection=True))
    if admin_socket is not None:
        admin = Listener(
            ADMIN, OPERATOR_RIGHTS, path=admin_socket, mode=ADMIN_MODE, reflection=True
        )
        found.append(admin)
    return found


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def _check_port(host: str, port: int, address: str) -> None:
    """Bind the port for a moment: gRPC does not say why it cannot."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        # As gRPC does: a port whose last connections are ending is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen(1)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise _cannot(address, "another process listens there") from None
            raise _cannot(address, os.strerror(error.errno or 0)) from None


def _free_socket(path: Path) -> None:
    """Remove a socket that a dead process left. Raises WRONG_STATE for anything else that is there."""
    if len(os.fsencode(path)) > SOCKET_PATH_BYTES_MAX:
        raise _cannot(f"unix:{path}", f"the path is longer than {SOCKET_PATH_BYTES_MAX} bytes")
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    except OSError as error:
        raise _cannot(f"unix:{path}", os.strerror(error.errno or 0)) from None
    if not stat.S_ISSOCK(mode):
        raise _cannot(f"unix:{path}", "what is there is not a socket; it is left alone")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(os.fspath(path))
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except FileNotFoundError:
            return
        except OSError as error:
            # A full backlog (EAGAIN) is somebody, too.
            raise _cannot(f"unix:{path}", os.strerror(error.errno or 0)) from None
    raise _cannot(f"unix:{path}", "another process answers there")


def _cannot(address: str, why: str) -> ModelhostError:
    return ModelhostError(
        Reason.WRONG_STATE,
        f"cannot listen on {address}: {why}; end that process, or choose another address (--grpc)",
        {"name": address, "state": why},
    )
