"""Eviction policies over generated traces: the real planner against the offline optimum.

    python bench/policies.py [--requests N] [--seed N]

80 models of 0.13 to 65 GB on one device; a model that is not resident is loaded (0.1 s and a second for each 3 GB)
and the planner of ``core.residency`` says who goes. Requests come one by one and take no time, so what is
compared is the choice of the victim alone: no queues, no drains, no host RAM tier. The optimum knows the
trace: it evicts what is used again last, weighed like ``cost-aware`` does; for models of different sizes no
exact optimum can be computed, so it is a strong reference and no bound.
"""

import argparse
import math
import random
import sys
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

# Run as a script: the repository's root is not on the path by itself.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.figure import Effort, Figure
from modelhostd.core.eviction import POLICIES, Holding, Policy
from modelhostd.core.residency import DeviceView, Evict, Fits, Want, plan
from modelhostd.core.resources import InstanceState

GB = 10**9
MODELS = 80
BUDGET_BYTES = 120 * GB
FIXED_LOAD_S = 0.1
BYTES_PER_S = 3 * GB
EXPECTED = {"cost-aware": "0.8x to 1.0x", "offline": "0.6x to 0.8x"}
WARM_UP = 0.2
"""The share of a trace that is not counted."""

Trace = Sequence[tuple[float, int]]
"""(second, model), in order."""


@dataclass(frozen=True, slots=True)
class Result:
    """What a policy made of a trace, after the warm-up."""

    mean_added_ms: float
    hit_rate: float
    loads: int


# --- traces -------------------------------------------------------------------------------------------


def sizes(randomness: random.Random) -> Sequence[int]:
    """Return the models' bytes: log-uniform from 0.13 to 65 GB."""
    low, high = math.log(0.13 * GB), math.log(65 * GB)
    return [int(math.exp(randomness.uniform(low, high))) for _ in range(MODELS)]


def zipf(
    randomness: random.Random, count: int, *, drift_every: int = 0, models: int = MODELS
) -> Trace:
    """Return independent requests, the n-th most wanted model with weight n^-0.9, one a second.

    With ``drift_every`` two models change places that often: what is wanted changes slowly.
    """
    ranks = list(range(models))
    randomness.shuffle(ranks)
    weights = [(place + 1) ** -0.9 for place in range(models)]
    trace = []
    for number in range(count):
        if drift_every and number % drift_every == 0:
            one, two = randomness.randrange(models), randomness.randrange(models)
            ranks[one], ranks[two] = ranks[two], ranks[one]
        trace.append((float(number), ranks[randomness.choices(range(models), weights)[0]]))
    return trace


def bursts(randomness: random.Random, count: int) -> Trace:
    """Return what people do: a model is used 20 times on average within a minute or so, then left alone."""

    def comings() -> Iterator[tuple[float, int]]:
        weights = [(place + 1) ** -0.9 for place in range(MODELS)]
        start = 0.0
        while True:
            start += randomness.expovariate(1 / 30)
            model = randomness.choices(range(MODELS), weights)[0]
            time = start
            for _ in range(1 + int(randomness.expovariate(1 / 19))):
                yield time, model
                time += randomness.expovariate(1 / 3)

    source = comings()
    return sorted(next(source) for _ in range(count))


TRACES: Mapping[str, Callable[[random.Random, int], Trace]] = {
    "Zipf 0.9": zipf,
    "Zipf 0.9, drifting": lambda randomness, count: zipf(randomness, count, drift_every=200),
    "bursts": bursts,
}


# --- policies -----------------------------------------------------------------------------------------


def load_s(size: int) -> float:
    """Return what loading so many bytes takes."""
    return FIXED_LOAD_S + size / BYTES_PER_S


