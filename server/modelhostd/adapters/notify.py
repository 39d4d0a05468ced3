"""Telling the service manager (sd_notify): ready, stopping, reloading, alive.

Protocol: datagrams of ``KEY=VALUE`` lines to the socket in ``$NOTIFY_SOCKET``
(https://www.freedesktop.org/software/systemd/man/latest/sd_notify.html). Nothing here raises: without
a service manager, or with a broken one, the daemon works the same.
"""

import contextlib
import os
import socket
import time
from collections.abc import MutableMapping

_VARIABLES = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")


class Notifier:
    """The service manager's ear. ``watchdog_s`` is its deadline for :meth:`alive`, None = no watchdog."""

    def __init__(self, address: str = "", watchdog_s: float | None = None) -> None:
        self.watchdog_s = watchdog_s
        self._address = _abstract(address)
        self._socket: socket.socket | None = None
        if self._address:
            with contextlib.suppress(OSError):
                kind = socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
                self._socket = socket.socket(socket.AF_UNIX, kind)

    @classmethod
    def from_environment(cls, environment: MutableMapping[str, str] = os.environ) -> "Notifier":
        """Make one from the variables, and take these away: they are not meant for workers."""
        given = {name: environment.pop(name, "") for name in _VARIABLES}
        return cls(
            given["NOTIFY_SOCKET"], _watchdog_s(given["WATCHDOG_USEC"], given["WATCHDOG_PID"])
        )

    @property
    def ping_interval_s(self) -> float | None:
        """How often to call :meth:`alive`: half the watchdog's time, None = never."""
        return None if self.watchdog_s is None else self.watchdog_s / 2

    def ready(self, status: str = "") -> bool:
        """Say that every listener serves; also the end of a reload."""
        return self._send("READY=1", _status(status))

    def reloading(self) -> bool:
        """Say that the configuration is being read again; ``ready`` must follow."""
        return self._send("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self, status: str = "") -> bool:
        """Say that the daemon is about to end."""
        return self._send("STOPPING=1", _status(status))

    def status(self, text: str) -> bool:
        """Show one line in ``systemctl status``."""
        return self._send(_status(text))

    def alive(self) -> bool:
        """Ping the watchdog."""
        return self._send("WATCHDOG=1")

    def extend_timeout(self, seconds: float) -> bool:
        """Ask for more time to start or stop: so long from now."""
        return self._send(f"EXTEND_TIMEOUT_USEC={int(seconds * 1_000_000)}")

    def close(self) -> None:
        """Close the socket. Later calls do nothing."""
        sock, self._socket = self._socket, None
        if sock is not None:
            sock.close()

    def _send(self, *lines: str) -> bool:
        """Return whether the manager took it."""
        if self._socket is None:
            return False
        message = "\n".join(line for line in lines if line).encode(errors="replace")
        try:
            self._socket.sendto(message, self._address)
        except OSError:
            return False
        return True


def _abstract(address: str) -> str:
    """Return the socket's address as Python wants it; "" for a kind that is not supported."""
    if address.startswith("@"):
        return "\0" + address[1:]
    return address if address.startswith("/") else ""


def _status(text: str) -> str:
    return "STATUS=" + " ".join(text.split()) if text else ""


def _watchdog_s(microseconds: str, pid: str) -> float | None:
    if pid and pid != str(os.getpid()):
        return None
    if not microseconds.isascii() or not microseconds.isdigit() or len(microseconds) > 18:
        return None
    return int(microseconds) / 1_000_000 or None
