"""A thousand random steps on a whole daemon with real workers: no deadlock, no broken book, no untyped error."""

import pytest

from tests.hostile.profile import examples
from tests.live.steps import run, world_on


@pytest.mark.timeout(2700)
@pytest.mark.parametrize(("device", "runs", "wanted"), [("cpu", 30, 1000), ("sim-0", 10, 300)])
def test_whatever_clients_do_everything_ends_and_the_books_balance(
    device: str, runs: int, wanted: int
) -> None:
    """Loads, requests, crashes, pins, leases, budgets and cancellations in any order, by hypothesis.

    On ``sim-0`` models go to host memory and come back meanwhile, and their answers stay the same.
    """
    with world_on(device) as world:
        run(world, examples(runs))
        print(f"{world.steps} steps, {world.crashes} crashes asked for, refusals {world.reasons}")
        assert world.steps >= wanted
