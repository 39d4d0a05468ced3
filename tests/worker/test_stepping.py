"""Requests that steps answer, in an executor of this process: begun in turn, answered whatever happens to the model."""

import threading

from modelhostd.core.errors import Reason
from modelhostd.worker.backends.identity import IdentityBackend
from modelhostd.worker.runner import POISONED_EXIT
from tests.support import wait_until
from tests.worker.executor_scene import KEY, Channel, Poison, StepBackend, executor, hosted, job
from tests.worker.harness import DEADLINE_S


def test_a_request_that_is_begun_while_its_model_goes_is_answered_and_the_threads_live():
    """The last step of a model that goes is its own affair: no thread looks for it among those that stay."""
    channel, backend, made = Channel(), StepBackend(), executor(threads=2)
    made.add(hosted(backend))
    made.add(hosted(IdentityBackend(), "other"))
    backend.gate.clear()
    made.start()
    made.submit(job(channel, 1))
    wait_until(lambda: backend.log == ["begin"])
    leaving = threading.Thread(target=made.remove, args=(KEY,))
    leaving.start()
    wait_until(lambda: made.schedule.awaited == 1)
    backend.gate.set()
    leaving.join(DEADLINE_S)
    assert channel.answers == [(1, "answered")]
    assert made.queued == 0
    for number in (2, 3, 4):
        made.submit(job(channel, number, "other"))
        wait_until(lambda number=number: channel.answers[-1] == (number, "answered"))


def test_a_crowd_that_comes_does_not_hold_up_those_that_were_begun():
    """Between two steps only so many requests are begun, however many wait."""
    channel, backend, made = Channel(), StepBackend(), executor(queue_limit=100)
    made.add(hosted(backend))
    for number in range(1, 91):
        made.submit(job(channel, number, priority=number % 3))
    made.start()
    wait_until(lambda: len(channel.answers) == 90)
    assert backend.log.index("step") <= 32
    assert {answer for _, answer in channel.answers} == {"answered"}


def test_a_device_that_breaks_as_a_request_is_begun_ends_the_worker():
    """The request is answered, and the process goes, as after any other fault that nothing survives."""
    codes = []
    channel, backend, made = Channel(), StepBackend(), executor(exit=codes.append)
    backend.begin_error = Poison()
    made.add(hosted(backend))
    made.start()
    made.submit(job(channel, 1))
    wait_until(lambda: codes == [POISONED_EXIT])
    assert channel.answers == [(1, Reason.INFERENCE_FAILED)]


def test_a_device_that_breaks_in_a_models_last_step_ends_the_worker():
    """What is open is answered with the fault, and the process goes."""
    codes = []
    channel, backend, made = Channel(), StepBackend(), executor(exit=codes.append)
    backend.step_error = Poison()
    made.add(hosted(backend))
    backend.gate.clear()
    made.start()
    made.submit(job(channel, 1))
    wait_until(lambda: backend.log == ["begin"])
    leaving = threading.Thread(target=made.remove, args=(KEY,))
    leaving.start()
    wait_until(lambda: made.schedule.awaited == 1)
    backend.gate.set()
    leaving.join(DEADLINE_S)
    assert channel.answers == [(1, Reason.INFERENCE_FAILED)]
    assert codes == [POISONED_EXIT]


def test_requests_are_begun_and_stepped_one_at_a_time():
    """A backend that works in steps is called by one thread, also where it says that several may infer."""
    channel, backend, made = Channel(), StepBackend(), executor(threads=2)
    backend.concurrency = 2
    made.add(hosted(backend))
    backend.gate.clear()
    made.start()
    made.submit(job(channel, 1))
    made.submit(job(channel, 2))
    wait_until(lambda: backend.log)
    assert made.queued == 1
    assert made.schedule.entries[KEY].running == 1
    assert not made.schedule.entries[KEY].free
    backend.gate.set()
    wait_until(lambda: len(channel.answers) == 2)
