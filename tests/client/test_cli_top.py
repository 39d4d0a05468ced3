"""The command top: devices and instances, live on a terminal and as lines without one."""

import json
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator

import grpc
import pytest

from modelhost.v1 import host_pb2
from tests.client.double import Double
from tests.support import DEADLINE_S

DEVICES = [
    {"device": "devices/cpu", "budget_bytes": 4096, "resident_bytes": 2048, "reserved_bytes": 1024}
]
KEPT = {
    "instance": "models/mini/instances/1", "model": "models/mini", "device": "devices/cpu",
    "state": "READY", "tier": "DEVICE", "device_bytes": 2048, "predicted_bytes": 2000, "health": "HEALTHY",
    "activity": {"in_flight": 2, "request_count": 9, "evict_blockers": ["IN_FLIGHT", "PINNED"]},
}  # fmt: skip
FIRST = {
    "instance": "models/old/instances/1", "model": "models/old", "device": "devices/cpu",
    "state": "READY", "tier": "DEVICE", "device_bytes": 512, "health": "DEGRADED",
    "activity": {"eviction_rank": 1, "last_used_time": {"seconds": 1_700_000_000}},
}  # fmt: skip
LOOK = host_pb2.Statistics(
    devices=DEVICES,
    instances=[FIRST, KEPT],
    operations=[
        {"operation": "operations/1", "kind": "LOAD", "model": "models/new", "state": "RUNNING"}
    ],
    in_flight=2,
    request_count=9,
)


def test_without_a_terminal_one_look_is_lines(told: Double, run) -> None:
    """A line for the device, the instances with those that go last first, and the operations; then it ends."""
    told.on("WatchStatistics", [LOOK, LOOK])
    lines = [line.split("\t") for line in run("top").stdout.splitlines()]
    assert lines[0] == ["device", "cpu", "2048", "1024", "4096", "0"]
    assert lines[1] == [
        "instance", "mini", "cpu", "READY", "DEVICE", "2000", "2048", "0", "HEALTHY", "2", "0", "9", "", "",
        "in_flight,pinned",
    ]  # fmt: skip
    assert lines[2][1:3] == ["old", "cpu"]
    assert lines[2][-3:] == ["2023-11-14T22:13:20.000Z", "1", ""]
    assert lines[3][:2] == ["operation", "1"]
    assert len(lines) == 4


def test_looks_are_counted_and_are_the_contracts_json(told: Double, run) -> None:
    """-n says how many; --json gives a document a line; the interval is what is asked for."""
    told.on("WatchStatistics", [LOOK, LOOK, LOOK])
    lines = run("top", "-n", "2", "--interval", "0.5", "--json").stdout.splitlines()
    assert [json.loads(line)["instances"][1]["predictedBytes"] for line in lines] == ["2000"] * 2
    assert told.requests("WatchStatistics")[0].interval.nanos == 500_000_000


def test_an_interval_out_of_its_range_is_a_usage_error(run) -> None:
    """The daemon takes 0.25 to 60 s."""
    assert run("top", "--interval", "0.1").exit_code == 2


class Terminal:
    """The command on a terminal of its own."""

    def __init__(self, target: str) -> None:
        self.master, slave = pty.openpty()
        termios.tcsetwinsize(slave, (24, 200))
        command = [sys.executable, "-m", "modelhost.cli", "--target", target, "top"]
        self.process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, env={**os.environ, "TERM": "xterm"}
        )
        os.close(slave)
        self.seen = b""

    def read_until(self, text: str) -> None:
        end = time.monotonic() + DEADLINE_S
        while text.encode() not in self.seen:
            assert time.monotonic() < end, self.seen.decode(errors="replace")
            if select.select([self.master], [], [], 0.1)[0]:
                try:
                    self.seen += os.read(self.master, 65536)
                except OSError:  # the other end is closed
                    assert text.encode() in self.seen, self.seen.decode(errors="replace")

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self.master)


@pytest.fixture
def terminal(told: Double) -> Iterator[Terminal]:
    """top on a daemon that tells one look and then nothing."""

    def look_and_wait(
        request: object, context: grpc.ServicerContext
    ) -> Iterator[host_pb2.Statistics]:
        ended = threading.Event()
        context.add_callback(ended.set)
        yield LOOK
        ended.wait(DEADLINE_S)

    told.on("WatchStatistics", look_and_wait)
    made = Terminal(told.target)
    yield made
    made.close()


@pytest.mark.parametrize("end", ["q", "Ctrl-C"])
def test_on_a_terminal_it_is_live_until_q_or_ctrl_c(terminal: Terminal, end: str) -> None:
    """A bar of the device, the rows, why one is kept; the end leaves the terminal as it was."""
    for text in (
        "2.0 KiB + 1.0 KiB reserved of 4.0 KiB",
        "pinned,in_flight",
        "degraded",
        "load new",
    ):
        terminal.read_until(text)
    before = termios.tcgetattr(terminal.master)
    assert not before[3] & termios.ECHO
    if end == "q":
        os.write(terminal.master, b"q")
    else:
        os.kill(terminal.process.pid, signal.SIGINT)
    assert terminal.process.wait(DEADLINE_S) == 0
    terminal.read_until("\x1b[?1049l")
    assert termios.tcgetattr(terminal.master)[3] & termios.ECHO
