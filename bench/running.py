"""A daemon for a bench: started with what the bench needs, measured from outside, ended at last."""

import contextlib
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench import loop_lag, process_use
from bench.demo import wait_until_serving
from modelhost import Client

END_S = 90.0


@dataclass
class Running:
    """One daemon: its process, and where it serves users, operators and TCP clients."""

    process: "subprocess.Popen[bytes]"
    users: str
    operators: str
    tcp: str
    log: Path
    lag: Path
    """Where it is noted how late its loop is."""
    home: Path

    @property
    def pid(self) -> int:
        """The process id."""
        return self.process.pid

    def lag_p99_s(self, since: float) -> float:
        """Return the 99th percentile of its loop's lag since a time (``time.monotonic``)."""
        lags = sorted(loop_lag.lags(self.lag, since, time.monotonic()))
        return lags[min(len(lags) - 1, int(0.99 * len(lags)))] if lags else 0.0

    def workers(self) -> list[int]:
        """Return the process ids of its workers."""
        return process_use.children(self.pid)

    def end(self, number: int = signal.SIGTERM) -> float:
        """Send a signal; return the seconds until the process has ended."""
        ended = os.pidfd_open(self.pid)
        started = time.perf_counter()
        self.process.send_signal(number)
        select.select([ended], [], [], END_S)
        took = time.perf_counter() - started
        os.close(ended)
        self.process.wait(1.0)
        return took


@contextmanager
def running(
    *flags: str, endpoint: str = "", below: Path | None = None, watched: bool = True
) -> Iterator[Running]:
    """Start the unchanged daemon with ``flags`` on a home of its own; ``endpoint`` is its hub.

    ``below`` is where the home is made, by default where temporary files are. ``watched`` = its loop's lag is noted, which
    costs 200 wake-ups a second: not beside servers that have no such thing.
    """
    with (
        tempfile.TemporaryDirectory(prefix="mh-bench-", dir=below) as scratch,
        contextlib.ExitStack() as stack,
    ):
        folder = Path(scratch)
        users = f"unix:{folder}/modelhost.sock"
        environment = {**os.environ, "RUNTIME_DIRECTORY": scratch}
        if endpoint:
            environment["HF_ENDPOINT"] = endpoint
        lag = folder / "lag"
        daemon = [loop_lag.__file__, str(lag)] if watched else ["-m", "modelhostd"]
        command = [sys.executable, *daemon, "--home", str(folder / "home")]
        command += ["--grpc", users, "--grpc", "127.0.0.1:0", "--http", "off"]
        command += ["--log-level", "warning", *flags]
        log = folder / "log"
        with log.open("wb") as output:
            process = subprocess.Popen(command, env=environment, stderr=output)
        stack.callback(_end, process)
        try:
            wait_until_serving(users, process)
        except RuntimeError as error:
            raise RuntimeError(log.read_text(errors="replace") or str(error)) from error
        with Client(users) as client:
            tcp = next(x.address for x in client.host().listeners if ":/" not in x.address)
        yield Running(process, users, f"unix:{folder}/admin.sock", tcp, log, lag, folder / "home")


def _end(process: "subprocess.Popen[bytes]") -> None:
    if process.poll() is not None:
        return
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(END_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
