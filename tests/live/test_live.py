"""A thousand random steps on a whole daemon with real workers: no deadlock, no broken book, no untyped error."""

import functools

import hypothesis
import pytest
from hypothesis.stateful import run_state_machine_as_test

from bench.faulty_scene import BACKEND, scene
from tests import event_validators as validate
from tests.hostile.live import SURPRISES
from tests.hostile.profile import examples
from tests.live.machine import SIZES, Residents, World

STEPS = 50
FLAGS = ("--set", "worker.arena_bytes=1MiB", "--set", "worker.health_interval_s=1")
SIM = ("--set", "devices.sim_bytes=2MB")
IMAGED = "imaged = bench.imaged_backend:ImagedBackend"


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("device", "backend", "runs", "wanted"),
    [("cpu", BACKEND, 30, 1000), ("sim-0", IMAGED, 10, 300)],
    ids=["cpu", "sim-0"],
)
def test_whatever_clients_do_everything_ends_and_the_books_balance(
    device: str, backend: str, runs: int, wanted: int
) -> None:
    """Loads, requests, crashes, pins, leases, budgets and cancellations in any order, by hypothesis.

    On ``sim-0`` models go to host memory and come back meanwhile, and their answers stay the same.
    """
    flags = (*FLAGS, *SIM) if device == "sim-0" else FLAGS
    start = functools.partial(
        scene, *flags, environment={"FAULTY_HEARTBEAT_S": "0.25"}, sizes=SIZES, backend=backend
    )
    settings = hypothesis.settings(
        max_examples=examples(runs),
        stateful_step_count=STEPS,
        deadline=None,
        # A finding is shown with its steps as it was; fewer of them, each with a new daemon, take minutes.
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    with World(start, device, backend.partition(" ")[0]) as world:
        Residents.world = world
        try:
            run_state_machine_as_test(Residents, settings=settings)
        except Exception as error:
            raise AssertionError(world.finding) from error
        print(f"{world.steps} steps, {world.crashes} crashes asked for, refusals {world.reasons}")
        assert world.steps >= wanted
        validate.check_order([seen.event for seen in world.scene.watcher.seen])
        assert not [word for word in SURPRISES if word != "Traceback" and word in world.scene.log]
