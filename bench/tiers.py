"""Copies in host memory beside devices: kept as long as their models are there, given up by the policy, or given up first.

    python bench/tiers.py [--requests N] [--seed N]

The models and traces of `policies.py` on one device and host memory, by the real planner (``core.residency``,
``core.host_tier``): a model comes from its copy (15 ms and a second for each 50 GB) or from disk (0.1 s and a second
for each 3 GB), where it takes a copy along if there is room. What is compared is whose copy makes that room. No
queues, no drains: requests come one by one. Of what they wait where copies beside devices never go they waited (8,000
requests, 12 traces):

             by policy      first
lru          0.98 to 1.00   0.86 to 1.24
cost-aware   0.85 to 0.99   0.69 to 1.09

So they go by the policy: that is never worse.
"""

import argparse
import math
import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

# Run as a script: the repository's root is not on the path by itself.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.policies import GB, TRACES, load_s, run, sizes
from modelhostd.core.eviction import POLICIES, Holding, Policy
from modelhostd.core.host_tier import HOST, Room, make_room
from modelhostd.core.residency import DeviceView, Evict, Want, plan
from modelhostd.core.resources import InstanceState

ROOMS: Mapping[str, tuple[int, int, int]] = {
    "120+256 GB": (120 * GB, 256 * GB, 65 * GB),
    "120+140 GB": (120 * GB, 140 * GB, 65 * GB),
    "40+96 GB": (40 * GB, 96 * GB, 30 * GB),
    "80+80 GB": (80 * GB, 80 * GB, 30 * GB),
}
"""Bytes of the device and of host memory, and those of the largest model."""

STAY, BY_POLICY, FIRST = "stay", "by policy", "first"
RULES = (STAY, BY_POLICY, FIRST)
"""What becomes of copies beside devices where room is needed."""


def swap_s(size: int) -> float:
    """Return what bringing so many bytes back from host memory takes."""
    return 0.015 + size / (50 * GB)


class Machine:
    """A device and host memory under a policy, and under one of the rules."""

    def __init__(
        self, models: Sequence[int], policy: str, rule: str, device_bytes: int, host_bytes: int
    ) -> None:
        self._models = models
        self._policy = Policy(policy)
        self._rule = rule
        self._device_bytes = device_bytes
        self._host_bytes = host_bytes
        self.resident: set[int] = set()
        self.copies: set[int] = set()
        self._uses: dict[int, tuple[float, float]] = {}

    def use(self, model: int, now: float) -> float:
        """Use a model; return the seconds that the request waited for it."""
        waited, size = 0.0, self._models[model]
        if model not in self.resident:
            view = DeviceView("d", self._device_bytes, [self._on_device(m) for m in self.resident])
            answer = plan(Want(str(model), size), {"d": view}, now, self._policy)
            if isinstance(answer, Evict):
                self.resident -= {int(m) for m in answer.victims}
            waited = swap_s(size) if model in self.copies else load_s(size)
            if model not in self.copies and (room := self._room(size, now)) is not None:
                self.copies -= {int(m) for m in room.victims}
                self.copies.add(model)
            self.resident.add(model)
        self._uses[model] = now, self._uses.get(model, (-math.inf, 0.0))[0]
        return waited

    def _room(self, size: int, now: float) -> Room | None:
        copies = [self._copy(m) for m in self.copies]
        if self._rule == FIRST:
            beside = [h for h in copies if h.state is InstanceState.READY]
            warm = [replace(h, bound=True) for h in copies if h.state is InstanceState.WARM]
            view = DeviceView(HOST, self._host_bytes, [*beside, *warm])
            if (found := make_room(view, size, now, self._policy)) is not None:
                return found
        return make_room(DeviceView(HOST, self._host_bytes, copies), size, now, self._policy)

    def _on_device(self, model: int) -> Holding:
        takes_s = swap_s if model in self.copies else load_s
        return self._holding(model, "d", takes_s(self._models[model]))

    def _copy(self, model: int) -> Holding:
        copy = self._holding(model, HOST, load_s(self._models[model]))
        return replace(copy, bound=self._rule == STAY and model in self.resident)

    def _holding(self, model: int, place: str, takes_s: float) -> Holding:
        last, before = self._uses[model]
        return Holding(
            model=str(model),
            device=place,
            bytes=self._models[model],
            state=InstanceState.READY if model in self.resident else InstanceState.WARM,
            last_used=last,
            second_last_use=before,
            load_s=takes_s,
        )


def measure(
    requests: int = 8_000, seed: int = 1
) -> Mapping[tuple[str, str, str], Mapping[str, float]]:
    """Return (policy, rooms, trace) -> rule -> milliseconds that a request waits, the first fifth not counted."""
    found = {}
    for rooms, (device_bytes, host_bytes, largest) in ROOMS.items():
        for name, make in TRACES.items():
            randomness = random.Random(f"{seed} {name}")
            models = [min(size, largest) for size in sizes(randomness)]
            trace = make(randomness, requests)
            for policy in POLICIES:
                found[policy, rooms, name] = {
                    rule: run(
                        trace, Machine(models, policy, rule, device_bytes, host_bytes).use
                    ).mean_added_ms
                    for rule in RULES
                }
    return found


def main() -> None:
    """Print one line for each policy, machine and trace."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=8_000)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    print(
        f"{'policy':<11} {'device+host':<11} {'trace':<19} {'stay ms':>8} {BY_POLICY:>10} {FIRST:>7}"
    )
    for (policy, rooms, trace), rules in measure(given.requests, given.seed).items():
        shares = [rules[rule] / rules[STAY] for rule in RULES[1:]]
        print(
            f"{policy:<11} {rooms:<11} {trace:<19} {rules[STAY]:8.1f} "
            f"{shares[0]:9.2f}x {shares[1]:6.2f}x"
        )


if __name__ == "__main__":
    main()
