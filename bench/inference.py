"""ModelInfer of an identity model through daemon and worker, beside a bare grpc.aio servicer that answers itself.

The load generator speaks HTTP/2 by itself, over a unix socket: a gRPC client in Python costs more than what is
measured. Beside rates: CPU time for a request of all processes of a server, which a busy machine moves
less, the lag of each server's loop, and at 1 MiB the page faults of a request.

The bare server is started anew for each round: with glibc's own settings its heap gives the pages of a large message
back and faults them in again, 1,280 for each request (4.7 ms of CPU time), until small blocks happen to lie above them; from then
on none (1.6 ms). Each of 8 fresh ones began with the former, and one got to the latter.
"""

import multiprocessing
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from bench import loop_lag
from bench.figure import Effort, Figure
from bench.h2_load import Load
from bench.hot_path import (
    BARE,
    OURS,
    PATH,
    TUNED,
    Server,
    fresh_bare_server,
    request,
    servers,
)

MIB = 1 << 20
LAG_LIMIT_MS = 10.0
SMALL, LARGE = 64, 16 * MIB
BESIDE_REQUESTS = 200
SETTLE_S = 0.3
WARM_UP_SHARE = 0.2
"""Of a round of small requests, before a server that was just started is measured."""


@dataclass(frozen=True)
class Case:
    """One measurement: its name, bytes of the tensor, requests at a time, requests in a round."""

    name: str
    tensor_bytes: int
    concurrency: int
    requests: int
    limit: float
    """What the daemon's rate shall be at least, as a share of the bare server's."""
    expected: str


CASES = (
    Case("16 floats, c=1", SMALL, 1, 1500, 0.85, "0.7x"),
    Case("16 floats, c=16", SMALL, 16, 4000, 0.65, "0.72x"),
    Case("1 MiB, c=1", MIB, 1, 120, 1.0, "2x"),
    Case("1 MiB, c=16", MIB, 16, 200, 1.0, "2x"),
)


@dataclass
class Measured:
    """What one server did in one case: a value for each round."""

    rates: list[float] = field(default_factory=list)
    cpu_us: list[float] = field(default_factory=list)
    faults: list[float] = field(default_factory=list)
    """Page faults of a request."""
    latencies: list[float] = field(default_factory=list)
    lags: list[float] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """The median rate."""
        return statistics.median(self.rates)


def figures(effort: Effort) -> Sequence[Figure]:
    """Measure every case."""
    with servers() as found:
        return [*_rates(found, effort), *_beside(found, effort)]


def _rates(targets: Sequence[Server], effort: Effort) -> Iterator[Figure]:
    measured = {(case.name, server.name): Measured() for case in CASES for server in targets}
    for number in range(effort.rounds + 1):
        with fresh_bare_server() as fresh:
            _run(CASES[0], fresh, Measured(), effort.scale * WARM_UP_SHARE)
            turns = [fresh if server.name == BARE else server for server in targets]
            for case in CASES:
                # Who goes first changes, so that neither always meets a colder machine.
                for server in turns if number % 2 else reversed(turns):
                    kept = measured[case.name, server.name] if number else Measured()
                    _run(case, server, kept, effort.scale)  # the first round warms everything up
    for case in CASES:
        bare, tuned, ours = (measured[case.name, server] for server in (BARE, TUNED, OURS))
        name = f"ModelInfer {case.name}"
        yield Figure(name, ours.rate, "/s", case.limit, True, bare.rate, True, case.expected)
        yield Figure(
            f"{name}, bare server with our settings", tuned.rate, "/s", None, True, bare.rate
        )
        cpu, of_bare = statistics.median(ours.cpu_us), statistics.median(bare.cpu_us)
        yield Figure(f"{name}, CPU of a request", cpu, "us", reference=of_bare)
        if case.tensor_bytes >= MIB:
            faults, of_bare = statistics.median(ours.faults), statistics.median(bare.faults)
            yield Figure(f"{name}, page faults of a request", faults, "", reference=of_bare)
        yield lag_figure(name, ours.lags, bare.lags)


def _run(case: Case, server: Server, kept: Measured, scale: float) -> None:
    message = request(case.tensor_bytes)
    requests = max(case.concurrency, int(case.requests * scale))
    with Load(server.target, PATH) as load:
        load.run(message, concurrency=case.concurrency, requests=case.concurrency * 2)
        used, started, faults = server.cpu_s(), time.monotonic(), server.page_faults()
        run = load.run(message, concurrency=case.concurrency, requests=requests)
        kept.cpu_us.append((server.cpu_s() - used) / requests * 1e6)
        kept.faults.append((server.page_faults() - faults) / requests)
    kept.rates.append(run.rate)
    kept.lags += loop_lag.lags(server.lag, started, time.monotonic())


def lag_figure(name: str, ours: Sequence[float], bare: Sequence[float]) -> Figure:
    """Return the lag of the daemon's loop beside the bare server's."""
    mine, theirs = (percentile(lags, 0.99) * 1e3 for lags in (ours, bare))
    expected = "below 5 ms on a quiet machine"
    return Figure(f"{name}, loop lag p99", mine, "ms", LAG_LIMIT_MS, False, theirs, False, expected)


def percentile(values: Sequence[float], share: float) -> float:
    """Return a percentile; 0 of nothing."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


# --- small requests beside large ones ---------------------------------------------------------------


def _beside(targets: Sequence[Server], effort: Effort) -> Iterator[Figure]:
    measured = {server.name: Measured() for server in targets}
    message = request(SMALL)
    requests = max(20, int(BESIDE_REQUESTS * effort.scale))
    for number in range(effort.rounds):
        for server in targets if number % 2 else reversed(targets):
            with _large(server.target), Load(server.target, PATH) as load:
                time.sleep(SETTLE_S)
                started = time.monotonic()
                run = load.run(message, concurrency=1, requests=requests)
                kept = measured[server.name]
                kept.latencies.append(run.percentile(0.99) * 1e3)
                kept.lags += loop_lag.lags(server.lag, started, time.monotonic())
    bare, tuned, ours = (measured[server] for server in (BARE, TUNED, OURS))
    p99, of_tuned, of_bare = (statistics.median(m.latencies) for m in (ours, tuned, bare))
    name = "64 B beside a stream of 16 MiB requests"
    yield Figure(f"{name}, p99", p99, "ms", 1.5, False, of_bare, True, "0.8x")
    yield Figure(f"{name}, p99, bare server with our settings", of_tuned, "ms", reference=of_bare)
    yield lag_figure(name, ours.lags, bare.lags)


@contextmanager
def _large(target: str) -> Iterator[None]:
    """Send large requests from a process of its own, one after the other."""
    process = multiprocessing.get_context("fork").Process(target=_send_large, args=(target,))
    process.start()
    try:
        yield
        if not process.is_alive():
            raise RuntimeError("the large requests ended early")
    finally:
        process.kill()
        process.join()


def _send_large(target: str) -> None:
    message = request(LARGE)
    with Load(target, PATH) as load:
        while True:
            load.run(message, concurrency=1, requests=8)
