"""Figures of the benches that are programs of their own: which of their numbers are held against a goal."""

import asyncio
import statistics
from collections.abc import Sequence

from bench import ending, rpc_metrics
from bench.figure import Effort, Figure
from modelhostd.api.counted import Counted

METRICS = "What counting a call costs (`rpc_metrics.py`): the hook alone, and a unary call with and without it."
ENDING = (
    "SIGTERM with nothing and with everything that could hold the daemon up, and workers after the daemon's "
    "SIGKILL (`ending.py`); the reference of a worker's end is the one with nothing mapped."
)


def metrics(effort: Effort) -> Sequence[Figure]:
    """Measure the metrics' hook."""
    hook, uncounted = Counted, rpc_metrics.Uncounted
    own = min(rpc_metrics.alone(hook) - rpc_metrics.alone(uncounted) for _ in range(effort.rounds))
    without, with_ = map(statistics.median, asyncio.run(rpc_metrics.over_a_socket(effort.rounds)))
    return [
        Figure("counting a call, alone", own, "us", rpc_metrics.GOAL_US, expected="2 us"),
        Figure("unary call with it, median", with_, "us", reference=without, expected="1.0x"),
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
                f"SIGKILL until workers are gone, {gib} GiB mapped, max",
                found[f"workers_gone_{gib}gib_max_s"], "s", found[f"workers_gone_{gib}gib_goal_s"],
                reference=unmapped, expected=f"{0.001 + 0.013 * gib:.3f} s",
            )
            for gib in (0, 1, 2)
        ),
    ]  # fmt: skip
