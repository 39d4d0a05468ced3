"""Switches of models as a client sees them, on devices/sim-0 (a GPU's code path, its memory in RAM).

A request to a model whose weights are in host memory, beside one to a resident model; small requests to an identity
model while another model is loaded from disk in the same worker, one whose files no worker has seen and then one that
was there before, beside the same without that; and a trace of Zipf 0.9 over 12 models against a daemon and against the
simulator of `policies.py`, which learns what a swap-in takes from the first fifth of the trace and is held against the
rest.
"""

import json
import random
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from bench import policies
from bench.faulty_scene import Scene, scene, wait_for
from bench.figure import Effort, Figure
from bench.h2_load import Load
from bench.hot_path import MODEL, PATH, request, safetensors, with_model
from bench.loopback_hub import LoopbackHub, Repo
from bench.models import minilm_dir
from bench.running import running
from modelhost import Client
from modelhost.v1.instances_pb2 import Instance

MB = 10**6
IMAGED = "imaged = bench.imaged_backend:ImagedBackend"
PAIR = {"one": 64 * MB, "other": 64 * MB}
BEYOND_MS = 5.0
P99_MS, MAX_MS = 10.0, 50.0
BATCH = 50
"""Requests between two looks at whether the load still runs."""
TRACED, TRACE_BUDGET = 12, 16 * MB
MOVING = (Instance.QUEUED, Instance.LOADING, Instance.DRAINING)


def figures(effort: Effort) -> Sequence[Figure]:
    """Measure all three."""
    return [*_warm(effort), *_beside(effort), *_traced(effort)]


# --- a request to a warm model ------------------------------------------------------------------------


def _warm(effort: Effort) -> Iterator[Figure]:
    rounds = max(4, int(30 * effort.scale))
    beyond, swaps, resident = [], [], []
    with scene("--set", "devices.sim_bytes=2GB", sizes=PAIR, backend=IMAGED) as at:
        taken = [_have(at, name, size) for name, size in PAIR.items()]
        at.client.set_budget("sim-0", max(taken))
        for number in range(rounds + 2):
            name = list(PAIR)[number % 2]
            _settled(at)
            switched = _ask(at, name)
            _settled(at)
            instance = at.client.instance(name)
            again = _ask(at, name)
            if number > 1:  # both have been in host memory by then
                swap = instance.load_duration.ToNanoseconds() / 1e6
                resident.append(again)
                swaps.append(swap)
                beyond.append(switched - again - swap)
    size = PAIR["one"] // MB
    yield Figure(
        f"request to a warm model of {size} MB, beyond its inference and swap-in, median",
        statistics.median(beyond), "ms", BEYOND_MS, expected="4 ms",
    )  # fmt: skip
    yield Figure(
        f"swap-in of {size} MB, median", statistics.median(swaps), "ms",
        reference=statistics.median(resident), expected="8 ms; the reference is a request without one",
    )  # fmt: skip


def _have(at: Scene, name: str, size: int) -> int:
    """Register, fetch and load a model; return the bytes that it takes."""
    config = {"backend": "imaged", "device": "devices/sim-0", "backend_options": {"bytes": size}}
    at.client.add(f"hf://org/{name}", name, config=config)
    at.client.pull(name)
    at.client.load(name)
    return at.client.instance(name).measured_bytes


def _ask(at: Scene, name: str) -> float:
    """Return the milliseconds that a quick request takes."""
    started = time.perf_counter()
    at.infer(name, "quick").result()
    return (time.perf_counter() - started) * 1e3


def _settled(at: Scene) -> None:
    """Wait until nothing is on its way to or from the device, and all of that is committed."""
    wait_for("rest", lambda: not any(i.state in MOVING for i in at.client.instances()))


# --- beside a cold load -------------------------------------------------------------------------------


@dataclass
class _Loads:
    """Loads and unloads one model after the other, from a thread of its own; ``cold`` while one loads."""

    client: Client
    models: Sequence[str]
    cold: threading.Event = field(default_factory=threading.Event)
    over: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        try:
            for model in self.models:
                self.cold.set()
                self.client.load(model)
                self.cold.clear()
                self.client.unload(model)
        finally:
            self.cold.clear()
            self.over.set()


def _beside(effort: Effort) -> Iterator[Figure]:
    rounds = max(2, int(10 * effort.scale))
    fresh = [f"minilm-{number}" for number in range(rounds)]
    repos = {
        f"bench/{MODEL}": Repo({"config.json": b"{}", "model.safetensors": safetensors()}),
        "bench/minilm": Repo.from_folder(minilm_dir(), pipeline_tag="sentence-similarity"),
    }
    repos |= {f"bench/{name}": _like(repos["bench/minilm"], name) for name in fresh}
    with LoopbackHub(repos) as hub, running(endpoint=hub.endpoint) as daemon:
        with_model(daemon.users)
        with Client(daemon.users) as client, Load(daemon.users, PATH) as load:
            for name in ("minilm", *fresh):
                client.pull(f"hf://bench/{name}")
            client.load("minilm")  # its libraries are there afterwards, as in a worker in use
            client.unload("minilm")
            load.run(request(64), concurrency=1, requests=BATCH * 4)
            yield from _compared(effort, load, _Loads(client, fresh), "")
            again = _Loads(client, ["minilm"] * rounds)
            yield from _compared(effort, load, again, " of a model that was there before")


