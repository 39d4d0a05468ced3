"""Figures of the benches that are programs of their own: which of their numbers are held against a goal."""

import asyncio
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench import connections, ending, faults, loop_lag, rpc_metrics, subscribers
from bench.figure import Effort, Figure
from bench.inference import LAG_LIMIT_MS
from modelhostd.adapters import logs
from modelhostd.api.counted import Counted

METRICS = "What counting a call costs (`rpc_metrics.py`): the hook alone, and a unary call with and without it."
ENDING = (
    "SIGTERM with nothing and with everything that could hold the daemon up, and workers after the daemon's "
    "SIGKILL (`ending.py`); the reference of a worker's end is the one with nothing mapped."
)
CONNECTIONS = (
    "Other clients' control calls while connections misbehave (`connections.py`); the reference is the same "
    "daemon with nobody misbehaving. Memory: what is left after all that is held has been let go."
)
SUBSCRIBERS = (
    "100 subscribers that read beside 100 that never read, 100 events a second, then 200 readers "
    "(`subscribers.py`); the reference of the latency is the readers alone, that of the CPU time nobody reading."
)
FAULTS = (
    "A worker is killed with a request in flight, with 0 and 1 GiB touched, and one is stopped (`faults.py`, which "
    "also has the other hangs and the leaks of 1,000 crashes). The reference of a report is the kernel's own time "
    "until the process is gone, that of serving again a first worker's import and load."
)


def metrics(effort: Effort) -> Sequence[Figure]:
    """Measure the metrics' hook."""
    logs.configure("warning", "console")  # as a daemon that writes no line for a call
    hook, uncounted = Counted, rpc_metrics.Uncounted
    own = min(rpc_metrics.alone(hook) - rpc_metrics.alone(uncounted) for _ in range(effort.rounds))
    with tempfile.TemporaryDirectory(prefix="mh-bench-") as scratch:
        lag = Path(scratch) / "lag"
        measured = asyncio.run(rpc_metrics.over_a_socket(effort.rounds, lag))
        lag_ms = loop_lag.p99_ms(loop_lag.lags(lag, 0.0, time.monotonic()))
    without, with_ = map(statistics.median, measured)
    return [
        Figure("counting a call, alone", own, "us", rpc_metrics.GOAL_US, expected="2 us"),
        Figure("unary call with it, median", with_, "us", reference=without, expected="1.0x"),
        Figure("loop lag of server and client in one loop, p99", lag_ms, "ms", LAG_LIMIT_MS),
    ]


def ending_(effort: Effort) -> Sequence[Figure]:
    """Measure ends. Two rounds: a start and an end of a daemon each take seconds."""
    found = ending.measure(min(effort.rounds, 2))
    nothing = found["sigterm_nothing_median_s"]
    held = found["sigterm_everything_max_s"]
    limit = found["sigterm_goal_s"]
    unmapped = found["workers_gone_0gib_median_s"]
    return [
        Figure("SIGTERM to exit, nothing held up, median", nothing, "s", limit, expected="0.3 s"),
        Figure(
            "SIGTERM to exit, everything held up, max", held, "s", limit,
            reference=nothing, expected="the drain's 3 s and the workers' 1 s",
        ),
        *(
            Figure(
                f"SIGTERM to exit, {name} held up, loop lag p99",
                found[f"sigterm_{name}_lag_p99_s"] * 1e3, "ms", LAG_LIMIT_MS,
            )
            for name in ("nothing", "everything")
        ),
        *(
            Figure(
                f"SIGKILL until workers are gone, {gib} GiB mapped, max",
                found[f"workers_gone_{gib}gib_max_s"], "s", found[f"workers_gone_{gib}gib_goal_s"],
                reference=unmapped, expected=f"{0.001 + 0.013 * gib:.3f} s",
            )
            for gib in (0, 1, 2)
        ),
    ]  # fmt: skip


def connections_(effort: Effort) -> Sequence[Figure]:
    """Measure every attack."""
    found = connections.measure(scale=effort.scale)
    nothing = found["nothing_p99_s"] * 1e3
    limit = connections.GOAL_S * 1e3
    expected = "the reference's"
    return [
        *(
            Figure(
                f"control calls beside '{name}', p99", found[f"{name}_p99_s"] * 1e3, "ms", limit,
                reference=nothing, expected=expected,
            )
            for name in connections.COUNTS
        ),
        *(
            Figure(
                f"loop lag beside '{name}', p99", found[f"{name}_lag_p99_s"] * 1e3, "ms", LAG_LIMIT_MS,
                reference=found["nothing_lag_p99_s"] * 1e3, expected=expected,
            )
            for name in connections.COUNTS
        ),
        *(
            Figure(
                f"RSS after '{name}'", found[f"{name}_rss_after_mib"], "MiB",
                reference=found[f"{name}_rss_before_mib"], expected="1.1x",
            )
            for name in connections.COUNTS
        ),
    ]  # fmt: skip


def subscribers_(effort: Effort) -> Sequence[Figure]:
    """Measure subscribers, for 4 s each."""
    found = subscribers.measure(4.0 * effort.scale)
    limit = subscribers.P99_GOAL_S * 1e3
    return [
        Figure(
            "100 readers beside 100 that never read, p99", found["reader_p99_s"] * 1e3, "ms", limit,
            reference=found["reader_alone_p99_s"] * 1e3, expected="the reference's",
        ),
        Figure("loop lag meanwhile, p99", found["lag_p99_s"] * 1e3, "ms", LAG_LIMIT_MS),
        Figure("gaps and disorder that readers saw", found["reader_faults"], "", 0.0, expected="0"),
        Figure(
            "memory of one that never reads", found["never_reader_kib"], "KiB",
            subscribers.NEVER_READER_GOAL_BYTES / 1024, expected="100 KiB",
        ),
        Figure(
            "CPU of 200 readers, 100 events/s", found["cores_of_200_readers"], "cores",
            subscribers.CORE_GOAL, reference=found["cores_0_readers"], expected="0.4 cores",
        ),
    ]  # fmt: skip


def faults_(effort: Effort) -> Sequence[Figure]:
    """Measure crashes, a hang, and for how long anybody is told a wrong health."""
    return list(_faults(min(effort.rounds, 2)))


def _faults(rounds: int) -> Iterator[Figure]:
    for gib in (0, 1):
        found: Any = faults.crash(gib, rounds)
        name = f"worker killed, {gib} GiB touched"
        yield Figure(
            f"{name}: reported, max", found["reported_s"]["max"], "s", faults.REPORTED_S,
            reference=found["died_s"]["max"], expected=f"{0.02 + 0.025 * gib:.3g} s",
        )  # fmt: skip
        yield Figure(
            f"{name}: replacement exec'd, max", found["exec_s"]["max"], "s", faults.EXEC_S,
            reference=found["died_s"]["max"], expected="0.2 s",
        )  # fmt: skip
        yield Figure(
            f"{name}: exec to READY, median", found["exec_to_ready_s"]["p50"], "s",
            reference=found["cold_s"], expected="1.0x",
        )  # fmt: skip
        yield Figure(f"{name}, loop lag p99", found["lag_p99_ms"], "ms", LAG_LIMIT_MS)
    stopped: Any = faults.hang("stop", rounds)
    beyond = stopped["beyond_timeout_s"]["max"]
    yield Figure("hang told, beyond its timeout, max", beyond, "s", faults.HANG_S, expected="2.5 s")
    health: Any = faults.health(1)
    for harm in ("kill", "hang", "poison"):
        for who, seconds in health[harm].items():
            yield Figure(f"health wrong after {harm}, {who}", seconds, "s", faults.WRONG_S)
