"""Text generation of a small language model with random weights, beside the library's own ``generate``.

The bare loop calls ``generate`` for one prompt after the other, in a process of its own with the same threads (one for
each core). Prompts of 8 to 64 bytes, 64 tokens each, the likeliest ones; texts are compared before anything is
timed. Rates are of whole texts by ModelInfer; the time to the first token is a stream's until its first piece, its
reference that of ``generate`` for one token.
"""

import concurrent.futures
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from bench.figure import Effort, Figure
from bench.h2_load import Load
from bench.hot_path import PATH
from bench.loopback_hub import LoopbackHub, Repo
from bench.models import make_generator
from bench.peers.bare import Bare
from bench.peers.calls import SERVICE, infer
from bench.peers.servers import THREADS, Peer
from bench.running import running
from modelhost import Client
from modelhost.oip import open_inference_pb2 as oip

MODEL = "generator"
TOKENS = 64
PROMPTS = ["go on:", *("a text of some length, " * (1 + n % 3) + str(n) for n in range(7))]
CALL_S = 60.0


@dataclass
class Measured:
    """Values of all rounds for one concurrency; of streams those of each text."""

    rates: list[float] = field(default_factory=list)
    cpu_us: list[float] = field(default_factory=list)
    streamed: list[float] = field(default_factory=list)
    first_ms: list[float] = field(default_factory=list)


def figures(effort: Effort) -> Sequence[Figure]:
    """Measure 1 and 8 texts at a time."""
    with tempfile.TemporaryDirectory(prefix="mh-bench-") as scratch:
        folder = make_generator(Path(scratch) / "model")
        with _daemon(folder) as daemon, Bare("generator", folder) as bare:
            _same(daemon, bare)
            ours = {1: Measured(), 8: Measured()}
            alone = Measured()
            texts = max(8, int(24 * effort.scale))
            for _ in range(effort.rounds):
                _bare(bare, alone, texts)
                for concurrency, kept in ours.items():
                    _texts(daemon, concurrency, texts * (2 if concurrency > 1 else 1), kept)
                    _streams(daemon.target, concurrency, kept)
            return [
                *_figures(1, ours[1], alone, 0.9, "1.0x"),
                *_figures(8, ours[8], alone, 3.0, "4.5x"),
            ]


@contextmanager
def _daemon(folder: Path) -> Iterator[Peer]:
    repo = Repo.from_folder(folder, pipeline_tag="text-generation")
    with (
        LoopbackHub({f"bench/{MODEL}": repo}) as hub,
        running("--set", f"worker.threads={THREADS}", endpoint=hub.endpoint) as daemon,
        Client(daemon.users) as host,
    ):
        host.add(f"hf://bench/{MODEL}", MODEL, config={"device": "devices/cpu"})
        host.pull(MODEL)
        host.load(MODEL)
        yield Peer("modelhost", daemon.users, (daemon.pid, *daemon.workers()))


def request(prompt: str, *, stream: bool = False) -> oip.ModelInferRequest:
    """Return a request for a text."""
    made = oip.ModelInferRequest(model_name=MODEL, id="1")
    made.parameters["max_tokens"].int64_param = TOKENS
    made.parameters["temperature"].double_param = 0.0
    made.inputs.add(name="text_input", datatype="BYTES", shape=[1])
    text = prompt.encode()
    made.raw_input_contents.append(len(text).to_bytes(4, "little") + text)
    made.inputs.add(name="stream", datatype="BOOL", shape=[1])
    made.raw_input_contents.append(bytes([stream]))
    return made


def _same(daemon: Peer, bare: Bare) -> None:
    """Raise RuntimeError unless the daemon's texts are those of ``generate``."""
    wanted = bare.ask(prompts=PROMPTS, tokens=TOKENS)["made"]
    for prompt, text in zip(PROMPTS, wanted, strict=True):
        answer = infer(daemon.target, request(prompt).SerializeToString())
        index = [output.name for output in answer.outputs].index("text_output")
        got = answer.raw_output_contents[index][4:].decode()
        if got != text:
            raise RuntimeError(f"'{prompt}' goes on with {got!r}, and {text!r} by generate")


def _bare(bare: Bare, kept: Measured, texts: int) -> None:
    passes = max(1, texts // len(PROMPTS))
    found = bare.ask(prompts=PROMPTS, tokens=TOKENS, passes=passes)
    tokens = passes * len(PROMPTS) * TOKENS
    kept.rates.append(tokens / found["seconds"])
    kept.cpu_us.append(found["cpu_s"] / tokens * 1e6)
    first = bare.ask(prompts=PROMPTS, tokens=1, passes=passes)
    kept.first_ms.append(first["seconds"] / passes / len(PROMPTS) * 1e3)


def _texts(daemon: Peer, concurrency: int, texts: int, kept: Measured) -> None:
    messages = [request(prompt).SerializeToString() for prompt in PROMPTS]
    with Load(daemon.target, PATH) as load:
        load.run(*messages, concurrency=concurrency, requests=concurrency)
        used = daemon.cpu_s()
        run = load.run(*messages, concurrency=concurrency, requests=texts)
        kept.cpu_us.append((daemon.cpu_s() - used) / texts / TOKENS * 1e6)
    kept.rates.append(run.rate * TOKENS)


def _streams(target: str, concurrency: int, kept: Measured) -> None:
    """Read one text of each prompt by a stream of its own, so many at a time."""
    with (
        grpc.insecure_channel(target) as channel,
        concurrent.futures.ThreadPoolExecutor(concurrency) as pool,
    ):
        stream = channel.stream_stream(
            f"{SERVICE}/ModelStreamInfer",
            request_serializer=oip.ModelInferRequest.SerializeToString,
            response_deserializer=oip.ModelStreamInferResponse.FromString,
        )

        def read(prompt: str) -> float:
            begun = time.perf_counter()
            first = 0.0
            for answer in stream(iter([request(prompt, stream=True)]), timeout=CALL_S):
                if answer.error_message:
                    raise RuntimeError(answer.error_message)
                first = first or time.perf_counter() - begun
            return first * 1e3

        read(PROMPTS[0])
        begun = time.perf_counter()
        kept.first_ms += pool.map(read, PROMPTS)
        kept.streamed.append(len(PROMPTS) * TOKENS / (time.perf_counter() - begun))


def _figures(
    concurrency: int, ours: Measured, alone: Measured, limit: float, expected: str
) -> Iterator[Figure]:
    median = statistics.median
    name = f"generation, c={concurrency}"
    yield Figure(
        f"{name}, beside generate", median(ours.rates), "tokens/s", limit, True,
        median(alone.rates), True, expected,
    )  # fmt: skip
    yield Figure(
        f"{name}, streamed", median(ours.streamed), "tokens/s", reference=median(alone.rates)
    )
    yield Figure(
        f"{name}, CPU of a token", median(ours.cpu_us), "us", reference=median(alone.cpu_us)
    )
    yield Figure(
        f"{name}, time to the first token, median", median(ours.first_ms), "ms",
        reference=median(alone.first_ms),
    )  # fmt: skip
    yield Figure(f"{name}, time to the first token, max", max(ours.first_ms), "ms")
