"""A whole daemon and its real workers: who makes room for whom, who does not wait for it, and which budgets are refused."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.faulty_scene import BACKEND, CALL_S, Scene, scene, wait_for
from modelhost import BudgetTooSmall, OperationHandle
from modelhost.v1 import operations_pb2
from modelhost.v1.instances_pb2 import Instance
from tests.live.machine import ANSWERS
from tests.live.steps import IMAGED

SIZES = {"a": 400_000, "b": 400_000, "c": 400_000, "small": 100_000}
ROOM = 600_000
FLAGS = (
    *("--set", "worker.arena_bytes=1MiB", "--set", "devices.sim_bytes=2MB"),
    *("--set", "settings.host_budget_bytes=8MB"),
    # A request that is held open is not cancelled, however slow the machine is.
    *("--set", "settings.drain_timeout_s=600"),
)
WAITING = (operations_pb2.Operation.QUEUED, operations_pb2.Operation.RUNNING)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The daemon's configuration."""
    made = tmp_path_factory.mktemp("config") / "modelhostd.toml"
    made.write_text(f"budgets = {{ sim-0 = {ROOM} }}\n")
    return made


@pytest.fixture(scope="module")
def at(file: Path) -> Iterator[Scene]:
    """A daemon with models for a device that has room for one of the large ones, and one for the CPU."""
    flags = ("--config", str(file), *FLAGS)
    with scene(*flags, sizes=SIZES, backend=f"{IMAGED},{BACKEND}") as made:
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
    at.client.unload("elsewhere")
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
    before = at.told()
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


def test_a_budget_below_what_is_pinned_changes_nothing_by_any_way(at: Scene, file: Path) -> None:
    """By a call and on the command line it is refused with what would do; a file that is read again keeps its other lines."""
    client = at.client
    client.load("a")
    client.pin("a")
    taken = client.instance("a").measured_bytes
    with pytest.raises(BudgetTooSmall) as caught:
        client.set_budget("sim-0", taken - 1)
    assert (caught.value.needed_bytes, caught.value.held_by) == (taken, ("a",))
    done = command(at, "budget", "sim-0", "100kB")
    assert done.returncode != 0
    assert f"`modelhost budget sim-0 {taken}`" in done.stderr
    assert "a (" in done.stderr
    file.write_text("budgets = { sim-0 = 100000 }\n[settings]\nqueue_limit = 77\n")
    at.process.send_signal(signal.SIGHUP)
    wait_for("the other lines", lambda: client.settings().queue_limit == 77)
    wait_for("the refusal", lambda: "a configured budget is not taken up" in at.log)
    assert client.device("sim-0").budget_bytes == ROOM
    assert client.instance("a").measured_bytes == taken
    assert command(at, "budget", "sim-0", str(taken)).returncode == 0
    client.unpin("a")
    assert command(at, "budget", "sim-0", "default").returncode == 0
    assert client.device("sim-0").budget_bytes == 100_000
    wait_for("a has left", lambda: client.instance("a").state == Instance.WARM)
    client.set_budget("sim-0", ROOM)


def command(at: Scene, *words: str) -> "subprocess.CompletedProcess[str]":
    """Run the command line as an operator."""
    environment = {**os.environ, "MODELHOST_TARGET": f"unix:{at.folder}/s/admin.sock"}
    return subprocess.run(
        [sys.executable, "-m", "modelhost.cli", *words],
        env=environment,
        capture_output=True,
        text=True,
        timeout=CALL_S,
        check=False,
    )


def queued(at: Scene, model: str) -> int:
    """Return how many requests wait for a model."""
    found = at.client.statistics([model]).instances
    return sum(i.activity.queued for i in found)
