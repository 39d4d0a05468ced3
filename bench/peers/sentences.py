"""Sentence embeddings of all-MiniLM-L6-v2, beside the same model in Triton and MLServer and a bare loop.

Requests of 1 and of 32 sentences of 4 to 40 words, the same for all, several different ones in turn. All have the
same torch, transformers and threads (one for each core), and tokenizers without threads of their own.
Triton's model is the bare one in its python backend, once as it is and once with its dynamic batching and the 32
items that modelhost takes at most; MLServer has its own defaults. The bare loop calls the model in a process of its
own, without a server. Answers are compared with it before anything is timed. The overhead is what a request of one
sentence takes, alone, less what the model took (tokens included), which modelhost's statistics and Triton's answer say.
"""

import contextlib
import random
import re
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from bench.figure import Effort, Figure
from bench.h2_load import Load
from bench.hot_path import PATH
from bench.loopback_hub import LoopbackHub, Repo
from bench.models import minilm_dir
from bench.peers import servers
from bench.peers.bare import Bare
from bench.peers.calls import infer
from bench.peers.overhead import overhead
from bench.peers.servers import Model, Peer
from bench.running import running
from modelhost import Client
from modelhost.oip import open_inference_pb2 as oip

OURS, TRITON, BATCHING, MLSERVER, BARE = "modelhost", "triton", "batching", "mlserver", "bare"
MODEL, BATCHED = "minilm", "minilm-batched"
INPUTS, OUTPUTS = (
    [("text", "STRING", (1,))],
    [("embedding", "FP32", (384,)), ("model_ns", "INT64", (1,))],
)
ITEMS = 32
MESSAGES = 8
WARM = 2
ROUNDS = 3
"""At most: one takes a minute on two cores."""
TOLERANCE = 1e-4
WORDS = re.findall(
    r"\w+",
    "a daemon owns the devices of one machine and every application that runs there shares its "
    "models over a protocol which many clients speak already without any change at all",
)


@dataclass(frozen=True)
class Case:
    """One measurement: sentences of a request, requests at a time, requests in a round, what is expected."""

    sentences: int
    concurrency: int
    requests: int
    expected: str

    @property
    def name(self) -> str:
        """What it is called."""
        plural = "s" if self.sentences > 1 else ""
        return f"{self.sentences} sentence{plural}, c={self.concurrency}"


CASES = (
    Case(1, 1, 48, "1.0x"),
    Case(1, 8, 160, "1.4x"),
    Case(1, 32, 192, "1.6x"),
    Case(32, 1, 8, "1.2x"),
    Case(32, 8, 12, "1.3x"),
    Case(32, 32, 32, "1.3x"),
)


@dataclass(frozen=True)
class Target:
    """What a case is run on: where, and under which name the model is there."""

    peer: Peer
    model: str = MODEL


@dataclass
class Measured:
    """What was measured in each round: sentences a second, and CPU time of a sentence."""

    rates: list[float] = field(default_factory=list)
    cpu_ms: list[float] = field(default_factory=list)


def figures(effort: Effort) -> Sequence[Figure]:
    """Measure every case."""
    with targets() as found, Bare("minilm", minilm_dir()) as bare:
        for target in found.values():
            same(target, bare)
        measured: dict[tuple[str, str], Measured] = {}
        for number in range(min(effort.rounds, ROUNDS)):
            for case in CASES:
                for name, target in list(found.items())[:: 1 if number % 2 else -1]:
                    _run(
                        case,
                        target,
                        measured.setdefault((case.name, name), Measured()),
                        effort.scale,
                    )
            _loop(bare, measured.setdefault((BARE, BARE), Measured()), effort.scale)
        small = {name: request(target.model, texts(1, 0)) for name, target in found.items()}
        ours, triton = found[OURS].peer.target, found.get(TRITON)
        return [
            *(figure for case in CASES for figure in _figures(case, measured)),
            *overhead(
                (ours, small[OURS]),
                (triton.peer.target, small[TRITON]) if triton else None,
                effort,
            ),
        ]


@contextlib.contextmanager
def targets() -> Iterator[Mapping[str, Target]]:
    """Start a daemon and the peers that are installed, all of them with the model."""
    with (
        tempfile.TemporaryDirectory(prefix="mh-bench-") as scratch,
        contextlib.ExitStack() as stack,
    ):
        folder = Path(scratch)
        found = {OURS: Target(stack.enter_context(_ours()))}
        plain = Model("Sentences", INPUTS, OUTPUTS, ITEMS, weights=minilm_dir())
        batching = Model("Sentences", INPUTS, OUTPUTS, ITEMS, batching=True, weights=minilm_dir())
        triton = stack.enter_context(servers.triton({MODEL: plain, BATCHED: batching}, folder))
        if triton is not None:
            found |= {TRITON: Target(triton), BATCHING: Target(triton, BATCHED)}
        mlserver = stack.enter_context(servers.mlserver({MODEL: plain}, folder))
        if mlserver is not None:
            found[MLSERVER] = Target(mlserver)
        yield found


