"""The executor's own threads, in this process: what they wait for, and what they survive."""

import gc
import threading
import weakref

import pytest

from modelhostd.core.errors import Reason
from modelhostd.worker.backend import Signature
from modelhostd.worker.backends.identity import IdentityBackend
from modelhostd.worker.checks import CheckJob
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
        assert made.schedule.next_due_s(made.schedule.is_for_others) is None
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


@pytest.mark.parametrize("batch_limit", [1, 4])
def test_an_idle_thread_holds_nothing_of_what_it_ran_last(batch_limit):
    """The request goes, and a backend that was taken out: not all let go of their memory when told."""
    channel, backend, made = Channel(), GateBackend(), executor(threads=1)
    backend.gate.set()
    made.add(hosted(backend, batch_limit=batch_limit))
    made.start()
    request = job(channel)
    gone = weakref.ref(request)
    made.submit(request)
    del request
    wait_until(lambda: len(channel.answers) == 1)
    wait_until(lambda: gone() is None)
    made.remove(KEY)
    gone = weakref.ref(backend)
    del backend
    wait_until(lambda: gone() is None)


class Computed:
    """Stands for what a pass has in memory."""


class LackingBackend(GateBackend):
    """Lacks memory for more than ``most`` items; ``found`` has how much of earlier passes each one found in memory."""

    def __init__(self, most):
        super().__init__()
        self.most = most
        self.found = []
        self.computed = []

    @property
    def left(self):
        """How much of all passes is in memory."""
        return sum(computed() is not None for computed in self.computed)

    def infer(self, inputs, context):
        """Compute, and find that there is too little."""
        self.found.append(self.left)
        computed = Computed()
        self.computed.append(weakref.ref(computed))
        if len(inputs["x"].array) > self.most:
            raise MemoryError
        return super().infer(inputs, context)


@pytest.fixture
def no_collector():
    """Nothing goes by a collection, which is rare where nothing runs."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collector")
def test_what_lacked_memory_has_none_when_its_error_is_told():
    """It would else lie there until the collector comes by, and whoever tries again would lack as much."""
    channel, backend, made = Channel(), LackingBackend(0), executor(threads=1)
    made.add(hosted(backend, batch_limit=8))
    made.start()
    made.submit(job(channel, 1))
    wait_until(lambda: channel.answers)
    assert channel.answers == [(1, Reason.OUT_OF_DEVICE_MEMORY)]
    wait_until(lambda: backend.left == 0)


@pytest.mark.usefixtures("no_collector")
def test_requests_that_lacked_memory_together_run_alone_without_what_they_had():
    """Those that fit by themselves have the memory for it."""
    channel, backend, made = Channel(), LackingBackend(4), executor(threads=1)
    made.add(hosted(backend, batch_limit=8))
    made.start()
    made.submit(job(channel, 1))
    assert backend.entered.wait(DEADLINE_S)
    made.submit(job(channel, 2))
    made.submit(job(channel, 3))
    backend.gate.set()
    wait_until(lambda: len(channel.answers) == 3)
    assert [answer for _, answer in channel.answers] == ["answered"] * 3
    assert backend.found == [0] * 4


class PassesBackend(IdentityBackend):
    """Takes as many batches for a request as its ``x`` has items, and lets others pass between them."""

    def __init__(self):
        super().__init__()
        self.log = []
        self.between = lambda batch: None

    def signature(self):
        """Return a signature under which requests are joined."""
        return Signature(batched=True, joinable=True)

    def infer(self, inputs, context):
        """Note each batch."""
        items = len(inputs["x"].array)
        for batch in range(items):
            self.between(batch)
            if batch:
                context.let_pass()
            self.log.append(items)
        return super().infer(inputs, context)


def test_a_short_request_goes_between_the_batches_of_a_long_one():
    """What is much smaller and as urgent runs then, one batch of it at a time; what is larger or less urgent waits."""
    channel, backend, made = Channel(), PassesBackend(), executor()
    made.add(hosted(backend, batch_limit=4))
    rows = {"long": 400, "another": 300, "first": 1, "second": 4, "later": 4}
    urgent = {"later": -1}
    jobs = {
        name: job(channel, number, items=items, priority=urgent.get(name, 0))
        for number, (name, items) in enumerate(rows.items(), 1)
    }

    def come(batch):
        if batch == 2 and len(backend.log) == 2:
            for name in ("another", "later", "first", "second"):
                made.submit(jobs[name])

    backend.between = come
    made.start()
    made.submit(jobs["long"])
    wait_until(lambda: len(channel.answers) == 5)
    assert [number for number, _ in channel.answers] == [3, 4, 1, 2, 5]
    assert backend.log[:4] == [400, 400, 1, 400]
    # A thread is done with a request a moment after it is answered.
    wait_until(lambda: not (made.schedule.live or made.schedule.running))


def test_a_health_check_does_not_wait_for_all_of_a_long_request():
    """It runs between two of its batches."""
    channel, backend, made = Channel(), PassesBackend(), executor()
    made.add(hosted(backend, batch_limit=4))
    checked = []
    backend.health_check = lambda: (
        checked.append(len(backend.log)) or IdentityBackend().health_check()
    )
    channel.send = lambda kind, flags, request, generation, header: None
    backend.between = lambda batch: batch == 2 and made.submit(CheckJob(channel, 9, 1, "m-1"))
    made.start()
    made.submit(job(channel, 1, items=8))
    wait_until(lambda: channel.answers)
    assert checked == [2]
