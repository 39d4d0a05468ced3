"""Worker faults, measured: how soon a crash or a hang is told, a replacement runs and the model serves again.

A whole daemon with real workers on this machine. ``--crashes`` is also the soak of the promise that crashes
leak nothing. Times are from the signal, as a client sees them::

    python bench/faults.py --rounds 5 --gib 0 1 4 --crashes 1000
"""

import argparse
import contextlib
import json
import os
import select
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

# Run as a script, `python bench/faults.py`: the repository's root is not on the path by itself.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import loop_lag, process_use
from bench.faulty_health import lose
from bench.faulty_scene import Scene, scene, wait_for

GIB = 2**30
HANG_TIMEOUT_S = 2.0
SETTLE_S = 1.0
WARM_UP = 20
"""Crashes until everything that is kept on purpose is there: threads, buffers, the last events."""

REPORTED_S, HANG_S, EXEC_S, WRONG_S = 0.25, 5.0, 0.5, 1.0
"""Goals: from a crash to its report; from the hang timeout to the report; from a crash to the replacement's exec;
for what health may be wrong."""


def crash(gib: float, rounds: int) -> dict[str, object]:
    """Kill a worker with so much memory touched and a request in flight; seconds, each the median and the worst."""
    with tempfile.TemporaryDirectory(prefix="mh-bench-") as scratch:
        lag = Path(scratch) / "lag"
        with scene("--log-level", "warning", environment={"FAULTY_LAG": str(lag)}) as at:
            cold_s = _cold_start(at, lambda: at.model("m", bytes=int(gib * GIB)))
            since = time.monotonic()
            found = [_one_crash(at) for _ in range(rounds)]
            lags = loop_lag.lags(lag, since, time.monotonic())
    return {
        "gib": gib,
        "rounds": rounds,
        "cold_s": round(cold_s, 3),
        "lag_p99_ms": round(loop_lag.p99_ms(lags), 3),
        **{key: _spread([times[key] for times in found]) for key in found[0]},
    }


def _cold_start(at: Scene, load: Callable[[], object]) -> float:
    """Return the time from a first worker's exec until its model is READY: import and load."""
    loading = threading.Thread(target=load, daemon=True)
    loading.start()
    wait_for("a worker", lambda: _execed(at, ()))
    begun = time.monotonic()
    ready = wait_for("READY", lambda: at.watcher.of("READY"))
    loading.join()
    return ready[0].at - begun


def _execed(at: Scene, known: Sequence[int]) -> int:
    """Return the process id of a worker that is not known yet and runs its own program; 0 = none."""
    for pid in at.workers():
        if pid not in known:
            try:
                line = Path(f"/proc/{pid}/cmdline").read_bytes()
            except OSError:
                continue
            if b"--control=" in line:
                return pid
    return 0


def _one_crash(at: Scene) -> dict[str, float]:
    """Kill the worker; return when what was seen, in seconds from the signal."""
    at.client.unblock("m")
    pid = at.pid("m")
    since = at.told()
    failed: list[float] = []
    never = at.folder / "never"
    call = at.infer("m", f"advance:{never}")
    call.add_done_callback(lambda _: failed.append(time.monotonic()))
    wait_for("a request runs", lambda: list(at.folder.glob(f"never.{pid}.*.started")))
    pidfd = os.pidfd_open(pid)
    begun = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    select.select([pidfd], [], [])
    died = time.monotonic()
    os.close(pidfd)
    wait_for("a replacement", lambda: _execed(at, (pid,)))
    execed = time.monotonic()
    wait_for("the call's end", lambda: failed)
    ready = wait_for("READY", lambda: at.watcher.of("READY", since=since))
    at.infer("m").result()
    (crashed,) = at.watcher.of("CRASHED", since=since)
    return {
        "died_s": died - begun,
        "reported_s": max(failed[0], crashed.at) - begun,
        "told_after_death_s": max(failed[0], crashed.at) - died,
        "exec_s": execed - begun,
        "exec_to_ready_s": ready[0].at - execed,
        "serving_s": time.monotonic() - begun,
    }


