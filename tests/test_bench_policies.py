"""The simulation of eviction policies: it keeps the budget, and hindsight is not beaten by much."""

import random

import pytest

from bench import tiers
from bench.policies import BUDGET_BYTES, TRACES, Device, Foresight, load_s, run, sizes
from modelhostd.core.eviction import POLICIES

REQUESTS = 1500


@pytest.mark.parametrize("name", TRACES)
@pytest.mark.parametrize("policy", POLICIES)
def test_a_policy_serves_a_trace_within_the_budget(name: str, policy: str) -> None:
    """Every request waits for nothing or for its model's load, and no more is resident than fits."""
    randomness = random.Random(name)
    models = sizes(randomness)
    trace = TRACES[name](randomness, REQUESTS)
    assert len(trace) == REQUESTS
    assert [time for time, _ in trace] == sorted(time for time, _ in trace)
    device = Device(models, policy)
    for time, model in trace:
        assert device.use(model, time) in (0.0, load_s(models[model]))
        assert sum(models[m] for m in device._resident) <= BUDGET_BYTES
        assert model in device._resident


@pytest.mark.parametrize("name", TRACES)
def test_hindsight_is_the_better_policy(name: str) -> None:
    """Who knows what comes next adds less than any policy on the same trace."""
    randomness = random.Random(name)
    models = sizes(randomness)
    trace = TRACES[name](randomness, 4 * REQUESTS)
    offline = run(trace, Foresight(models, trace).use)
    for policy in POLICIES:
        found = run(trace, Device(models, policy).use)
        assert offline.mean_added_ms <= found.mean_added_ms
        assert 0.0 < found.hit_rate < 1.0


@pytest.mark.parametrize("rule", tiers.RULES)
@pytest.mark.parametrize("policy", POLICIES)
def test_two_tiers_serve_a_trace_within_both_budgets(policy: str, rule: str) -> None:
    """Device and host memory hold what they may; a request waits for nothing, for a copy or for disk."""
    randomness = random.Random(rule)
    device_bytes, host_bytes, largest = tiers.ROOMS["40+96 GB"]
    models = [min(size, largest) for size in sizes(randomness)]
    machine = tiers.Machine(models, policy, rule, device_bytes, host_bytes)
    waits = set()
    for time, model in TRACES["bursts"](randomness, REQUESTS):
        size, had_copy = models[model], model in machine.copies
        waited = machine.use(model, time)
        assert waited in (0.0, tiers.swap_s(size) if had_copy else load_s(size))
        waits.add((waited > 0) + (waited > 0 and not had_copy))
        assert sum(models[m] for m in machine.resident) <= device_bytes
        assert sum(models[m] for m in machine.copies) <= host_bytes
    assert waits == {0, 1, 2}
