"""How long the daemon takes to end, and its workers after it was killed.

Ends by SIGTERM with nothing and with everything that could hold it up: watchers that never read, a health
watcher without a window, a hung worker with a request in flight, a download whose source fell silent. Then
SIGKILL, with 0, 1 and 2 GiB of arenas mapped by its worker (an idle one, so most of it has no memory), which also
stands still for half of the rounds.

    python bench/ending.py --rounds 5
"""

import argparse
import contextlib
import json
import os
import select
import signal
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Run as a script: the repository's root is not on the path by itself.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import grpc

from bench import attacks, loop_lag
from bench.hot_path import MODEL, PATH, request, safetensors, with_model
from bench.loopback_hub import Fault, LoopbackHub, Repo
from bench.raw_connection import RawConnection
from bench.running import Running, running
from modelhost import Client

DRAIN_S = 3.0
WORKER_S = 1.0
SPARE_S = 5.0
"""How much longer than its grace (drain and workers together) the daemon may take."""
GONE_S, GONE_S_PER_GIB = 0.1, 0.03
GIB = 2**30
DEADLINE_S = 60.0
LARGE = "large"


def measure(rounds: int = 5) -> dict[str, float]:
    """Return seconds by name: ends by SIGTERM, and workers' ends after SIGKILL by GiB mapped."""
    figures: dict[str, float] = {}
    for name in ("nothing", "everything"):
        lags: list[float] = []
        took = [_ended(lags, everything=name == "everything") for _ in range(rounds)]
        figures[f"sigterm_{name}_median_s"] = statistics.median(took)
        figures[f"sigterm_{name}_max_s"] = max(took)
        figures[f"sigterm_{name}_lag_p99_s"] = loop_lag.p99_ms(lags) / 1e3
    figures["sigterm_goal_s"] = DRAIN_S + WORKER_S + SPARE_S
    for gib in (0, 1, 2):
        gone = [_workers_gone(gib, stopped=number % 2 == 1) for number in range(rounds)]
        figures[f"workers_gone_{gib}gib_median_s"] = statistics.median(gone)
        figures[f"workers_gone_{gib}gib_max_s"] = max(gone)
        figures[f"workers_gone_{gib}gib_goal_s"] = GONE_S + GONE_S_PER_GIB * gib
    return figures


@contextmanager
def _scene(arena_bytes: int) -> Iterator[tuple[Running, LoopbackHub]]:
    files = {"config.json": b"{}", "model.safetensors": safetensors()}
    more = {**files, "more.safetensors": safetensors() + b"\0" * 2**20}
    repos = {f"bench/{MODEL}": Repo(files), f"bench/{LARGE}": Repo(more)}
    with contextlib.ExitStack() as stack:
        hub = stack.enter_context(LoopbackHub(repos))
        flags = {
            "worker.backends": "identity",
            "worker.arena_bytes": str(arena_bytes),
            "shutdown.drain_timeout_s": f"{DRAIN_S:g}",
            "shutdown.worker_timeout_s": f"{WORKER_S:g}",
        }
        settings = [text for key, value in flags.items() for text in ("--set", f"{key}={value}")]
        daemon = stack.enter_context(running(*settings, endpoint=hub.endpoint))
        with_model(daemon.users)
        yield daemon, hub


def _ended(lags: list[float], *, everything: bool) -> float:
    """Return the seconds from SIGTERM to the exit, and add how late the daemon's loop was meanwhile."""
    with _scene(2**20) as (daemon, hub), contextlib.ExitStack() as stack:
        if everything:
            _hold_up(daemon, hub, stack)
        since = time.monotonic()
        took = daemon.end()
        lags += loop_lag.lags(daemon.lag, since, time.monotonic())
        if daemon.process.returncode != 0:
            raise RuntimeError(f"exit code {daemon.process.returncode}: {daemon.log.read_text()}")
        return took


def _hold_up(daemon: Running, hub: LoopbackHub, stack: contextlib.ExitStack) -> None:
    """Impose on the daemon everything that could hold up its end."""
    held: Sequence[RawConnection] = [
        *attacks.never_reading(daemon.users, 10),
        *attacks.zero_window(daemon.users, 10),
    ]
    for connection in held:
        stack.callback(connection.close)
    fault = hub.fault(Fault("*", where="cdn", stall_after=1000, times=99))
    with Client(daemon.operators) as client:
        client.add(f"hf://bench/{LARGE}", LARGE, config={"backend": "identity"})
        client.pull(LARGE, wait=False)
        if not fault.reached.wait(DEADLINE_S):
            raise RuntimeError("the download did not begin")
        for worker in daemon.workers():
            os.kill(worker, signal.SIGSTOP)
        channel = stack.enter_context(grpc.insecure_channel(daemon.users))
        infer: Any = channel.unary_unary(PATH)
        # Held: a call that nobody holds is cancelled.
        stack.callback(infer.future(request(64), timeout=DEADLINE_S).cancel)
        end = time.monotonic() + DEADLINE_S
        while not client.statistics().in_flight:
            if time.monotonic() > end:
                raise RuntimeError("the request is not in flight")


def _workers_gone(gib: int, *, stopped: bool) -> float:
    """Return the seconds from the daemon's SIGKILL until the last worker, which maps ``gib``, has ended."""
    # Two arenas to a worker, each as large as this.
    with _scene(max(2**20, gib * GIB // 2)) as (daemon, _):
        workers = daemon.workers()
        descriptors = [os.pidfd_open(pid) for pid in workers]
        if not descriptors:
            raise RuntimeError("there is no worker")
        if stopped:
            for pid in workers:
                os.kill(pid, signal.SIGSTOP)
        started = time.perf_counter()
        daemon.process.kill()
        for descriptor in descriptors:
            # Readable once the process is dead, its memory given back.
            if not select.select([descriptor], [], [], DEADLINE_S)[0]:
                raise RuntimeError("a worker outlives its daemon")
            os.close(descriptor)
        return time.perf_counter() - started


def show(figures: Mapping[str, float]) -> None:
    """Print figures as a table."""
    for name, value in figures.items():
        print(f"{name:34}{value:9.3f} s")


def main() -> int:
    """Run the bench; returns 0 whatever the figures are."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print figures for a machine")
    arguments = parser.parse_args()
    figures = measure(arguments.rounds)
    if arguments.json:
        print(json.dumps(figures))
    else:
        show(figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
