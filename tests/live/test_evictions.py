"""A whole daemon and its real workers: loads pass those they do not compete with, and a victim that is asked comes back."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.faulty_scene import BACKEND, CALL_S, Scene, scene, wait_for
from modelhost import OperationHandle
from modelhost.v1 import operations_pb2
from modelhost.v1.instances_pb2 import Instance
from tests.live.machine import ANSWERS
from tests.live.steps import IMAGED

SIZES = {"a": 400_000, "b": 400_000, "c": 400_000, "small": 100_000}
ROOM = 600_000
FLAGS = (
    *("--set", "worker.arena_bytes=1MiB", "--set", "devices.sim_bytes=2MB"),
    *("--set", f"budgets=sim-0={ROOM}", "--set", "settings.host_budget_bytes=8MB"),
    # A request that is held open is not cancelled, however slow the machine is.
    *("--set", "settings.drain_timeout_s=600"),
)
WAITING = (operations_pb2.Operation.QUEUED, operations_pb2.Operation.RUNNING)


@pytest.fixture(scope="module")
def at() -> Iterator[Scene]:
    """A daemon with models for a device that has room for one of the large ones, and one for the CPU."""
    with scene(*FLAGS, sizes=SIZES, backend=f"{IMAGED},{BACKEND}") as made:
        for name, size in SIZES.items():
            config = {
                "backend": "imaged",
                "backend_options": {"bytes": size},
                "device": "devices/sim-0",
            }
            made.client.add(f"hf://org/{name}", name, config=config)
            made.client.pull(name)
        made.client.add("hf://org/tiny", "elsewhere", config={"backend": "faulty"})
        made.client.pull("elsewhere")
        made.client.load("elsewhere")
        yield made


@pytest.fixture
def gate(at: Scene, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A file that ends the requests which wait for it."""
    made = at.folder / request.node.name
    yield made
    made.touch()


def busy(at: Scene, model: str, gate: Path) -> Any:
    """Load a model alone on its device, and return a request that keeps it busy until ``gate`` is there."""
    for name in SIZES:
        at.client.unload(name)
    at.client.load(model)
    call = at.infer(model, f"advance:{gate}", timeout_s=10 * CALL_S)
    wait_for("the request is in the worker", lambda: list(at.folder.glob(f"{gate.name}.*.started")))
    return call


def waits(handle: OperationHandle) -> bool:
    """Whether an operation has not ended."""
    return handle.refresh().state in WAITING


def total(call: Any) -> int:
    """Return what a model with weights answers."""
    (raw,) = call.result(timeout=CALL_S).raw_output_contents
    return int(np.frombuffer(raw, np.int64)[1])


def test_nothing_waits_behind_an_eviction_that_is_for_another(at: Scene, gate: Path) -> None:
    """While a load waits for a busy model, one on another device and one that fits beside it come to their end."""
    held = busy(at, "a", gate)
    blocked = at.client.load("b", wait=False)
    at.client.load("elsewhere")
    at.client.load("small")
    at.infer("elsewhere").result(timeout=CALL_S)
    assert waits(blocked)
    assert not held.done()
    gate.touch()
    assert total(held) == ANSWERS[SIZES["a"]]
    blocked.result(CALL_S)
    states = {i.model: i.state for i in at.client.instances()}
    assert states["models/b"] == states["models/small"] == Instance.READY


def test_a_victim_that_is_asked_while_it_drains_comes_back(at: Scene, gate: Path) -> None:
    """Its request waits, the load it made room for is served, and then it is: each model goes once, and no request fails."""
    held = busy(at, "a", gate)
    before = len(at.watcher.seen)
    other = at.infer("b")
    wait_for("a drains", lambda: at.watcher.of("EVICTED_WHEN_IDLE", "a", before))
    again = at.infer("a")
    wait_for("it waits", lambda: queued(at, "a"))
    assert not other.done()
    gate.touch()
    assert total(held) == total(again) == ANSWERS[SIZES["a"]]
    assert total(other) == ANSWERS[SIZES["b"]]
    wait_for("the last is known READY", lambda: at.watcher.of("READY", "a", before))
    (first,) = at.watcher.of("EVICTED_WHEN_IDLE", "a", before)
    (second,) = at.watcher.of("EVICTED", "b", before)
    assert (first.event.details["for"], second.event.details["for"]) == ("b", "a")


def queued(at: Scene, model: str) -> int:
    """Return how many requests wait for a model."""
    found = at.client.statistics([model]).instances
    return sum(i.activity.queued for i in found)
