"""Requests of backends that work in steps: begun by one job, answered by later ones.

A step of such a backend is a job like any other. It takes its instance's turn, so that a model that generates text for
minutes holds up the others on its device by one token at a time.
"""

import itertools
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import field

from modelhostd.core.errors import ModelhostError
from modelhostd.core.values import dataclass
from modelhostd.worker import oip
from modelhostd.worker.backend import Answer, InferContext, Output
from modelhostd.worker.jobs import Activity, Hosted, InferJob
from modelhostd.worker.v1 import worker_pb2
from modelhostd.worker.wire import frames
from modelhostd.worker.wire.frames import Kind

log = logging.getLogger("modelhostd.worker")

STEP_PRIORITY = -(2**31)
"""Below every request: those that wait are begun first, which is quick, and then all get on together."""
_tickets = itertools.count(2**62)


@dataclass(eq=False)
class StepJob:
    """Gets all requests of an instance on by one step."""

    instance: str
    generation: int
    ticket: int = field(default_factory=lambda: -next(_tickets))
    priority: int = STEP_PRIORITY
    streaming: bool = False
    again: bool = False
    """Whether the next step can go at once."""

    @property
    def key(self) -> tuple[str, int]:
        """Instance and generation that it is for."""
        return self.instance, self.generation

    def refuse(self, error: ModelhostError) -> None:
        """Do nothing: the requests have answers of their own."""

    def run(self, hosted: Hosted, activity: Activity) -> BaseException | None:
        """Step; return what the backend raised, if it did."""
        self.again = False
        try:
            self.again = activity.compute(hosted.backend.step)
        except BaseException as error:
            return error
        return None


class JobAnswer(Answer):
    """Answers one request by the data socket. ``on_end`` is told once, after the final frame of one that ``begin`` left open."""

    def __init__(
        self, job: InferJob, hosted: Hosted, on_end: Callable[["JobAnswer"], None]
    ) -> None:
        self.job = job
        self.streaming = job.streaming
        self.priority = job.priority
        self.ended = False
        self._hosted = hosted
        self._on_end = on_end
        self._open = False
        self._last_ns = time.monotonic_ns()
        self._header = worker_pb2.ResponseHeader(
            item_count=1,
            batch_size=1,
            queue_ns=max(0, self._last_ns - job.arrived_ns - job.input_ns),
            input_ns=job.input_ns,
        )

    @property
    def ready(self) -> bool:
        """Whether the reader takes another response now."""
        return not self.streaming or self.job.credit > 0

    @property
    def unwanted(self) -> bool:
        """Whether nobody waits any more."""
        return self.ended or self.job.unwanted()

    def begin(self, activity: Activity) -> BaseException | None:
        """Hand the request to the backend; return what that raised. It may have ``ended`` then, or is answered later."""
        job, hosted = self.job, self._hosted
        context = InferContext(
            parameters=job.parsed.parameters,
            outputs=frozenset(job.parsed.outputs),
            cancelled=job.unwanted,
            progress=activity.advance,
        )
        try:
            hosted.backend.begin(job.parsed.inputs, context, self)
        except BaseException as error:
            self.fail(error)
            return error
        self._open = not self.ended
        return None

    def send(self, outputs: Mapping[str, Output], *, last: bool) -> None:
        """Send a response."""
        if self.ended:
            return
        job = self.job
        begin_ns = time.monotonic_ns()
        header, self._header = self._header, worker_pb2.ResponseHeader()
        header.infer_ns = begin_ns - self._last_ns
        header.last = last
        try:
            response = oip.Response(job.parsed, self._hosted.version, outputs)
            header.output_ns = time.monotonic_ns() - begin_ns
            if self.streaming:
                job.spend_credit(response)
                job.channel.send_response(job.request, job.generation, header, response, 0)
            else:
                assert last, "one response is wanted"
                job.channel.send_response(
                    job.request, job.generation, header, response, frames.FINAL
                )
        except Exception as error:
            self.fail(error)
            return
        self._last_ns = time.monotonic_ns()
        if last:
            if self.streaming:
                job.channel.send(Kind.RESPONSE, frames.FINAL, job.request, job.generation)
            self._end()

    def fail(self, error: BaseException) -> None:
        """End the request with an error."""
        if not self.ended:
            self.job.fail(self._hosted, error)
            self._end()

    def _end(self) -> None:
        self.ended = True
        if self._open:
            self._on_end(self)


def finish(hosted: Hosted, answers: Mapping[int, JobAnswer]) -> BaseException | None:
    """Answer what is open of an instance that goes: streams were told to end, whole texts are finished.

    Returns what the backend raised, if it did.
    """
    error: BaseException | None = None
    try:
        while answers and hosted.backend.step():
            pass
    except BaseException as raised:
        error = raised
        log.exception("model %s failed on its last requests", hosted.model)
    for answer in list(answers.values()):
        answer.fail(error or RuntimeError("the backend left a request without an answer"))
    return error
