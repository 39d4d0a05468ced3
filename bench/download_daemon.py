"""What a download asks of the daemon that makes it: loop, calls, memory; and how exactly it obeys.

The daemon fetches one large file as fast as it can while two clients call it, one that reads and one that changes a
model; then it is told to stop, and to keep to a rate. What is on disk is read from outside, from the part
file: how many bytes are written, and when the last one was.
"""

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from bench import process_use
from bench.figure import Figure
from bench.inference import LAG_LIMIT_MS, percentile
from bench.loopback_hub import LoopbackHub
from bench.running import Running, running
from modelhost import Client
from modelhost.v1.operations_pb2 import Operation

READING_MS, CHANGING_MS = 50.0, 100.0
GROWTH_MIB = 64.0
CANCEL_MS = 50.0
THROTTLE_PERCENT = 3.0
PAUSE_S = 0.01
"""Between two calls of a client."""
ALONE_S = 2.0
CANCELS = 5
RATE = 50_000_000
THROTTLED_S = 10.0
SETTLE_S = 1.0
DEADLINE_S = 600.0
NAME = "models/bench"


def figures(
    hub: LoopbackHub, small: str, large: str, size: int, scratch: Path, shown: str, scale: float
) -> Iterator[Figure]:
    """Yield the figures. ``small`` and ``large`` are repositories, ``size`` the bytes of the large one."""
    with running(endpoint=hub.endpoint, below=scratch) as daemon, Client(daemon.operators) as host:
        # What a first download imports is no growth of the second one.
        host.pull(f"hf://{small}", timeout=DEADLINE_S)
        host.add(None, NAME.removeprefix("models/"))
        yield from _beside(daemon, host, large, f"{size / 2**30:.2g} GiB at full speed{shown}")
        gaps = [_cancelled(daemon, host, large, size // (2 * CANCELS)) for _ in range(CANCELS)]
        yield Figure(
            f"cancel to the last byte, max of {CANCELS}", max(gaps) * 1e3, "ms", CANCEL_MS, expected="5 ms"
        )  # fmt: skip
        seconds = max(2.0, THROTTLED_S * scale)
        yield Figure(
            f"error of a limit of {RATE / 1e6:g} MB/s over {seconds:g} s",
            100 * abs(_throttled(daemon, host, large, seconds) / RATE - 1), "%", THROTTLE_PERCENT,
            expected="0.5 %",
        )  # fmt: skip


def _beside(daemon: Running, host: Client, repo: str, name: str) -> Iterator[Figure]:
    since = time.monotonic()
    with _calling(daemon) as alone:
        time.sleep(ALONE_S)
    alone_s = daemon.lag_p99_s(since)
    process_use.forget_peak(daemon.pid)
    before, cpu_s = process_use.rss_bytes(daemon.pid), process_use.cpu_s(daemon.pid)
    since = time.monotonic()
    with _calling(daemon) as beside:
        host.pull(f"hf://{repo}", timeout=DEADLINE_S)
    lag_s = daemon.lag_p99_s(since)
    grown = process_use.peak_bytes(daemon.pid) - before
    took_s = time.monotonic() - since
    _forget(host, repo)
    yield Figure(f"{name}: loop lag p99", lag_s * 1e3, "ms", LAG_LIMIT_MS, reference=alone_s * 1e3)
    for what, limit, took, before_it in (
        ("reading", READING_MS, beside.reading, alone.reading),
        ("changing", CHANGING_MS, beside.changing, alone.changing),
    ):
        yield Figure(
            f"{name}: {what} calls, p99", percentile(took, 0.99) * 1e3, "ms", limit,
            reference=percentile(before_it, 0.99) * 1e3,
        )  # fmt: skip
    yield Figure(f"{name}: RSS growth, peak", grown / 2**20, "MiB", GROWTH_MIB, expected="20 MiB")
    used = process_use.cpu_s(daemon.pid) - cpu_s
    yield Figure(f"{name}: CPU of the daemon, those calls included", used / took_s, "cores")


@dataclass
class _Calls:
    """Seconds that calls took."""

    reading: list[float] = field(default_factory=list)
    changing: list[float] = field(default_factory=list)


@contextmanager
def _calling(daemon: Running) -> Iterator[_Calls]:
    """Call the daemon from two clients meanwhile."""
    calls, stop = _Calls(), threading.Event()

    def repeat(took: list[float], call: Callable[[Client, int], object]) -> None:
        with Client(daemon.operators) as client:
            number = 0
            call(client, number)  # connects
            while not stop.wait(PAUSE_S):
                number += 1
                began = time.perf_counter()
                call(client, number)
                took.append(time.perf_counter() - began)

    threads = [
        threading.Thread(target=repeat, args=(calls.reading, lambda c, _: c.get(NAME))),
        threading.Thread(
            target=repeat, args=(calls.changing, lambda c, n: c.update(NAME, {"description": f"{n}"}))
        ),
    ]  # fmt: skip
    for thread in threads:
        thread.start()
    try:
        yield calls
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def _cancelled(daemon: Running, host: Client, repo: str, after: int) -> float:
    """Return the seconds from a cancel's call until the last byte is written."""
    handle = host.pull(f"hf://{repo}", wait=False)
    with _part(daemon) as fd:
        while _written(fd) < after and not handle.refresh().HasField("end_time"):
            time.sleep(0.001)
        began = last = time.monotonic()
        threading.Thread(target=handle.cancel).start()
        seen = _written(fd)
        while (now := time.monotonic()) < last + SETTLE_S:
            if (written := _written(fd)) != seen:
                last, seen = now, written
            time.sleep(0.0005)
    if handle.refresh().state != Operation.CANCELLED:
        raise RuntimeError(f"a download was not cancelled: {handle}")
    _forget(host, repo)
    return last - began


def _throttled(daemon: Running, host: Client, repo: str, seconds: float) -> float:
    """Return the bytes a second that a limited download brought."""
    handle = host.pull(f"hf://{repo}", wait=False, rate_limit_bytes_per_second=RATE)
    with _part(daemon) as fd:
        time.sleep(SETTLE_S)  # past its first burst
        before, began = _written(fd), time.monotonic()
        time.sleep(seconds)
        rate = (_written(fd) - before) / (time.monotonic() - began)
    handle.cancel()
    _forget(host, repo)
    return rate


@contextmanager
def _part(daemon: Running) -> Iterator[int]:
    """Wait for the file that is being fetched; yields its descriptor, which stays when it is gone."""
    parts = daemon.home / "staging" / "parts"
    end = time.monotonic() + DEADLINE_S
    while not (found := list(parts.glob("*.part"))):
        if time.monotonic() > end:
            raise RuntimeError("no download began")
        time.sleep(0.001)
    fd = os.open(found[0], os.O_RDONLY)
    try:
        yield fd
    finally:
        os.close(fd)


def _written(fd: int) -> int:
    return os.fstat(fd).st_blocks * 512


def _forget(host: Client, repo: str) -> None:
    """Delete a model and what it has on disk."""
    model = repo.rpartition("/")[2]
    host.delete(model)
