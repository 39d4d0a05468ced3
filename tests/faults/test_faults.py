"""Workers fail in every way there is, in a whole daemon: it costs what was in flight in them, and no more.

One daemon takes all of it, so that what one fault leaves behind is found by the next.
"""

import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from bench.faulty_scene import Scene, Seen, scene
from tests.api.serving import info_of
from tests.faults.bystander import Bystander
from tests.support import wait_until

SHARED = ("a", "b", "c")
OTHER = "other"
HANG_S = 4
"""No heartbeat for so long is a hang: far above what a loaded machine keeps one that is well from beating."""
FLAGS = (
    *("--set", "worker.arena_bytes=1MiB"),
    *("--set", f"worker.hang_timeout_s={HANG_S}"),
)


STACKS = 'File "'
"""What the stacks of a crash or a hang have; they are so long that the words before them are cut off."""


@dataclass(frozen=True)
class Fault:
    """A verb for the model at work, or a signal from outside; and how the worker's end is told."""

    name: str
    exit: str
    number: int = 0
    blamed: str = "b"
    words: str = "last words"
    """What the worker wrote before its end."""


FAULTS = (
    Fault("segv", "signal SIGSEGV", words=STACKS),
    Fault("kill", "signal SIGKILL"),
    Fault("exit", "exit code 0"),
    Fault("abort", "signal SIGABRT", words=STACKS),
    Fault("child", "signal SIGKILL"),
    Fault("killed from outside", "signal SIGKILL", number=signal.SIGKILL, blamed="c", words=""),
    Fault("stop", f"hung: no heartbeat for {HANG_S} s"),
    Fault("stopped from outside", "hung: no h", number=signal.SIGSTOP, blamed="c", words=""),
    Fault("hold", f"hung: no heartbeat for {HANG_S} s", words=STACKS),
    Fault("stuck", f"hung: no progress for {HANG_S} s", words=STACKS),
    Fault("garbage", "broke the worker protocol: bad frame"),
    Fault("control-garbage", "broke the worker protocol: bad frame"),
    Fault("huge-length", "broke the worker protocol: bad frame"),
    Fault("unknown-id", "broke the worker protocol: an answer to request"),
    Fault("unknown-command", "broke the worker protocol: an answer to command"),
    Fault("wrong-generation", "broke the worker protocol: an answer to request"),
    Fault("flood", "broke the worker protocol: an answer to request"),
    Fault("beats", "broke the worker protocol: a flood of heartbeats"),
    Fault("close", "closed a socket and went on"),
)


@pytest.fixture(scope="module")
def at() -> Iterator[Scene]:
    """A daemon with three models in one worker, and one in another."""
    with scene(*FLAGS, environment={"FAULTY_HEARTBEAT_S": "0.25"}) as made:
        for name in SHARED:
            made.model(name)
        made.model(OTHER, alone=True)
        yield made
        for text in ("Traceback", "failed unexpectedly", "never retrieved"):
            assert text not in _own_lines(made.log), made.log[-5000:]


def _own_lines(log: str) -> str:
    """Return what the daemon wrote itself: its workers' stacks are theirs."""
    return "\n".join(line for line in log.splitlines() if "[modelhostd.worker]" not in line)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_costs_what_was_in_flight_and_no_more(
    at: Scene, fault: Fault, tmp_path: Path
) -> None:
    """All in flight in the worker fails as WORKER_LOST, its models come back by last use; others see nothing."""
    gate = tmp_path / "gate"
    _use(at, "b", "a")
    since = at.told()
    with Bystander(at, OTHER) as bystander:
        # One that runs and one that waits behind it.
        calls = [at.infer("c", f"advance:{gate}") for _ in range(2)]
        wait_until(lambda: list(tmp_path.glob("gate.*.started")), what="a request runs")
        if fault.number:
            os.kill(_worker_of(at, since), fault.number)
        else:
            calls.append(at.infer("b", fault.name))
        for call in calls:
            _check_lost(call.exception(), fault)
        wait_until(lambda: _ready(at, since), what="all models are back")
        before = bystander.answers
        wait_until(lambda: bystander.answers > before, what="others are answered")
    assert bystander.errors == []

    order = ["c", "a", "b"] if fault.number else ["b", "c", "a"]
    crashed = at.watcher.of("CRASHED", since=since)
    assert [_model(seen) for seen in crashed] == order
    assert [_model(seen) for seen in at.watcher.of("LOADING", since=since)] == order
    for seen in crashed:
        assert seen.event.details["exit"].startswith(fault.exit)
        assert seen.event.details["blamed"] == fault.blamed
    told = {_model(seen): seen.event.details.get("stderr", "") for seen in crashed}
    assert fault.words in told[fault.blamed]
    assert not any(text for model, text in told.items() if model != fault.blamed)
    for name in SHARED:
        assert at.infer(name).exception() is None


