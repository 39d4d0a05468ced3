"""An executor in the tests' own process: what it answers, a backend that works in steps, jobs for both."""

import itertools
import threading
import time

import numpy as np

from modelhostd.worker.backend import Backend, Signature
from modelhostd.worker.executor import Executor
from modelhostd.worker.jobs import Hosted, InferJob
from modelhostd.worker.wire.blackbox import PAGE_BYTES, BlackBox
from tests.worker.harness import DEADLINE_S, encode, numbers

KEY = "m-1", 1
_numbers = itertools.count(1)


class Channel:
    """Keeps what is answered, in order."""

    max_message_bytes = 2**20

    def __init__(self):
        self.answers = []

    def send_response(self, request, generation, header, response, flags):
        """Keep a response."""
        del generation, header, response, flags
        self.answers.append((request, "answered"))

    def send(self, kind, flags, request, generation):
        """Keep the end of a stream."""
        del kind, flags, generation
        self.answers.append((request, "end"))

    def send_error(self, request, generation, error):
        """Keep an error."""
        del generation
        self.answers.append((request, error.reason))


class Poison(RuntimeError):
    """After this nothing in a process can be trusted."""


class StepBackend(Backend):
    """Answers all it was given at its next step, once ``gate`` is open; ``log`` tells what it was called for."""

    stepwise = True

    def __init__(self):
        self.log = []
        self.gate = threading.Event()
        self.gate.set()
        self.begin_error = self.step_error = None
        self._answers = []

    def load(self, context):
        """Need nothing."""

    def signature(self):
        """Return the empty signature."""
        return Signature()

    def infer(self, inputs, context):
        """Be called by nobody."""
        raise NotImplementedError

    def begin(self, inputs, context, answer):
        """Take a request, once the gate is open."""
        self.log.append("begin")
        assert self.gate.wait(DEADLINE_S)
        if self.begin_error is not None:
            raise self.begin_error
        self._answers.append(answer)

    def step(self):
        """Answer all."""
        self.log.append("step")
        if self.step_error is not None:
            raise self.step_error
        answers, self._answers = self._answers, []
        for answer in answers:
            answer.send({"y": np.zeros(1, np.float32)}, last=True)
        return False

    def unload(self):
        """Have nothing to drop."""

    def is_poisoned(self, error):
        """Whether a test said so."""
        return isinstance(error, Poison)

    def health_check(self):
        """Be asked by nobody."""
        raise NotImplementedError

    @property
    def measured_bytes(self):
        """Return nothing."""
        return 0


def executor(threads=1, queue_limit=10, exit=lambda code: None):
    """Return an executor that was not started."""
    return Executor(threads, queue_limit, BlackBox(memoryview(bytearray(PAGE_BYTES))), exit)


def hosted(backend, model="m", **options):
    """Return an instance of ``backend``."""
    return Hosted(f"{model}-1", 1, model, 1, "cpu", "test", backend, backend.signature(), **options)


def job(channel, number=None, model="m", priority=0, credit=0, items=4):
    """Return a request for an instance, of so many items; with ``credit`` a stream."""
    payload = encode({"x": numbers(items)}, name=model)
    number = next(_numbers) if number is None else number
    arrived_ns = time.monotonic_ns()
    at = f"{model}-1", model, priority
    return InferJob(channel, number, 1, *at, payload, arrived_ns, None, credit)
