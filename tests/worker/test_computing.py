"""The thread that computes: what runs there, what others hand over to it, and that nothing waits for more than a pass."""

import threading

import pytest

from modelhostd.core.errors import Reason
from modelhostd.worker.backend import Signature
from modelhostd.worker.backends.identity import IdentityBackend
from modelhostd.worker.executor import Executor
from modelhostd.worker.wire.blackbox import PAGE_BYTES, BlackBox
from tests.support import wait_until
from tests.worker.executor_scene import Channel, StepBackend, hosted, job
from tests.worker.harness import DEADLINE_S


class PassesBackend(IdentityBackend):
    """Takes as many passes for a request as its ``x`` has items, by ``context.compute``; ``log`` has where each ran."""

    packages = ("torch",)
    hands_over = True

    def __init__(self, name="m", log=None):
        super().__init__()
        self.name = name
        self.log = [] if log is None else log
        self.jobs = []
        self.entered, self.gate = threading.Event(), threading.Event()
        self.gate.set()
        self.error = None

    def infer(self, inputs, context):
        """Run the passes."""
        self.jobs.append(threading.current_thread().name)
        for number in range(len(inputs["x"].array)):
            if number:
                context.let_pass()
            context.compute(self._pass)
        return super().infer(inputs, context)

    def _pass(self):
        self.entered.set()
        assert self.gate.wait(DEADLINE_S)
        self.log.append((self.name, threading.current_thread().name))
        if self.error is not None:
            raise self.error


class HeldBackend(PassesBackend):
    """Is done with its passes long before its answer, for which it waits until it ``may_end``."""

    def __init__(self, name="m", log=None):
        super().__init__(name, log)
        self.may_end = threading.Event()

    def infer(self, inputs, context):
        """Run the passes, and wait."""
        outputs = super().infer(inputs, context)
        assert self.may_end.wait(DEADLINE_S)
        return outputs


class UnawareBackend(PassesBackend):
    """Knows nothing of the thread."""

    hands_over = False


class PlainBackend(PassesBackend):
    """Computes without torch."""

    packages = ()


class TorchSteps(StepBackend):
    """Works in steps, with torch; notes who steps."""

    packages = ("torch",)

    def step(self):
        """Note the thread."""
        self.log.append(threading.current_thread().name)
        return super().step()


def computing(*backends, threads=2):
    """Return a started executor with a thread that computes and instances of ``backends``, by their names."""
    made = Executor(threads, 10, BlackBox(memoryview(bytearray(PAGE_BYTES))), print, 1)
    for backend in backends:
        made.add(hosted(backend, backend.name))
    made.start()
    return made


def answered(channel, *numbers):
    """Wait until requests are answered."""
    wait_until(lambda: {number for number, _ in channel.answers} >= set(numbers))


@pytest.mark.parametrize(
    ("kind", "where"),
    [(PassesBackend, "compute"), (UnawareBackend, "compute"), (PlainBackend, "executor-")],
)
def test_models_of_torch_run_in_one_thread_and_others_elsewhere(kind, where):
    """While it is idle their jobs run in it too, so that no request changes threads more often than it must."""
    channel, backend = Channel(), kind()
    made = computing(backend)
    made.submit(job(channel, 1, items=2))
    answered(channel, 1)
    assert all(thread.startswith(where) for _, thread in backend.log)
    assert all(thread.startswith(where) for thread in backend.jobs)


def test_two_long_requests_share_the_thread_pass_by_pass():
    """One that comes while another computes waits for a pass of it, not for all."""
    channel, log = Channel(), []
    long, other = PassesBackend("long", log), PassesBackend("other", log)
    made = computing(long, other)
    long.gate.clear()
    made.submit(job(channel, 1, "long", items=3))
    assert long.entered.wait(DEADLINE_S)
    made.submit(job(channel, 2, "other", items=1))
    wait_until(lambda: made.schedule.handed_passes)
    assert other.jobs[0].startswith("executor-")
    long.gate.set()
    answered(channel, 1, 2)
    assert log == [(name, "compute") for name in ("long", "other", "long", "long")]


