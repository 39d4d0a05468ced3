"""A whole daemon and its real workers: a model that crashes moves out, one that is sick is loaded anew."""

from collections.abc import Iterator

import pytest

from bench.faulty_scene import Scene, scene, wait_for
from modelhost.v1.instances_pb2 import Health, Instance
from modelhost.v1.models_pb2 import ModelConfig

FLAGS = ("--set", "worker.arena_bytes=1MiB", "--set", "worker.health_interval_s=0.5")


@pytest.fixture(scope="module")
def at() -> Iterator[Scene]:
    """A daemon with two models in the worker of its device."""
    with scene(*FLAGS, environment={"FAULTY_HEARTBEAT_S": "0.25"}) as made:
        made.model("m")
        made.model("n")
        yield made


def ready(at: Scene, model: str, after: int) -> Instance:
    """Return the model's READY instance once it is a newer one than of the generation ``after``."""

    def found() -> Instance | None:
        instances = at.client.instances(model, states=["READY"])
        return next((i for i in instances if i.generation > after), None)

    return wait_for(f"{model} is back", found)


def crash(at: Scene, model: str) -> Instance:
    """Have a model take its worker down, and wait until it is back."""
    before = at.client.instance(model)
    at.infer(model, "segv").exception()
    return ready(at, model, before.generation)


def test_at_its_second_crash_a_model_moves_out(at: Scene) -> None:
    """After two crashes it is in a process of its own, an event says why, and the third hurts nobody."""
    assert at.pid("m") == at.pid("n")
    for _ in range(2):
        other = at.client.instance("n").generation
        moved = crash(at, "m")
        ready(at, "n", other)
    assert moved.isolation == ModelConfig.PROCESS
    assert at.pid("m") != at.pid("n")
    wait_for("the event", lambda: at.watcher.of("ISOLATED", "m"))
    details = at.watcher.of("ISOLATED", "m")[0].event.details
    assert details["exit"] == "signal SIGSEGV"
    assert "2 times" in details["why"]
    stays, pid = at.client.instance("n"), at.pid("n")
    crash(at, "m")
    assert at.client.instance("n").generation == stays.generation
    assert at.pid("n") == pid
    at.client.unblock("m")
    at.client.reload("m")
    assert at.pid("m") == pid


def test_a_model_whose_canary_fails_is_loaded_anew(at: Scene) -> None:
    """Its health is told with the canary's words; then there is a new instance, and that one is well."""
    before = at.client.instance("n")
    at.infer("n", "sicken").result()
    after = ready(at, "n", before.generation)
    assert after.health.status == Health.HEALTHY
    at.told()
    assert at.watcher.of("HEALTH", "n")[0].event.details["why"] == "As it was told."
    assert at.watcher.of("UNHEALTHY", "n")[0].event.details["reloads"] == "0 of 3"
    assert at.client.ready("n")
