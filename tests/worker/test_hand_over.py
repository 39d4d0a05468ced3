"""A quick request that finds nothing waiting: past the queue, and for everybody else like any other that runs."""

import threading

import pytest

from modelhostd.core.errors import Reason
from modelhostd.worker import entries
from modelhostd.worker import executor as executors
from modelhostd.worker.backends.identity import IdentityBackend
from tests.support import wait_until
from tests.worker import executor_scene
from tests.worker.executor_scene import KEY, Channel, job
from tests.worker.harness import DEADLINE_S


@pytest.fixture
def channel():
    """What answers go to."""
    return Channel()


@pytest.fixture
def executor(channel, monkeypatch):
    """An executor without threads of its own, whose one instance is quick, however slow this machine is."""
    monkeypatch.setattr(executors, "TURN_NS", 10**12)
    monkeypatch.setattr(entries, "QUICK_NS", 10**12)
    made = executor_scene.executor()
    made.add(executor_scene.hosted(IdentityBackend()))
    return made


def test_one_that_finds_nothing_waiting_is_run_by_who_read_it(executor, channel):
    """It is never in the queue, and when it is answered nothing of it is left."""
    assert executor.submit(job(channel, 1), here=True)
    assert executor.queued == 0
    assert not executor.serve(executor.readers[0])
    assert channel.answers == [(1, "answered")]
    executor.drain()


def test_those_that_come_meanwhile_wait_for_their_turn(executor, channel):
    """Several that are read at once are answered in their order, only the first of them past the queue."""
    executor.submit(job(channel, 1), here=True)
    executor.submit(job(channel, 2), here=True)
    executor.submit(job(channel, 3), here=True)
    assert executor.queued == 2
    executor.serve(executor.readers[0])
    assert channel.answers == [(1, "answered"), (2, "answered"), (3, "answered")]


def test_it_can_be_cancelled_before_it_runs(executor, channel):
    """A cancellation between reading and running is answered as one."""
    executor.submit(job(channel, 1), here=True)
    executor.cancel(1)
    executor.serve(executor.readers[0])
    assert channel.answers == [(1, Reason.CANCELLED)]


def test_a_cancellation_that_came_first_holds(executor, channel):
    """One whose cancellation has overtaken it is refused, not handed over."""
    executor.cancel(1)
    assert not executor.submit(job(channel, 1), here=True)
    assert channel.answers == [(1, Reason.CANCELLED)]


@pytest.mark.parametrize("end", ["drain", "unload"])
def test_ends_wait_for_it(executor, channel, end):
    """A worker does not end, and an instance does not go, before it is answered."""
    executor.submit(job(channel, 1), here=True)
    leave = executor.drain if end == "drain" else lambda: executor.remove(KEY)
    leaving = threading.Thread(target=leave)
    leaving.start()
    wait_until(lambda: executor.schedule.awaited == 1)
    assert leaving.is_alive()
    executor.serve(executor.readers[0])
    leaving.join(DEADLINE_S)
    assert not leaving.is_alive()
    assert channel.answers == [(1, "answered")]
    executor.submit(job(channel, 2), here=True)
    refused = Reason.SHUTTING_DOWN if end == "drain" else Reason.MODEL_NOT_LOADED
    assert channel.answers[1:] == [(2, refused)]