def hang(kind: str, rounds: int) -> dict[str, object]:
    """Have a request hang its worker (``stop``, ``hold``, ``stuck``); seconds beyond the timeout until it is told."""
    flags = ("--log-level", "error", "--set", f"worker.hang_timeout_s={HANG_TIMEOUT_S:g}")
    beyond = []
    with scene(*flags) as at:
        at.model("m")
        for _ in range(rounds):
            at.client.unblock("m")
            since = at.told()
            begun = time.monotonic()
            at.infer("m", kind).exception()
            beyond.append(time.monotonic() - begun - HANG_TIMEOUT_S)
            wait_for("READY", lambda since=since: at.watcher.of("READY", since=since))  # type: ignore[misc]
    return {"kind": kind, "rounds": rounds, "beyond_timeout_s": _spread(beyond)}


def health(rounds: int) -> dict[str, object]:
    """Kill, hang and poison a worker while everything that tells its health is asked; seconds wrong, the worst."""
    harms: Mapping[str, Callable[[Scene, int], object]] = {
        "kill": lambda at, pid: os.kill(pid, signal.SIGKILL),
        "hang": lambda at, pid: os.kill(pid, signal.SIGSTOP),
        "poison": lambda at, pid: at.infer("m", "poison"),
    }
    flags = ("--log-level", "error", "--set", f"worker.hang_timeout_s={HANG_TIMEOUT_S:g}")
    found: dict[str, object] = {"rounds": rounds}
    with scene(*flags) as at:
        at.model("m")
        for name, harm in harms.items():
            worst: dict[str, float] = {}
            for _ in range(rounds):
                at.client.unblock("m")
                wrong = lose(at, "m", lambda pid, harm=harm: harm(at, pid))  # type: ignore[misc]
                worst = {who: max(worst.get(who, 0.0), s) for who, s in wrong.items()}
            found[name] = {who: round(s, 4) for who, s in worst.items()}
    return found


def leaks(crashes: int) -> dict[str, object]:
    """Kill a worker again and again; what the daemon holds before and after."""
    flags = ("--log-level", "error", "--set", "worker.arena_bytes=1MiB")
    with scene(*flags) as at:
        at.model("m")
        for _ in range(WARM_UP):
            _kill_and_wait(at)
        before, begun = holdings(at), time.monotonic()
        for _ in range(crashes):
            _kill_and_wait(at)
        seconds = time.monotonic() - begun
        after = holdings(at, before)
    return {"crashes": crashes, "seconds": round(seconds, 1), "before": before, "after": after}


def _kill_and_wait(at: Scene) -> None:
    # By the model's own word: a list of processes is of a moment, at which its worker need not be in it.
    pid = at.pid("m")
    since = at.told()
    os.kill(pid, signal.SIGKILL)
    wait_for("READY", lambda: at.watcher.of("READY", since=since))


def holdings(at: Scene, most: Mapping[str, int] | None = None) -> dict[str, int]:
    """Return what the daemon holds when nothing goes on: the least of each that is seen within a while.

    What ends with the last request or worker ends a moment later, however long that is where the machine is busy:
    ``most`` is waited for.
    """
    at.infer("m").result()
    pid = at.process.pid
    least: dict[str, int] = {}
    end = time.monotonic() + SETTLE_S

    def settled() -> bool:
        now = {
            "descriptors": process_use.descriptors(pid),
            "tasks": len(at.tasks()),
            "children": len(at.workers()),
        }
        least.update({name: min(count, least.get(name, count)) for name, count in now.items()})
        within = most is None or all(count <= most[name] for name, count in least.items())
        return within and time.monotonic() >= end

    with contextlib.suppress(TimeoutError):
        wait_for("a quiet daemon", settled)
    return {**least, "rss_bytes": process_use.rss_bytes(pid)}


def _spread(seconds: Sequence[float]) -> dict[str, float]:
    return {"p50": round(statistics.median(seconds), 4), "max": round(max(seconds), 4)}


def main() -> int:
    """Run the bench and print its figures as JSON, one line each; returns 0 whatever they are."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--gib", type=float, nargs="*", default=[0.0, 1.0, 4.0])
    parser.add_argument("--crashes", type=int, default=100)
    arguments = parser.parse_args()
    for gib in arguments.gib:
        _say("crash", crash(gib, arguments.rounds))
    for kind in ("stop", "hold", "stuck"):
        _say("hang", hang(kind, arguments.rounds))
    _say("health", health(arguments.rounds))
    if arguments.crashes:
        _say("leaks", leaks(arguments.crashes))
    return 0


def _say(name: str, figures: Mapping[str, object]) -> None:
    sys.stdout.write(json.dumps({name: figures}) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
