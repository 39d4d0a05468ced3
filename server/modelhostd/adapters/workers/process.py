"""Starts a worker process and learns how it ended. Everything here runs in the loop's thread.

PDEATHSIG is tied to the thread that started the child, so a worker that an executor's thread started
would die with that thread; and asyncio's own child watcher would reap before its pidfd was looked at.
"""

import contextlib
import importlib.util
import os
import signal
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import modelhostd
from modelhostd.adapters.workers.config import WorkersConfig, environment
from modelhostd.core.values import dataclass

_MAIN = Path(modelhostd.__file__).parent / "worker" / "__main__.py"


@dataclass
class Process:
    """A worker that was started, and the daemon's ends of what it inherited."""

    pid: int
    pidfd: int
    control: socket.socket
    data: socket.socket
    stderr: int
    """Read end of the pipe that is its standard output and error."""
    _popen: "subprocess.Popen[bytes]"

    def kill(self, number: signal.Signals) -> None:
        """Send a signal; harmless when the process is gone (a pidfd never means another one)."""
        if self.pidfd < 0:
            return
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, number)

    def reap(self) -> str | None:
        """Return how it ended, or None while it runs: a pidfd may be readable without a death."""
        status = os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED | os.WNOHANG)
        if status is None:
            return None
        # Popen would wait for a process of this number at its end, which may then be another one.
        self._popen.returncode = status.si_status
        if status.si_code == os.CLD_EXITED:
            return f"exit code {status.si_status}"
        return f"signal {signal.Signals(status.si_status).name}"

    def open_stderr(self) -> IO[bytes]:
        """Return the pipe as a file, whose reader closes it."""
        return open(self.stderr, "rb", buffering=0)

    def close(self) -> None:
        """Give the pidfd back; sockets and pipe belong to their transports."""
        os.close(self.pidfd)
        self.pidfd = -1


def start(config: WorkersConfig, requests: int, responses: int, images: int) -> Process:
    """Start a worker that inherits the two arenas and the memory for images. Raises ``OSError`` with nothing left behind."""
    with contextlib.ExitStack() as theirs, contextlib.ExitStack() as undo:
        control, their_control = socket.socketpair()
        data, their_data = socket.socketpair()
        for sock in (their_control, their_data):
            theirs.callback(sock.close)
        for sock in (control, data):
            undo.callback(sock.close)
            sock.setblocking(False)
        stderr, their_stderr = os.pipe2(os.O_CLOEXEC)
        theirs.callback(os.close, their_stderr)
        undo.callback(os.close, stderr)
        numbers = {
            "control": their_control.fileno(),
            "data": their_data.fileno(),
            "requests": requests,
            "responses": responses,
            "images": images,
        }
        popen = subprocess.Popen(
            command(config, numbers),
            stdin=subprocess.DEVNULL,
            stdout=their_stderr,
            stderr=their_stderr,
            pass_fds=tuple(numbers.values()),
            env=environment(config, os.environ),
            cwd="/",
        )
        undo.callback(popen.kill)
        pidfd = os.pidfd_open(popen.pid)
        undo.pop_all()
    return Process(popen.pid, pidfd, control, data, stderr, popen)


def command(config: WorkersConfig, descriptors: dict[str, int]) -> Sequence[str]:
    """Return the command line of a worker; see ``modelhostd/worker/__main__.py`` for its form."""
    line = [config.python, "-I", str(_MAIN), f"--parent={os.getpid()}"]
    line += (f"--{name}={number}" for name, number in descriptors.items())
    line += (f"--code={path}" for path in _roots())
    line += (f"--path={path}" for path in config.import_paths)
    return line


def _roots() -> list[str]:
    """Return where modelhostd and modelhost were imported from, installed or not."""
    roots = []
    for name in ("modelhostd", "modelhost"):
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations:
            roots.append(str(Path(spec.submodule_search_locations[0]).absolute().parent))
    return list(dict.fromkeys(roots))
