"""The socket that HTTP is served on: bound before READY, so that what is in the way is told at the start."""

import errno
import os
import socket
from typing import Protocol

from modelhostd.core.errors import ModelhostError, Reason

BACKLOG = 64
"""Connections that wait while the server behind the socket is still being imported."""


class Address(Protocol):
    """Where to listen: a loopback ``host`` and a ``port`` (0 = a free one)."""

    @property
    def host(self) -> str:
        """An address of this machine."""

    @property
    def port(self) -> int:
        """The TCP port."""


def bind(address: Address) -> socket.socket:
    """Return a listening socket. Raises WRONG_STATE with what is in the way."""
    host = "127.0.0.1" if address.host.lower() == "localhost" else address.host
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        # As gRPC does: a port whose last connections are ending is free.
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, address.port))
        listening.listen(BACKLOG)
        listening.setblocking(False)
    except OSError as error:
        listening.close()
        why = os.strerror(error.errno or 0)
        if error.errno == errno.EADDRINUSE:
            why = "another process listens there"
        name = url(host, address.port)
        raise ModelhostError(
            Reason.WRONG_STATE,
            f"cannot listen on {name}: {why}; end that process, or choose another address (--http, "
            f"or --http off)",
            {"name": name, "state": why},
        ) from None
    return listening


def url(host: str, port: int) -> str:
    """Return an address as a browser takes it."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
