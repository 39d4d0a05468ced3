"""100 watchers that read, 100 that never read and 100 events a second: latency, memory, CPU.

The readers are one process that parses each message once, however many got it, and compares an event's own
time with the moment of its arrival. Those that never read come from another. Events are updates of a model,
made one after the other by a third client: how long each takes is what publishing waits.

    python bench/subscribers.py --seconds 10
"""

import argparse
import asyncio
import contextlib
import json
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Mapping
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
from modelhost.v1 import event_service_pb2, model_service_pb2, models_pb2

READERS = 100
NEVER_READERS = 100
RATE = 100
EVENT_BYTES = 500
CHANNELS = 4
NAME = "models/bench"
UPDATE = "/modelhost.v1.ModelService/UpdateModel"
CALL_S = 30.0
SETTLE_S = 1.0
P99_GOAL_S = 0.05
NEVER_READER_GOAL_BYTES = 128 * 1024
CORE_GOAL = 0.5
Response = event_service_pb2.WatchEventsResponse


@dataclass
class Read:
    """What all readers together were sent: the age of each event at its arrival, and where each is."""

    latencies: list[float] = field(default_factory=list)
    faults: int = 0
    """Events that were missing, twice or out of order."""
    positions: list[int] = field(default_factory=list)
    parsed: dict[bytes, tuple[tuple[int, float], ...]] = field(default_factory=dict)


def measure(seconds: float = 10.0) -> dict[str, float]:
    """Return latencies in s, memory of one that never reads in KiB, CPU in cores."""
    with running("--set", "worker.backends=identity") as daemon:
        figures = asyncio.run(_beside_never_readers(daemon, seconds))
    with running("--set", "worker.backends=identity") as daemon:
        figures["cores_200_readers"] = asyncio.run(_cores(daemon, 200, seconds))
    with running("--set", "worker.backends=identity") as daemon:
        figures["cores_0_readers"] = asyncio.run(_cores(daemon, 0, seconds))
    figures["cores_of_200_readers"] = figures["cores_200_readers"] - figures["cores_0_readers"]
    return figures


async def _beside_never_readers(daemon: Running, seconds: float) -> dict[str, float]:
    async with _readers(daemon, READERS) as read:
        # First alone, so that what all watchers share is there: the ring, the encoded events.
        await _publish(daemon.operators, seconds / 2)
        alone = sorted(read.latencies)
        before = process_use.rss_bytes(daemon.pid)
        async with _never_readers(daemon):
            read.latencies.clear()
            since = time.monotonic()
            took = await _publish(daemon.operators, seconds)
            lag_p99_s = daemon.lag_p99_s(since)
            beside = sorted(read.latencies)
            # Lower bound of what is theirs: the readers' own needs did not change meanwhile.
            grown = process_use.rss_bytes(daemon.pid) - before
        last = _last(daemon)
        for _ in range(int(CALL_S / SETTLE_S)):
            if min(read.positions) >= last:
                break
            await asyncio.sleep(SETTLE_S)
        # What a reader was not sent at all counts as much as what came in disorder.
        missing = sum(last - position for position in read.positions)
        return {
            "events": float(len(took)),
            "reader_p50_s": _share(beside, 0.5),
            "reader_p99_s": _share(beside, 0.99),
            "reader_alone_p99_s": _share(alone, 0.99),
            "lag_p99_s": lag_p99_s,
            "reader_faults": float(read.faults + missing),
            "publish_p50_s": _share(sorted(took), 0.5),
            "publish_p99_s": _share(sorted(took), 0.99),
            "never_reader_kib": grown / NEVER_READERS / 1024,
        }


async def _cores(daemon: Running, readers: int, seconds: float) -> float:
    """Return the cores that the daemon takes while ``readers`` watch."""
    async with _readers(daemon, readers):
        await _publish(daemon.operators, SETTLE_S)
        before, started = process_use.cpu_s(daemon.pid), time.perf_counter()
        await _publish(daemon.operators, seconds)
        return (process_use.cpu_s(daemon.pid) - before) / (time.perf_counter() - started)


