"""Other clients' control calls while connections misbehave, and the daemon's memory before and after.

Each attack of ``attacks.py`` comes from a process of its own; meanwhile one client reads (GetModel) and one
writes (UpdateModel), a call each 5 ms. ``nothing`` beside the attacks is the same without one: on a shared
machine the difference counts.

    python bench/connections.py
"""

import argparse
import asyncio
import json
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Run as a script: the repository's root is not on the path by itself.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import grpc

from bench import attacks, process_use
from bench.running import Running, running
from modelhost import Client
from modelhost.v1 import model_service_pb2, models_pb2

COUNTS: Mapping[str, int] = {
    "nothing": 0,
    "never_reading": 200,
    "zero_window": 200,
    "half_open": 200,
    "silent": 200,
    "slow": 200,
    "broken_off": 1_000,
    "garbage": 3_000,
    "rapid_resets": 20_000,
    "gzip_bombs": 200,
}
GOAL_S = 0.05
HELD_S = 1.0
"""How long the calls go on after an attack has said all that it says, while its connections are held."""
SETTLE_S = 0.5
PAUSE_S = 0.005
CALL_S = 30.0
HISTORY = 300
MIB = 2**20
NAME = "models/bench"
GET = "/modelhost.v1.ModelService/GetModel"
UPDATE = "/modelhost.v1.ModelService/UpdateModel"


@dataclass
class Attacked:
    """What one attack did: latencies in seconds, memory in bytes."""

    latencies: list[float] = field(default_factory=list)
    before: int = 0
    peak: int = 0
    after: int = 0
    descriptors_left: int = 0
    log_bytes: int = 0
    seconds: float = 0.0
    lag_p99_s: float = 0.0

    def percentile(self, share: float) -> float:
        """Return a percentile of the latencies."""
        ordered = sorted(self.latencies)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def measure(names: Iterable[str] = tuple(COUNTS), scale: float = 1.0) -> dict[str, float]:
    """Return for each attack: p50 and p99 of control calls in s, RSS before, peak, after in MiB."""
    figures: dict[str, float] = {}
    for name in names:
        with running("--set", "worker.backends=identity") as daemon:
            found = asyncio.run(_attacked(daemon, name, int(COUNTS[name] * scale)))
        figures |= {
            f"{name}_p50_s": found.percentile(0.5),
            f"{name}_p99_s": found.percentile(0.99),
            f"{name}_lag_p99_s": found.lag_p99_s,
            f"{name}_seconds": found.seconds,
            f"{name}_rss_before_mib": found.before / MIB,
            f"{name}_rss_peak_mib": found.peak / MIB,
            f"{name}_rss_after_mib": found.after / MIB,
            f"{name}_descriptors_left": found.descriptors_left,
            f"{name}_log_kib": found.log_bytes / 1024,
        }
    return figures


async def _attacked(daemon: Running, name: str, count: int) -> Attacked:
    with Client(daemon.operators) as client:
        client.add("hf://org/bench", NAME.removeprefix("models/"))
        for number in range(HISTORY):  # more events than a window takes
            client.update(NAME, {"description": f"{number} " + "x" * 500})
    found = Attacked()
    async with _calls(daemon.operators) as latencies:
        await asyncio.sleep(SETTLE_S)
        latencies.clear()
        found.before = process_use.rss_bytes(daemon.pid)
        descriptors = process_use.descriptors(daemon.pid)
        process_use.forget_peak(daemon.pid)
        started, since = time.perf_counter(), time.monotonic()
        await _attack(daemon.tcp, name, count)
        found.seconds = time.perf_counter() - started
        found.lag_p99_s = daemon.lag_p99_s(since)
        found.latencies = list(latencies)
        await asyncio.sleep(SETTLE_S)
        found.peak = process_use.peak_bytes(daemon.pid)
        found.after = process_use.rss_bytes(daemon.pid)
        found.descriptors_left = process_use.descriptors(daemon.pid) - descriptors
    found.log_bytes = daemon.log.stat().st_size
    return found


async def _attack(target: str, name: str, count: int) -> None:
    """Attack from another process, and let go after a while."""
    if name == "nothing":
        await asyncio.sleep(HELD_S * 2)
        return
    attacker = await asyncio.create_subprocess_exec(
        sys.executable, attacks.__file__, name, target, str(count),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert attacker.stdout is not None
    if await attacker.stdout.readline() != b"held\n":
        raise RuntimeError(f"the attack '{name}' ended with {await attacker.wait()}")
    await asyncio.sleep(HELD_S)
    await attacker.communicate(b"")  # which ends its input


@asynccontextmanager
async def _calls(target: str) -> AsyncIterator[list[float]]:
    """Read and write all the time; yields the list that each call's seconds are added to."""
    latencies: list[float] = []
    get = model_service_pb2.GetModelRequest(name=NAME).SerializeToString()
    update = model_service_pb2.UpdateModelRequest(model=models_pb2.Model(name=NAME))
    stop = asyncio.Event()

    async def go_on(method: str, channel: grpc.aio.Channel) -> None:
        call: Any = channel.unary_unary(method)
        number = 0
        while not stop.is_set():
            number += 1
            update.model.description = str(number)
            request = get if method == GET else update.SerializeToString()
            started = time.perf_counter()
            await call(request, timeout=CALL_S)
            latencies.append(time.perf_counter() - started)
            await asyncio.sleep(PAUSE_S)

    async with grpc.aio.insecure_channel(target) as channel:
        tasks = [asyncio.create_task(go_on(method, channel)) for method in (GET, UPDATE)]
        yield latencies
        stop.set()
        await asyncio.gather(*tasks)


def show(figures: Mapping[str, float]) -> None:
    """Print figures as a table."""
    print(
        f"{'attack':16}{'p50 ms':>8}{'p99 ms':>8}{'goal':>6}{'RSS before':>12}{'peak':>7}{'after':>7} MiB"
        f"{'fds left':>10}{'log KiB':>9}"
    )
    for name in COUNTS:
        if f"{name}_p50_s" not in figures:
            continue
        p50, p99, _, before, peak, after, left, log = (
            value for key, value in figures.items() if key.startswith(f"{name}_")
        )
        print(
            f"{name:16}{p50 * 1e3:8.2f}{p99 * 1e3:8.2f}{GOAL_S * 1e3:6.0f}"
            f"{before:12.1f}{peak:7.1f}{after:7.1f}{left:14.0f}{log:9.0f}"
        )


def main() -> int:
    """Run the bench; returns 0 whatever the figures are."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("attacks", nargs="*", help=", ".join(COUNTS))
    parser.add_argument("--scale", type=float, default=1.0, help="the attacks' counts, times this")
    parser.add_argument("--json", action="store_true", help="print figures for a machine")
    arguments = parser.parse_args()
    figures = measure(arguments.attacks or tuple(COUNTS), arguments.scale)
    if arguments.json:
        print(json.dumps(figures))
    else:
        show(figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
