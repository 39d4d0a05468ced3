"""A thousand random steps on a whole daemon with real workers: no deadlock, no broken book, no untyped error."""

import functools

import hypothesis
import pytest
from hypothesis.stateful import run_state_machine_as_test

from bench.faulty_scene import scene
from tests import event_validators as validate
from tests.hostile.live import SURPRISES
from tests.hostile.profile import examples
from tests.live.machine import SIZES, Residents, World

RUNS, STEPS = 30, 50
WANTED = 1000
FLAGS = ("--set", "worker.arena_bytes=1MiB", "--set", "worker.health_interval_s=1")


@pytest.mark.timeout(900)
@pytest.mark.parametrize("device", ["cpu"])
def test_whatever_clients_do_everything_ends_and_the_books_balance(device: str) -> None:
    """Loads, requests, crashes, pins, leases, budgets and cancellations in any order, by hypothesis."""
    start = functools.partial(
        scene, *FLAGS, environment={"FAULTY_HEARTBEAT_S": "0.25"}, sizes=SIZES
    )
    settings = hypothesis.settings(
        max_examples=examples(RUNS),
        stateful_step_count=STEPS,
        deadline=None,
        # A finding is shown with its steps as it was; fewer of them, each with a new daemon, take minutes.
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    with World(start, device) as world:
        Residents.world = world
        try:
            run_state_machine_as_test(Residents, settings=settings)
        except Exception as error:
            raise AssertionError(world.finding) from error
        print(f"{world.steps} steps, {world.crashes} crashes asked for, refusals {world.reasons}")
        assert world.steps >= WANTED
        validate.check_order([seen.event for seen in world.scene.watcher.seen])
        assert not [word for word in SURPRISES if word != "Traceback" and word in world.scene.log]