@asynccontextmanager
async def _readers(daemon: Running, count: int) -> AsyncIterator[Read]:
    """Let ``count`` watch all events from now on; yields what they read."""
    with Client(daemon.operators) as client:
        client.add("hf://org/bench", NAME.removeprefix("models/"))
    start = _last(daemon) + 1
    read = Read(positions=[start - 1] * count)
    async with contextlib.AsyncExitStack() as stack:
        channels = [
            await stack.enter_async_context(
                grpc.aio.insecure_channel(
                    daemon.users, options=[("grpc.use_local_subchannel_pool", 1)]
                )
            )
            for _ in range(CHANNELS)
        ]
        tasks = [
            asyncio.create_task(_read(channels[n % CHANNELS], read, n, start)) for n in range(count)
        ]
        await asyncio.sleep(SETTLE_S)
        yield read
        for task in tasks:
            task.cancel()
        ended = await asyncio.gather(*tasks, return_exceptions=True)
        failed = [one for one in ended if not isinstance(one, asyncio.CancelledError)]
        if failed:
            raise RuntimeError(f"{len(failed)} readers ended: {failed[0]!r}")


async def _read(channel: grpc.aio.Channel, read: Read, number: int, start: int) -> None:
    watch: Any = channel.unary_stream(attacks.WATCH)
    request = event_service_pb2.WatchEventsRequest(start_sequence=start)
    async for data in watch(request.SerializeToString()):
        now = time.time()
        events = read.parsed.get(data)
        if events is None:
            events = read.parsed[data] = tuple(
                (event.sequence, event.time.ToNanoseconds() / 1e9)
                for event in Response.FromString(data).events
            )
        for sequence, made in events:
            read.faults += sequence != read.positions[number] + 1
            read.positions[number] = sequence
            read.latencies.append(now - made)


@asynccontextmanager
async def _never_readers(daemon: Running) -> AsyncIterator[None]:
    """Let others watch and read nothing, for the block."""
    attacker = await asyncio.create_subprocess_exec(
        sys.executable, attacks.__file__, "never_reading", daemon.tcp, str(NEVER_READERS),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert attacker.stdout is not None
    if await attacker.stdout.readline() != b"held\n":
        raise RuntimeError("those that never read did not come")
    await asyncio.sleep(SETTLE_S)
    yield
    await attacker.communicate(b"")  # which ends its input


async def _publish(target: str, seconds: float) -> list[float]:
    """Make ``RATE`` events a second, each acknowledged before the next; return the seconds of each."""
    took = []
    model = models_pb2.Model(name=NAME)
    async with grpc.aio.insecure_channel(target) as channel:
        call: Any = channel.unary_unary(UPDATE)
        first = time.perf_counter()
        for number in range(int(seconds * RATE)):
            model.description = f"{time.time()} " + "x" * EVENT_BYTES
            request = model_service_pb2.UpdateModelRequest(model=model).SerializeToString()
            due = first + number / RATE
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            started = time.perf_counter()
            await call(request, timeout=CALL_S)
            took.append(time.perf_counter() - started)
    return took


def _last(daemon: Running) -> int:
    with Client(daemon.operators) as client:
        return client.statistics().sequence


def _share(ordered: list[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def show(figures: Mapping[str, float]) -> None:
    """Print figures as a table."""
    goals = {
        "reader_p99_s": P99_GOAL_S,
        "never_reader_kib": NEVER_READER_GOAL_BYTES / 1024,
        "cores_of_200_readers": CORE_GOAL,
        "reader_faults": 0.0,
    }
    for name, value in figures.items():
        goal = f"   goal: at most {goals[name]:g}" if name in goals else ""
        print(f"{name:24}{value:10.4f}{goal}")


def main() -> int:
    """Run the bench; returns 0 whatever the figures are."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--json", action="store_true", help="print figures for a machine")
    arguments = parser.parse_args()
    figures = measure(arguments.seconds)
    if arguments.json:
        print(json.dumps(figures))
    else:
        show(figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