def _like(model: Repo, name: str) -> Repo:
    """Return the same model with files that no worker has seen: its tokenizer is read."""
    files = {path: file.content for path, file in model.commits[model.head].items()}
    path = "tokenizer_config.json"
    settings = json.loads((minilm_dir() / path).read_bytes())
    files[path] = json.dumps({**settings, "name_or_path": name}).encode()
    return Repo(files, pipeline_tag=model.pipeline_tag)


def _compared(effort: Effort, load: Load, loads: _Loads, which: str) -> Iterator[Figure]:
    """Send requests to the identity model alone, then beside the loads."""
    message = request(64)
    alone: list[float] = []
    beside: list[float] = []
    for _ in range(max(2, int(40 * effort.scale))):
        alone += load.run(message, concurrency=1, requests=BATCH).latencies
    threading.Thread(target=loads.run, daemon=True).start()
    while not loads.over.is_set():
        cold = loads.cold.is_set()
        latencies = load.run(message, concurrency=1, requests=BATCH).latencies
        if cold and loads.cold.is_set():
            beside += latencies
    for name, share, limit in (("p99", 0.99, P99_MS), ("max", 1.0, MAX_MS)):
        quiet, busy = (_percentile(x, share) * 1e3 for x in (alone, beside))
        yield Figure(
            f"identity model beside a cold load of 91 MB{which}, {name} above the one alone",
            busy - quiet, "ms", limit, reference=quiet, expected="below the limit on a quiet machine",
        )  # fmt: skip


def _percentile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


# --- a trace ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Request:
    """One request of the trace as the daemon served it."""

    model: int
    loaded: bool
    ms: float


def _traced(effort: Effort) -> Iterator[Figure]:
    randomness = random.Random(7)
    count = max(60, int(400 * effort.scale))
    sizes = [int(2 ** randomness.uniform(0, 4) * MB) for _ in range(TRACED)]
    trace = policies.zipf(randomness, count, models=TRACED)
    live, taken = _lived(sizes, trace)
    if sum(taken) <= TRACE_BUDGET:
        # Else every request but a model's first would be a hit, whatever was decided.
        raise RuntimeError(f"the trace's models take {sum(taken)} bytes, which all fit")
    known = int(count * policies.WARM_UP)
    base_ms = statistics.median(r.ms for r in live if not r.loaded)
    rate, fixed = _fitted([(taken[r.model], r.ms - base_ms) for r in live[:known] if r.loaded])
    device = policies.Device(taken, "lru", TRACE_BUDGET, lambda size: (fixed + size * rate) / 1e3)
    simulated = [device.use(model, now) for now, model in trace]
    rest, expected = live[known:], simulated[known:]
    same = sum(r.loaded == (s > 0) for r, s in zip(rest, expected, strict=True)) / len(rest)
    hits = 1 - sum(r.loaded for r in rest) / len(rest)
    hits_simulated = 1 - sum(s > 0 for s in expected) / len(rest)
    added = statistics.mean(max(0.0, r.ms - base_ms) if r.loaded else 0.0 for r in rest)
    added_simulated = statistics.mean(expected) * 1e3
    about = f"{count} requests of Zipf 0.9, lru"
    yield Figure(f"{about}: decided as simulated", same, "", reference=1.0, expected="1.0x")
    yield Figure(
        f"{about}: hit rate", hits, "", reference=hits_simulated, expected="1.0x of the simulator's"
    )
    yield Figure(
        f"{about}: added by loads, mean", added, "ms", reference=added_simulated,
        expected="0.8x to 1.2x of the simulator's",
    )  # fmt: skip


def _lived(sizes: Sequence[int], trace: policies.Trace) -> tuple[list[_Request], Sequence[int]]:
    """Send the trace to a daemon, one request after the other; return what came, and the models' bytes."""
    names = [f"m{number}" for number in range(TRACED)]
    flags = ("--set", "devices.sim_bytes=1GB")
    found = []
    with scene(*flags, sizes=dict(zip(names, sizes, strict=True)), backend=IMAGED) as at:
        taken = [_have(at, name, size) for name, size in zip(names, sizes, strict=True)]
        at.client.update_settings({"eviction_policy": "lru"})
        # All leave: what the simulator begins with, and every load is one from host memory.
        for name in names:
            at.client.unload(name, keep_warm=True)
        at.client.set_budget("sim-0", TRACE_BUDGET)
        for _, model in trace:
            _settled(at)
            was = at.client.instance(names[model])
            ms = _ask(at, names[model])
            found.append(_Request(model, was.state != Instance.READY, ms))
    return found, taken


def _fitted(points: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """Return milliseconds a byte and fixed ones: medians of slopes and offsets (Theil-Sen), which a few slow
    loads on a busy machine do not move.
    """
    pairs = [(a, b) for a in points for b in points if b[0] > a[0]]
    slopes = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in pairs]
    slope = max(0.0, statistics.median(slopes)) if slopes else 0.0
    return slope, max(0.0, statistics.median(ms - slope * size for size, ms in points))
