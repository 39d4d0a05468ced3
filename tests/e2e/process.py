"""The real daemon as a process: started, waited for by its own READY, ended or killed."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from tests.support import readable

START_S = 120.0
END_S = 120.0


class DaemonFailed(AssertionError):
    """The daemon ended instead of becoming ready; the message has its exit code and its log."""


@dataclass
class Daemon:
    """One daemon on ``root / "home"``. Sockets are in ``root``, which must have a short path."""

    root: Path
    flags: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    process: "subprocess.Popen[bytes] | None" = None

    @property
    def home(self) -> Path:
        """The home directory."""
        return self.root / "home"

    @property
    def target(self) -> str:
        """The users' socket, as clients name it."""
        return f"unix:{self.root}/modelhost.sock"

    @property
    def admin(self) -> str:
        """The operators' socket."""
        return f"unix:{self.root}/admin.sock"

    @property
    def log(self) -> str:
        """What the daemon wrote to stderr so far."""
        return (self.root / "log").read_text(errors="replace")

    @property
    def pid(self) -> int:
        """The process id."""
        assert self.process is not None
        return self.process.pid

    def start(self, *, ready: bool = True) -> "Daemon":
        """Start it and wait for READY; raises DaemonFailed if it ends before."""
        self.root.mkdir(parents=True, exist_ok=True)
        notify = self.root / "notify"
        notify.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
            listener.bind(str(notify))
            self.spawn({"NOTIFY_SOCKET": str(notify)})
            if ready:
                self._wait_ready(listener)
        return self

    def spawn(self, extra: Mapping[str, str] | None = None) -> "subprocess.Popen[bytes]":
        """Start the process without waiting for anything."""
        environment = {
            **os.environ,
            "RUNTIME_DIRECTORY": str(self.root),
            **self.environment,
            **(extra or {}),
        }
        command = [sys.executable, "-m", "modelhostd", "--home", str(self.home)]
        # No port that two tests at one time would both want; a test of HTTP names its own.
        command += ["--grpc", self.target, "--http", "off", *self.flags]
        with (self.root / "log").open("ab") as log:
            self.process = subprocess.Popen(command, env=environment, stderr=log)
        return self.process

    def stop(self) -> int:
        """End it with SIGTERM and return its exit code."""
        return self.end(signal.SIGTERM)

    def kill(self) -> int:
        """End it with SIGKILL."""
        return self.end(signal.SIGKILL)

    def end(self, number: int) -> int:
        """Send a signal and wait for the end."""
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(timeout=END_S)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        if self.process is not None and self.process.poll() is None:
            try:
                self.stop()
            except subprocess.TimeoutExpired:
                self.kill()
                raise

    def _wait_ready(self, listener: socket.socket) -> None:
        assert self.process is not None
        end = time.monotonic() + START_S
        ended = os.pidfd_open(self.process.pid)
        try:
            while (left := end - time.monotonic()) > 0:
                found = readable(listener.fileno(), ended, timeout_s=left)
                if listener.fileno() in found and b"READY=1" in listener.recv(65536).split(b"\n"):
                    return
                if ended in found and listener.fileno() not in found:
                    raise DaemonFailed(f"exit code {self.process.wait()}\n{self.log}")
        finally:
            os.close(ended)
        self.kill()
        raise DaemonFailed(f"not ready within {START_S:g} s\n{self.log}")
