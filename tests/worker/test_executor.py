"""The executor's own threads, in this process: what they wait for, and what they survive."""

import threading

from modelhostd.core.errors import Reason
from modelhostd.worker.backend import Signature
from modelhostd.worker.backends.identity import IdentityBackend
from tests.support import wait_until
from tests.worker.executor_scene import KEY, Channel, executor, hosted, job
from tests.worker.harness import DEADLINE_S


class GateBackend(IdentityBackend):
    """Answers its inputs once ``gate`` is open."""

    def __init__(self):
        super().__init__()
        self.gate = threading.Event()
        self.entered = threading.Event()

    def signature(self):
        """Return a signature under which requests are joined."""
        return Signature(batched=True, joinable=True)

    def infer(self, inputs, context):
        """Wait, and answer."""
        self.entered.set()
        assert self.gate.wait(DEADLINE_S)
        return super().infer(inputs, context)


class FaultyBackend(GateBackend):
    """Fails, and also where it is asked what its failure means."""

    def infer(self, inputs, context):
        """Fail."""
        raise ZeroDivisionError

    def is_poisoned(self, error):
        """Fail."""
        raise AttributeError


def test_nobody_watches_the_clock_of_a_model_that_is_at_work():
    """A request whose time to wait for company is up waits for the model too: threads sleep until that is free."""
    channel, backend, made = Channel(), GateBackend(), executor(threads=2)
    made.add(hosted(backend, batch_limit=4, batch_delay_ns=1))
    made.start()
    made.submit(job(channel, 1))
    assert backend.entered.wait(DEADLINE_S)
    made.submit(job(channel, 2))
    with made.schedule.lock:
        assert made.schedule.entries[KEY].due_ns
        assert made.schedule.next_due_s() is None
    backend.gate.set()
    wait_until(lambda: len(channel.answers) == 2)


def test_a_backend_that_cannot_tell_what_its_failure_means_keeps_no_thread():
    """Its request fails, and the thread goes on to the next."""
    channel, made = Channel(), executor(threads=1)
    made.add(hosted(FaultyBackend()))
    made.add(hosted(IdentityBackend(), "other"))
    made.start()
    made.submit(job(channel, 1))
    made.submit(job(channel, 2, "other"))
    wait_until(lambda: len(channel.answers) == 2)
    assert channel.answers == [(1, Reason.INFERENCE_FAILED), (2, "answered")]
    wait_until(lambda: not made.schedule.running)
