"""Random commands, lost clients, failing commits, worker crashes and restarts on a whole host."""

from pathlib import Path

import pytest

from tests.fakes.clock import settle
from tests.host.chaos import BUDGET, HOST_BUDGET, SIZES, Chaos
from tests.host.support import World
from tests.support import DEADLINE_S

RUNS = 4
STEPS = 60
SEEDS = (*range(12), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(12, 400)))


@pytest.mark.parametrize("seed", SEEDS)
async def test_nothing_is_lost_and_everything_ends(tmp_path: Path, seed: int) -> None:
    """After any mix of commands and faults what was acknowledged is there, and every operation ends."""
    world = World(tmp_path)
    chaos = Chaos(world, seed)
    for number in range(RUNS):
        async with world.host(budget=BUDGET, host_budget=HOST_BUDGET) as run:
            chaos.restarted(run)
            for _ in range(STEPS):
                await chaos.step(run)
                await settle(chaos.random.randrange(4))
                chaos.check(run)
            if number < RUNS - 1 and chaos.random.random() < 0.7:
                await chaos.crash(run)
                continue
            await chaos.quiet(run)
            for model in SIZES:
                if model in run.host.registry.committed.models:
                    await run.host.models.pin(model, pinned=False)
                    await run.host.residency.unblock(model)
            for model in run.host.models.list():
                if model.available is not None:
                    assert await run.infer(model.id, DEADLINE_S) == b"x"
        chaos.check_disk()