class Device:
    """One device under a policy of the planner's."""

    def __init__(
        self,
        models: Sequence[int],
        policy: str,
        budget_bytes: int = BUDGET_BYTES,
        takes_s: Callable[[int], float] = load_s,
    ) -> None:
        self._models = models
        self._policy = Policy(policy)
        self._budget_bytes = budget_bytes
        self._takes_s = takes_s
        self._resident: set[int] = set()
        self._uses: dict[int, tuple[float, float]] = {}

    def use(self, model: int, now: float) -> float:
        """Use a model; return the seconds that the request waited for a load."""
        waited = 0.0
        if model not in self._resident:
            self._resident -= self._victims(model, now)
            self._resident.add(model)
            waited = self._takes_s(self._models[model])
        self._uses[model] = (now, self._uses.get(model, (-math.inf, 0.0))[0])
        return waited

    def _victims(self, model: int, now: float) -> set[int]:
        view = DeviceView("d", self._budget_bytes, [self._holding(m) for m in self._resident])
        answer = plan(Want(str(model), self._models[model]), {"d": view}, now, self._policy)
        assert isinstance(answer, Fits | Evict), answer
        return set() if isinstance(answer, Fits) else {int(m) for m in answer.victims}

    def _holding(self, model: int) -> Holding:
        last, before = self._uses[model]
        return Holding(
            model=str(model),
            device="d",
            bytes=self._models[model],
            state=InstanceState.READY,
            last_used=last,
            second_last_use=before,
            load_s=self._takes_s(self._models[model]),
        )


class Foresight:
    """The offline reference: evicts what is needed again last, weighed by bytes a second of loading."""

    def __init__(self, models: Sequence[int], trace: Trace) -> None:
        self._models = models
        self._resident: set[int] = set()
        self._coming: dict[int, list[float]] = {model: [] for model in range(len(models))}
        for time, model in trace:
            self._coming[model].append(time)

    def use(self, model: int, now: float) -> float:
        """Use a model; return the seconds that the request waited for a load."""
        if model in self._resident:
            return 0.0
        size = self._models[model]
        free = BUDGET_BYTES - sum(self._models[m] for m in self._resident)
        for victim in sorted(self._resident, key=lambda m: self._worth(m, now)):
            if free >= size:
                break
            self._resident.discard(victim)
            free += self._models[victim]
        self._resident.add(model)
        return load_s(size)

    def _worth(self, model: int, now: float) -> float:
        times = self._coming[model]
        place = bisect_right(times, now)
        until = times[place] - now if place < len(times) else math.inf
        return -until * self._models[model] / load_s(self._models[model])


def run(trace: Trace, use: Callable[[int, float], float]) -> Result:
    """Send a trace and return what came of the part behind the warm-up."""
    counted = [use(model, time) for time, model in trace][int(len(trace) * WARM_UP) :]
    loads = sum(waited > 0 for waited in counted)
    return Result(1e3 * sum(counted) / len(counted), 1 - loads / len(counted), loads)


def measure(requests: int = 20_000, seed: int = 1) -> Mapping[str, Mapping[str, Result]]:
    """Return trace -> policy (or ``offline``) -> result."""
    found: dict[str, dict[str, Result]] = {}
    for name, make in TRACES.items():
        randomness = random.Random(f"{seed} {name}")
        models = sizes(randomness)
        trace = make(randomness, requests)
        found[name] = {policy: run(trace, Device(models, policy).use) for policy in POLICIES}
        found[name]["offline"] = run(trace, Foresight(models, trace).use)
    return found


def figures(effort: Effort) -> Sequence[Figure]:
    """Return what each policy adds to a request, beside ``lru`` on the same traces."""
    return [
        Figure(
            f"added by loads, {trace}, {policy}", result.mean_added_ms, "ms",
            reference=results["lru"].mean_added_ms, expected=EXPECTED[policy],
        )
        for trace, results in measure(int(20_000 * effort.scale)).items()
        for policy, result in results.items()
        if policy != "lru"
    ]  # fmt: skip


def main() -> None:
    """Print one line for each trace and policy."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    print(f"{'trace':<20} {'policy':<11} {'added ms':>9} {'of lru':>7} {'hits':>6} {'loads':>6}")
    for trace, results in measure(given.requests, given.seed).items():
        for policy, result in results.items():
            share = result.mean_added_ms / results["lru"].mean_added_ms
            print(
                f"{trace:<20} {policy:<11} {result.mean_added_ms:9.1f} {share:6.2f}x "
                f"{result.hit_rate:6.1%} {result.loads:6}"
            )


if __name__ == "__main__":
    main()