def test_what_waited_for_a_request_elsewhere_runs_though_the_thread_sleeps():
    """One request of a model at a time: the next one has nobody to take it until the one in another thread is answered."""
    channel = Channel()
    busy, other = PassesBackend("busy"), HeldBackend("other")
    made = computing(busy, other)
    busy.gate.clear()
    made.submit(job(channel, 1, "busy", items=1))
    assert busy.entered.wait(DEADLINE_S)
    made.submit(job(channel, 2, "other", items=1))
    wait_until(lambda: made.schedule.handed_passes)
    busy.gate.set()
    wait_until(lambda: other.log and not made.schedule.compute_busy)
    made.submit(job(channel, 3, "other", items=1))
    other.may_end.set()
    answered(channel, 1, 2, 3)
    assert other.jobs[0].startswith("executor-")


def test_who_waits_for_the_thread_is_not_at_work():
    """The heartbeat and the black box name the model whose pass runs, not the one that waits for its own."""
    channel = Channel()
    first, second = PassesBackend("first"), PassesBackend("second")
    made = computing(first, second)
    first.gate.clear()
    made.submit(job(channel, 1, "first", items=1))
    assert first.entered.wait(DEADLINE_S)
    made.submit(job(channel, 2, "second", items=1))
    wait_until(lambda: made.schedule.handed_passes)
    assert {activity.name: activity.model for activity in made.activities if activity.model} == {
        "compute": "first"
    }
    first.gate.set()
    answered(channel, 1, 2)


def test_what_a_pass_raises_elsewhere_fails_its_own_request():
    """The thread goes on, and so does the request whose passes run there."""
    channel = Channel()
    good, bad = PassesBackend("good"), PassesBackend("bad")
    bad.error = ZeroDivisionError()
    made = computing(good, bad)
    good.gate.clear()
    made.submit(job(channel, 1, "good", items=2))
    assert good.entered.wait(DEADLINE_S)
    made.submit(job(channel, 2, "bad", items=1))
    wait_until(lambda: made.schedule.handed_passes)
    good.gate.set()
    answered(channel, 1, 2)
    assert sorted(channel.answers) == [(1, "answered"), (2, Reason.INFERENCE_FAILED)]


def test_a_backend_that_hands_nothing_over_waits_for_the_thread():
    """Its jobs run there as a whole, also where other threads are idle."""
    channel = Channel()
    busy, unaware = PassesBackend("busy"), UnawareBackend("unaware")
    made = computing(busy, unaware)
    busy.gate.clear()
    made.submit(job(channel, 1, "busy", items=1))
    assert busy.entered.wait(DEADLINE_S)
    made.submit(job(channel, 2, "unaware", items=1))
    busy.gate.set()
    answered(channel, 1, 2)
    assert unaware.jobs == ["compute"]


def test_steps_run_in_the_thread_whoever_takes_them():
    """A model that works in steps does so there, also where its requests were begun beside a pass that runs."""
    channel, steps, busy = Channel(), TorchSteps(), PassesBackend("busy")
    steps.name = "steps"
    made = computing(steps, busy)
    busy.gate.clear()
    made.submit(job(channel, 1, "busy", items=1))
    assert busy.entered.wait(DEADLINE_S)
    made.submit(job(channel, 2, "steps"))
    wait_until(lambda: "begin" in steps.log)
    busy.gate.set()
    answered(channel, 1, 2)
    made.submit(job(channel, 3, "steps"))
    answered(channel, 3)
    assert set(steps.log) - {"begin", "step"} == {"compute"}


def test_a_stream_hands_its_passes_over():
    """It has a thread of its own, which waits for its reader; what it computes runs where all does."""
    channel, backend = Channel(), PassesBackend()
    made = computing(backend)
    made.submit(job(channel, 1, credit=1, items=2))
    wait_until(lambda: (1, "end") in channel.answers)
    assert backend.jobs == ["stream-0"]
    assert backend.log == [("m", "compute")] * 2


def test_requests_that_wait_for_company_run_when_their_time_is_up():
    """The thread looks by itself where a model's batches are waited for."""
    channel, backend = Channel(), PassesBackend()
    backend.signature = lambda: Signature(batched=True, joinable=True)
    made = Executor(1, 10, BlackBox(memoryview(bytearray(PAGE_BYTES))), print, 1)
    made.add(hosted(backend, batch_limit=4, batch_delay_ns=2_000_000))
    made.start()
    made.submit(job(channel, 1, items=1))
    answered(channel, 1)
    assert backend.log == [("m", "compute")]
