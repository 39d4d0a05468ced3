"""How runs of the machine are made: on which device, with which flags, and what is told of one that found something."""

import functools

import hypothesis
from hypothesis.stateful import run_state_machine_as_test

from bench.faulty_scene import BACKEND, scene
from tests import event_validators as validate
from tests.hostile.live import SURPRISES
from tests.live.files import Library
from tests.live.machine import Residents
from tests.live.world import SIZES, World

STEPS = 50
FLAGS = ("--set", "worker.arena_bytes=1MiB", "--set", "worker.health_interval_s=1")
SIM = ("--set", "devices.sim_bytes=2MB")
IMAGED = "imaged = bench.imaged_backend:ImagedBackend"
DEVICES = {"cpu": BACKEND, "sim-0": IMAGED}
"""The backend by device: on sim-0 weights leave for host memory and come back."""


def world_on(device: str) -> World:
    """Return a world whose daemons serve models on a device."""
    backend = DEVICES[device]
    flags = (*FLAGS, *SIM) if device == "sim-0" else FLAGS
    start = functools.partial(
        scene, *flags, environment={"FAULTY_HEARTBEAT_S": "0.25"}, sizes=SIZES, backend=backend
    )
    return World(start, device, backend.partition(" ")[0])


def run(world: World, runs: int, seed: int | None = None) -> None:
    """Make so many runs; raises AssertionError with the steps of the first that found something."""
    settings = hypothesis.settings(
        max_examples=runs,
        stateful_step_count=STEPS,
        deadline=None,
        database=None,
        # A finding is shown with its steps as it was; fewer of them, each with a new daemon, take minutes.
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    Residents.world = world
    machine = Library if seed is None else hypothesis.seed(seed)(Library)
    try:
        run_state_machine_as_test(machine, settings=settings)
    except Exception as error:
        raise AssertionError(world.finding) from error
    validate.check_order([seen.event for seen in world.scene.watcher.seen])
    # A worker writes a traceback for each request that was told to fail.
    surprises = [word for word in SURPRISES if word != "Traceback" and word in world.scene.log]
    assert not surprises, world.scene.log
