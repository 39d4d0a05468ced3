"""What a request takes beside its model: the time of each less the time that the model took for it."""

from collections.abc import Iterator

from bench.figure import Effort, Figure
from bench.h2_load import Load
from bench.hot_path import PATH
from bench.inference import percentile
from bench.peers import servers
from bench.peers.calls import model_times
from modelhost.oip import open_inference_pb2 as oip

REQUESTS = 100
WARM = 5


def overhead(
    ours: tuple[str, bytes], triton: tuple[str, bytes] | None, effort: Effort
) -> Iterator[Figure]:
    """Measure a daemon and, where it is there, Triton; each given by its address and an encoded request."""
    requests = max(5, int(REQUESTS * effort.scale))
    found: list[float] = []
    beside: list[float] = []
    for _ in range(effort.rounds):
        found += _by_statistics(*ours, requests)
        if triton is not None:
            beside += _by_answers(*triton, requests)
    for name, share in (("p50", 0.5), ("p99", 0.99)):
        yield Figure(
            f"overhead of a request of 1 sentence, {name}, beside Triton",
            percentile(found, share), "ms",
            reference=percentile(beside, share) if beside else None,
            expected={"p50": "0.6 ms", "p99": "1.5 ms"}[name], absent=servers.ABSENT,
        )  # fmt: skip


def _by_statistics(target: str, request: bytes, requests: int) -> list[float]:
    """Return the overhead of requests in ms, by what the server's statistics say of the model."""
    name = oip.ModelInferRequest.FromString(request).model_name
    found = []
    with Load(target, PATH) as load, model_times(target, name) as total_ns:
        load.run(request, concurrency=1, requests=WARM)
        before = total_ns()
        for _ in range(requests):
            took = load.run(request, concurrency=1, requests=1).latencies[0]
            after = total_ns()
            found.append(took * 1e3 - (after - before) / 1e6)
            before = after
    return found


def _by_answers(target: str, request: bytes, requests: int) -> list[float]:
    """Return the overhead of requests in ms, by the ``model_ns`` that each answer has."""
    found = []
    with Load(target, PATH, keep=True) as load:
        load.run(request, concurrency=1, requests=WARM)
        for _ in range(requests):
            took = load.run(request, concurrency=1, requests=1).latencies[0]
            answer = oip.ModelInferResponse.FromString(load.answer)
            index = [output.name for output in answer.outputs].index("model_ns")
            model_ns = int.from_bytes(answer.raw_output_contents[index], "little")
            found.append(took * 1e3 - model_ns / 1e6)
    return found