def test_last_use_outlives_a_crash(at: Scene) -> None:
    """Crashes without a request in between do not turn the order round: coming back is no use."""
    _use(at, "b", "c", "a")
    for _ in range(2):
        since = at.told()
        os.kill(_shared_worker(at), signal.SIGKILL)
        wait_until(lambda since=since: _ready(at, since), what="all models are back")
        crashed = [_model(seen) for seen in at.watcher.of("CRASHED", since=since)]
        assert crashed == ["a", "c", "b"]


def test_memory_that_a_request_eats_fails_that_request(at: Scene) -> None:
    """A worker that may take no more refuses what needs more, typed, and goes on with the rest."""
    with Bystander(at, OTHER) as bystander:
        error = at.infer("b", "eat").exception()
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert info_of(error).reason == "OUT_OF_DEVICE_MEMORY"
        for name in SHARED:
            at.client.load(name)  # one of them made room before the request was tried once more
            assert at.infer(name).exception() is None
        wait_until(lambda: bystander.answers, what="others are answered")
    assert bystander.errors == []
    since = at.told()
    os.kill(_shared_worker(at), signal.SIGKILL)
    wait_until(lambda: _ready(at, since), what="all models are back")


def test_a_flood_of_log_lines_is_bounded(at: Scene) -> None:
    """What a worker writes by the megabyte costs its request time, others none, and the log little."""
    before = len(at.log)
    with Bystander(at, OTHER) as bystander:
        assert at.infer("b", "shout:20000").exception() is None
        wait_until(lambda: bystander.answers, what="others are answered")
    assert bystander.errors == []
    assert len(at.log) - before < 20_000 * 100 / 4


def test_a_device_fault_answers_its_request_before_the_worker_goes(at: Scene) -> None:
    """A poisoned worker ends with exit code 70 after the request that found it was told so."""
    since = at.told()
    at.client.unblock("b")
    error = at.infer("b", "poison").exception()
    assert info_of(error).reason == "INFERENCE_FAILED"
    wait_until(lambda: _ready(at, since), what="all models are back")
    crashed = at.watcher.of("CRASHED", since=since)
    assert {seen.event.details["exit"] for seen in crashed} == {"exit code 70"}
    assert {seen.event.details["blamed"] for seen in crashed} == {"b"}


# --- parts ----------------------------------------------------------------------------------------


def _use(at: Scene, *models: str) -> None:
    """Let models be used in this order, and forget earlier crashes."""
    for name in SHARED:
        at.client.unblock(name)
    for name in models:
        at.infer(name).result()


def _ready(at: Scene, since: int) -> bool:
    return {_model(seen) for seen in at.watcher.of("READY", since=since)} == set(SHARED)


def _model(seen: Seen) -> str:
    return seen.event.name.split("/")[1]


def _shared_worker(at: Scene) -> int:
    """Return the worker's process id without a request to it."""
    other = at.pid(OTHER)

    def alone() -> int:
        # One that was lost may go a moment after its replacement came.
        found = set(at.workers()) - {other}
        return found.pop() if len(found) == 1 else 0

    return wait_until(alone, what="one shared worker")


def _worker_of(at: Scene, since: int) -> int:
    assert not at.watcher.of("CRASHED", since=since)
    return _shared_worker(at)


def _check_lost(error: grpc.RpcError, fault: Fault) -> None:
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    info = info_of(error)
    assert info.reason == "WORKER_LOST"
    assert info.metadata["exit"].startswith(fault.exit)
    status = rpc_status.from_call(error)
    assert status is not None
    assert any(d.Is(error_details_pb2.RetryInfo.DESCRIPTOR) for d in status.details)
