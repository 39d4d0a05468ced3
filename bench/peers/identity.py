"""ModelInfer of an identity model, beside Triton's python backend and MLServer.

One load generator for all, which speaks HTTP/2 by itself; over TCP on loopback, which all three serve; windows
are counted in requests. Triton's model copies its input to its output, as one writes it; MLServer has its own
defaults. Beside rates: CPU time for a request of all processes of a server.
"""

import contextlib
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench import hot_path
from bench.figure import Effort, Figure
from bench.h2_load import Load
from bench.loopback_hub import LoopbackHub, Repo
from bench.peers import servers
from bench.peers.calls import infer
from bench.peers.servers import Model, Peer
from bench.running import running

OURS, TRITON, MLSERVER = "modelhost", "triton", "mlserver"
MIB = 1 << 20
WARM = 3
MODEL = Model("Identity", [("INPUT0", "FP32", (-1, -1))], [("OUTPUT0", "FP32", (-1, -1))])


@dataclass(frozen=True)
class Case:
    """One measurement: bytes of the tensor, requests at a time, requests in a round, and what is wanted.

    ``triton`` and ``mlserver`` are the least share of their rates; ``slow`` the requests of MLServer, 0 = it
    is left out; ``p99`` the most of Triton's 99th percentile.
    """

    name: str
    tensor_bytes: int
    concurrency: int
    requests: int
    triton: float
    expected: str
    mlserver: float | None = None
    slow: int = 0
    p99: float | None = None


CASES = (
    Case("16 floats, c=1", 64, 1, 1000, 0.65, "0.65x", 2.5, 500),
    Case("16 floats, c=16", 64, 16, 3000, 0.8, "0.85x", 3.5, 1000, 1.8),
    Case("1 MiB, c=1", MIB, 1, 100, 1.0, "1.1x", 8.0, 24),
    Case("1 MiB, c=16", MIB, 16, 200, 1.0, "1.0x", 8.0, 32),
    Case("16 MiB, c=1", 16 * MIB, 1, 16, 1.0, "1.1x"),
    Case("16 MiB, c=4", 16 * MIB, 4, 24, 1.0, "1.0x"),
)


@dataclass
class Measured:
    """What one server did in one case: a value for each round."""

    rates: list[float] = field(default_factory=list)
    p99s: list[float] = field(default_factory=list)
    cpu_us: list[float] = field(default_factory=list)


def figures(effort: Effort) -> Sequence[Figure]:
    """Measure every case."""
    with (
        tempfile.TemporaryDirectory(prefix="mh-bench-") as scratch,
        contextlib.ExitStack() as stack,
    ):
        folder = Path(scratch)
        peers = {OURS: stack.enter_context(_ours())}
        for name, start in ((TRITON, servers.triton), (MLSERVER, servers.mlserver)):
            peer = stack.enter_context(start({hot_path.MODEL: MODEL}, folder))
            if peer is not None:
                peers[name] = peer
        for peer in peers.values():
            _same(peer)
        measured = _measure(peers, effort)
        return [figure for case in CASES for figure in _figures(case, measured)]


@contextlib.contextmanager
def _ours() -> Iterator[Peer]:
    files = {"config.json": b"{}", "model.safetensors": hot_path.safetensors()}
    with (
        LoopbackHub({f"bench/{hot_path.MODEL}": Repo(files)}) as hub,
        running(endpoint=hub.endpoint, watched=False) as daemon,
    ):
        hot_path.with_model(daemon.users)
        yield Peer(OURS, daemon.tcp, (daemon.pid, *daemon.workers()))


def _same(peer: Peer) -> None:
    """Raise RuntimeError unless a server answers what it was sent."""
    sent = bytes(range(64))
    answer = infer(peer.target, hot_path.request(64).replace(bytes(64), sent))
    got = answer.raw_output_contents[0] if answer.raw_output_contents else b""
    if got != sent:
        raise RuntimeError(f"{peer.name} answers something else: {answer}")


def _measure(peers: Mapping[str, Peer], effort: Effort) -> Mapping[tuple[str, str], Measured]:
    measured: dict[tuple[str, str], Measured] = {}
    for number in range(effort.rounds):
        for case in CASES:
            # Who goes first changes, so that nobody always meets a colder machine.
            for peer in list(peers.values())[:: 1 if number % 2 else -1]:
                if peer.name != MLSERVER or case.slow:
                    kept = measured.setdefault((case.name, peer.name), Measured())
                    _run(case, peer, kept, effort.scale)
    return measured


def _run(case: Case, peer: Peer, kept: Measured, scale: float) -> None:
    message = hot_path.request(case.tensor_bytes)
    whole = case.slow if peer.name == MLSERVER else case.requests
    requests = max(case.concurrency, int(whole * scale))
    with Load(peer.target, hot_path.PATH) as load:
        # The first of a connection open its windows.
        load.run(message, concurrency=case.concurrency, requests=WARM * case.concurrency)
        used = peer.cpu_s()
        run = load.run(message, concurrency=case.concurrency, requests=requests)
        kept.cpu_us.append((peer.cpu_s() - used) / requests * 1e6)
    kept.rates.append(run.rate)
    kept.p99s.append(run.percentile(0.99) * 1e3)


def _figures(case: Case, measured: Mapping[tuple[str, str], Measured]) -> Iterator[Figure]:
    name = f"ModelInfer {case.name}"
    ours = measured[case.name, OURS]

    def beside(peer: str, what: str) -> float | None:
        found = measured.get((case.name, peer))
        return statistics.median(getattr(found, what)) if found else None

    rate, cpu = statistics.median(ours.rates), statistics.median(ours.cpu_us)
    yield Figure(
        f"{name}, beside Triton", rate, "/s", case.triton, True, beside(TRITON, "rates"), True,
        case.expected, servers.ABSENT,
    )  # fmt: skip
    yield Figure(
        f"{name}, p99, beside Triton", statistics.median(ours.p99s), "ms", case.p99, False,
        beside(TRITON, "p99s"), True, absent=servers.ABSENT,
    )  # fmt: skip
    yield Figure(
        f"{name}, CPU of a request, beside Triton", cpu, "us", reference=beside(TRITON, "cpu_us"),
        absent=servers.ABSENT,
    )  # fmt: skip
    if case.slow:
        yield Figure(
            f"{name}, beside MLServer", rate, "/s", case.mlserver, True, beside(MLSERVER, "rates"),
            True, absent=servers.ABSENT,
        )  # fmt: skip
