"""Verifications, checks, pruning, policies, deletions and downloads against each other, in virtual time."""

from pathlib import Path

import pytest

from tests.fakes.clock import settle
from tests.host.storage_chaos import MODELS, StorageChaos

RUNS = 3
STEPS = 50
SEEDS = (*range(12), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(12, 300)))


@pytest.mark.parametrize("seed", SEEDS)
async def test_what_is_shown_is_whole_and_nothing_is_left_over(tmp_path: Path, seed: int) -> None:
    """At every moment each AVAILABLE artifact is on disk, and only damaged ones are QUARANTINED; after it
    all there is no file without a row, no promise, no operation without an end.
    """
    chaos = StorageChaos(tmp_path, seed)
    for number in range(RUNS):
        # What a daemon has published itself it knows; what its predecessor did, it does not.
        chaos.files.published.clear()
        async with chaos.world.host() as run:
            for model in MODELS:
                if model not in run.host.registry.committed.models:
                    await chaos.create(run, model)
            for _ in range(STEPS):
                await chaos.step(run)
                await settle(chaos.random.randrange(8))
                chaos.check(run)
            if number < RUNS - 1 and chaos.random.random() < 0.6:
                await chaos.crash(run)
                continue
            await chaos.quiet(run)