@contextlib.contextmanager
def _ours() -> Iterator[Peer]:
    repo = Repo.from_folder(minilm_dir(), pipeline_tag="sentence-similarity")
    threads = f"worker.threads={servers.THREADS}"
    with (
        LoopbackHub({f"bench/{MODEL}": repo}) as hub,
        running("--set", threads, endpoint=hub.endpoint, watched=False) as daemon,
        Client(daemon.users) as host,
    ):
        host.add(f"hf://bench/{MODEL}", MODEL, config={"device": "devices/cpu"})
        host.pull(MODEL)
        host.load(MODEL)
        yield Peer(OURS, daemon.tcp, (daemon.pid, *daemon.workers()))


def texts(count: int, seed: int) -> list[str]:
    """Return sentences of 4 to 40 words."""
    chance = random.Random(seed)
    return [" ".join(chance.choices(WORDS, k=chance.randint(4, 40))) for _ in range(count)]


def request(model: str, sentences: Sequence[str]) -> bytes:
    """Return an encoded request."""
    made = oip.ModelInferRequest(model_name=model, id="1")
    made.inputs.add(name="text", datatype="BYTES", shape=[len(sentences), 1])
    parts = (text.encode() for text in sentences)
    made.raw_input_contents.append(b"".join(len(p).to_bytes(4, "little") + p for p in parts))
    return made.SerializeToString()


def same(target: Target, bare: Bare) -> None:
    """Raise RuntimeError unless a server answers what the bare model does."""
    for count in (1, ITEMS):
        answer = infer(target.peer.target, request(target.model, texts(count, 0)))
        index = [output.name for output in answer.outputs].index("embedding")
        got = np.frombuffer(answer.raw_output_contents[index], np.float32).reshape(count, -1)
        wanted = np.array(bare.ask(texts=texts(count, 0))["made"], np.float32)
        difference = float(np.abs(got - wanted).max())
        if not difference < TOLERANCE:
            name = f"{target.peer.name}, {target.model}"
            raise RuntimeError(f"{name}: {count} sentences are {difference:g} from the bare model")


def _run(case: Case, target: Target, kept: Measured, scale: float) -> None:
    messages = [request(target.model, texts(case.sentences, seed)) for seed in range(MESSAGES)]
    requests = max(case.concurrency, int(case.requests * scale))
    with Load(target.peer.target, PATH) as load:
        load.run(*messages, concurrency=min(case.concurrency, WARM), requests=WARM)
        used = target.peer.cpu_s()
        run = load.run(*messages, concurrency=case.concurrency, requests=requests)
        spent = target.peer.cpu_s() - used
    kept.rates.append(run.rate * case.sentences)
    kept.cpu_ms.append(spent / requests / case.sentences * 1e3)


def _loop(bare: Bare, kept: Measured, scale: float) -> None:
    passes = max(2, int(MESSAGES * scale))
    for seed in range(2):
        found = bare.ask(texts=texts(ITEMS, seed), passes=passes)
        kept.rates.append(passes * ITEMS / found["seconds"])
        kept.cpu_ms.append(found["cpu_s"] / passes / ITEMS * 1e3)


def _figures(case: Case, measured: Mapping[tuple[str, str], Measured]) -> Iterator[Figure]:
    ours = measured[case.name, OURS]
    rate, cpu = statistics.median(ours.rates), statistics.median(ours.cpu_ms)
    alone = case.concurrency == 1
    beside = {
        "Triton": (TRITON, 0.95 if alone else 1.2),
        "Triton's batching": (BATCHING, None if alone else 1.0),
        "MLServer": (MLSERVER, 2.0),
    }
    for name, (peer, limit) in beside.items():
        theirs = measured.get((case.name, peer))
        yield Figure(
            f"embeddings, {case.name}, beside {name}", rate, "sentences/s", limit, True,
            statistics.median(theirs.rates) if theirs else None, True, case.expected, servers.ABSENT,
        )  # fmt: skip
        yield Figure(
            f"embeddings, {case.name}, CPU of a sentence, beside {name}", cpu, "ms",
            reference=statistics.median(theirs.cpu_ms) if theirs else None, absent=servers.ABSENT,
        )  # fmt: skip
    if case.sentences == ITEMS:
        bare = measured[BARE, BARE]
        yield Figure(
            f"embeddings, {case.name}, beside the bare model in a loop", rate, "sentences/s", 0.9, True,
            statistics.median(bare.rates), True, "1.1x",
        )  # fmt: skip
        yield Figure(
            f"embeddings, {case.name}, CPU of a sentence, beside the bare model", cpu, "ms",
            reference=statistics.median(bare.cpu_ms),
        )  # fmt: skip
