"""What counting a call costs: the hook of the handler wrapper by itself, and in calls over a real socket.

With and without the hook takes turns on one server, round by round. By itself the hook is measured to
some nanoseconds; over a socket its cost is far below what a call varies by, so that only its order can be
seen there. ``make bench`` or::

    python bench/rpc_metrics.py --rounds 20
"""

import argparse
import asyncio
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

# Run as a script: the repository's root is not on the path by itself.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import grpc

from bench import loop_lag
from modelhost.v1 import operation_service_pb2, operations_pb2
from modelhostd.adapters import logs
from modelhostd.api import wrapper
from modelhostd.api.admission import Admission, AdmissionLimits
from modelhostd.api.calls import OPERATOR_RIGHTS, Caller, Calls
from modelhostd.api.counted import Counted
from modelhostd.api.methods import CONTROL_BYTES_MAX, Service, snake
from modelhostd.core.rpc_stats import RpcStats

GOAL_US = 50.0
PATH = "/modelhost.v1.OperationService/GetOperation"
DESCRIPTOR = operation_service_pb2.DESCRIPTOR.services_by_name["OperationService"]
REQUEST = operation_service_pb2.GetOperationRequest(name="operations/x").SerializeToString()
CALLS = 300
REPEATS = 200_000


class Uncounted:
    """Stands where Counted stands, and does nothing: the server without the hook."""

    __slots__ = ("code", "started")

    def __init__(self, counts: object, context: object) -> None:
        self.started = time.monotonic()
        self.code = 1

    def end(self) -> None:
        """Do nothing."""


class Servicer:
    """Answers every method of OperationService at once."""

    def __init__(self) -> None:
        for method in DESCRIPTOR.methods:
            setattr(self, snake(method.name), self._answer)

    async def _answer(self, request: Any, call: Any) -> operations_pb2.Operation:
        return operations_pb2.Operation(name=request.name)


def alone(hook: type, repeats: int = REPEATS) -> float:
    """Return the microseconds that the hook takes for one call that ends well."""
    counts: Any = RpcStats().method(PATH, "unary")
    started = time.perf_counter()
    for _ in range(repeats):
        counted = hook(counts, None)
        counted.code = 0
        counted.end()
    return (time.perf_counter() - started) / repeats * 1e6


async def serve() -> tuple[grpc.aio.Server, str]:
    """Start a server whose calls go through the wrapper."""
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    made = wrapper.Wrapper(Caller("bench", OPERATOR_RIGHTS), Calls(), Admission(AdmissionLimits()))
    handlers = made.handlers([Service(DESCRIPTOR, Servicer())], CONTROL_BYTES_MAX)
    server.add_generic_rpc_handlers(tuple(handlers))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    return server, f"127.0.0.1:{port}"


async def one_round(target: str, hook: type) -> list[float]:
    """Return how many microseconds each call took, one after the other."""
    took = []
    # The wrapper looks its hook up at each call.
    with mock.patch.object(wrapper, "Counted", hook):
        async with grpc.aio.insecure_channel(target) as channel:
            call: Any = channel.unary_unary(PATH)
            for _ in range(20):
                await call(REQUEST)
            for _ in range(CALLS):
                started = time.perf_counter()
                await call(REQUEST)
                took.append((time.perf_counter() - started) * 1e6)
    return took


async def over_a_socket(
    rounds: int, lag: Path | None = None
) -> tuple[Sequence[float], Sequence[float]]:
    """Return the median microseconds of a call in each round, without the hook and with it.

    ``lag``: where to note how late the loop is, in which clients and server take turns.
    """
    server, target = await serve()
    if lag is not None:
        loop_lag.watch(lag)
    try:
        without: list[float] = []
        with_: list[float] = []
        for number in range(rounds):
            # Who goes first changes, so that neither always meets a colder machine.
            order = (Uncounted, Counted) if number % 2 else (Counted, Uncounted)
            for hook in order:
                found = statistics.median(await one_round(target, hook))
                (with_ if hook is Counted else without).append(found)
        return without, with_
    finally:
        await server.stop(None)


def main() -> int:
    """Run the bench; returns 1 where the hook by itself costs more than its goal."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", action="store_true", help="print figures for a machine")
    arguments = parser.parse_args()
    logs.configure("warning", "console")  # as a daemon that writes no line for a call
    own = min(alone(Counted) - alone(Uncounted) for _ in range(5))
    without, with_ = asyncio.run(over_a_socket(arguments.rounds))
    figures = {
        "hook_us": own,
        "goal_us": GOAL_US,
        "call_without_us": statistics.median(without),
        "call_with_us": statistics.median(with_),
        "difference_us": statistics.median(b - a for a, b in zip(without, with_, strict=True)),
    }
    if arguments.json:
        print(json.dumps(figures))
    else:
        print(f"{'hook by itself':34}{own:9.2f} us   goal: below {GOAL_US:g}")
        print(f"{'unary call without it, median':34}{figures['call_without_us']:9.1f} us")
        print(f"{'unary call with it, median':34}{figures['call_with_us']:9.1f} us")
        print(f"{'difference, median of rounds':34}{figures['difference_us']:9.1f} us")
    return 0 if own < GOAL_US else 1


if __name__ == "__main__":
    sys.exit(main())
