"""What a worker's threads run: one inference of an instance that is hosted here."""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import field

from modelhostd.core.errors import ModelhostError
from modelhostd.core.values import dataclass
from modelhostd.worker import failures, oip
from modelhostd.worker.backend import (
    Backend,
    Cancelled,
    Compute,
    InferContext,
    Signature,
    compute_here,
)
from modelhostd.worker.channel import DataChannel
from modelhostd.worker.forms import Forms
from modelhostd.worker.v1 import worker_pb2
from modelhostd.worker.wire import frames
from modelhostd.worker.wire.blackbox import BlackBox
from modelhostd.worker.wire.frames import Kind

log = logging.getLogger("modelhostd.worker")

CREDIT_WAIT_S = 0.5
UNREAD_S = 60.0
"""How long a stream waits for its reader to take an answer: it may hold a place that others want."""


@dataclass(frozen=True, slots=True)
class Hosted:
    """An instance that is loaded here."""

    instance: str
    generation: int
    model: str
    version: int
    device: str
    backend_name: str
    backend: Backend
    signature: Signature
    batch_limit: int = 1
    """Items that may run together; 1 = each request by itself."""
    batch_delay_ns: int = 0
    """How long a request may wait for others."""
    forms: Forms = field(default_factory=Forms, compare=False, repr=False)

    @property
    def key(self) -> tuple[str, int]:
        """What a request has to name."""
        return self.instance, self.generation

    def is_poisoned(self, error: BaseException) -> bool:
        """Whether nothing in this process can be trusted after what the backend raised, as it says itself."""
        try:
            return self.backend.is_poisoned(error)
        except Exception:
            log.exception("backend %s cannot tell what its failure means", self.backend_name)
            return False


@dataclass
class Activity:
    """What a thread does, for the heartbeat and for the black box. Written by that thread alone."""

    name: str
    box: BlackBox
    entry: int
    """Its place in the black box."""
    loading: bool = False
    progress: int = 0
    model: str = ""
    let_pass: Callable[[], None] = lambda: None
    """What a long request calls between its batches: others of its instance may run in between."""
    give_way: Callable[[], None] = lambda: None
    """What this thread does between two batches of any request."""
    elsewhere: Compute | None = None
    """Runs passes of models that are not to compute in this thread; None = they are."""
    compute: Compute = compute_here
    """Runs passes of the model that is at work."""

    def begin(self, model: str) -> int:
        """Note that work for ``model`` starts; return when, in monotonic nanoseconds."""
        self.model = model
        self.progress += 1
        now = time.monotonic_ns()
        self.box.write(self.entry, threading.get_ident(), now, model, loading=self.loading)
        return now

    def advance(self) -> None:
        """Note that the work gets on."""
        self.progress += 1

    def end(self) -> None:
        """Note that the work is done."""
        self.box.clear(self.entry)
        self.progress += 1
        self.model = ""


@dataclass
class InferJob:
    """One request from its arrival to its final frame."""

    channel: DataChannel
    request: int
    generation: int
    instance: str
    name: str
    priority: int
    payload: bytes | memoryview
    arrived_ns: int
    deadline_ns: int | None
    credit: int = 0
    """Responses that may be sent now; 0 at arrival = one response is wanted."""
    # Not set in the constructor, which runs for each request.
    cancelled: bool = field(default=False, init=False)
    unloaded: bool = field(default=False, init=False)
    input_ns: int = field(default=0, init=False)
    """What parsing it took."""
    _stalled_s: float = field(default=0.0, init=False)
    """Since when its reader has no room for another answer, in monotonic seconds; 0 = it has."""
    _parsed: oip.ParsedRequest | None = field(default=None, init=False)
    _changed: threading.Condition | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.key = self.instance, self.generation
        """What it is for."""
        self.streaming = self.credit > 0
        if self.streaming:
            self._changed = threading.Condition()

    @property
    def ticket(self) -> int:
        """Its number in the queue."""
        return self.request

    def cancel(self) -> None:
        """Note that nobody waits any more; work in progress stops at its next check."""
        self.cancelled = True
        self.add_credit(0)

    def unload(self) -> None:
        """Stop a stream whose instance goes: its reader may take for ever. Single answers are finished."""
        if self.streaming:
            self.unloaded = True
            self.cancel()

    def add_credit(self, responses: int) -> None:
        """Allow more responses of a stream."""
        if self._changed is not None:
            with self._changed:
                self.credit += responses
                if self.credit > 0:
                    self._stalled_s = 0.0
                self._changed.notify_all()

    def spend_credit(self, response: oip.Response) -> None:
        """Count a response that is about to be sent."""
        if self._changed is not None:
            with self._changed:
                self.credit -= frames.credit_of(response.size)
                if self.credit <= 0:
                    self._stalled_s = time.monotonic()

    def refuse(self, error: ModelhostError) -> None:
        """Answer with an error."""
        self.channel.send_error(self.request, self.generation, error)

    @property
    def parsed(self) -> oip.ParsedRequest:
        """The request, once it is prepared."""
        assert self._parsed is not None
        return self._parsed

    def prepare(self, hosted: Hosted) -> bool:
        """Parse the request, the first time, and see whether it is still wanted; False = it was refused."""
        begin_ns = time.monotonic_ns()
        if self.cancelled:
            self.refuse(failures.cancelled())
            return False
        if self.deadline_ns is not None and begin_ns >= self.deadline_ns:
            self.refuse(failures.late(hosted.model, started=False))
            return False
        if self._parsed is None:
            try:
                self._parsed = hosted.forms.parse(
                    self.payload,
                    name=self.name,
                    version=hosted.version,
                    signature=hosted.signature,
                    most_bytes=self.channel.max_message_bytes,
                )
            except BaseException as error:
                self.refuse(failures.from_infer(error, hosted.model, hosted.device))
                return False
            self.input_ns = time.monotonic_ns() - begin_ns
        return True

    def run(self, hosted: Hosted, activity: Activity) -> BaseException | None:
        """Serve the request and send its final frame; return what the backend raised, if it did."""
        started_ns = time.monotonic_ns()
        if not self.prepare(hosted):
            return None
        try:
            self._serve(hosted, activity, started_ns)
        except BaseException as error:
            self.fail(hosted, error)
            return error
        return None

    def fail(self, hosted: Hosted, error: BaseException) -> None:
        """Answer with what the backend raised."""
        failure = failures.from_infer(error, hosted.model, hosted.device)
        if isinstance(error, Cancelled) and self.unloaded:
            failure = failures.not_loaded(hosted.model)
        elif isinstance(error, Cancelled) and not self.cancelled and self.unread:
            failure = failures.unread(hosted.model, UNREAD_S)
        elif isinstance(error, Cancelled) and not self.cancelled:
            failure = failures.late(hosted.model, started=True)
        self.refuse(failure)

    def answer(
        self, hosted: Hosted, header: worker_pb2.ResponseHeader, response: oip.Response
    ) -> None:
        """Send the one response, or that it is too large."""
        try:
            self.channel.send_response(
                self.request, self.generation, header, response, frames.FINAL
            )
        except ModelhostError as error:
            self.fail(hosted, error)

    @property
    def unread(self) -> bool:
        """Whether its reader has taken nothing for too long."""
        return self._stalled_s > 0 and time.monotonic() - self._stalled_s >= UNREAD_S

    def unwanted(self) -> bool:
        """Whether it was cancelled, its deadline has passed, or its reader takes nothing."""
        if self.cancelled or self.unread:
            return True
        return self.deadline_ns is not None and time.monotonic_ns() >= self.deadline_ns

    def _serve(self, hosted: Hosted, activity: Activity, started_ns: int) -> None:
        parsed = self.parsed
        header = worker_pb2.ResponseHeader(
            item_count=parsed.item_count,
            batch_size=parsed.item_count,
            queue_ns=max(0, started_ns - self.arrived_ns),
            input_ns=self.input_ns,
        )
        context = InferContext(
            parameters=parsed.parameters,
            outputs=frozenset(parsed.outputs),
            cancelled=self.unwanted,
            progress=activity.advance,
            let_pass=activity.let_pass,
            compute=activity.compute,
        )
        parsed_ns = time.monotonic_ns()
        if self.streaming:
            self._stream(hosted, parsed, context, header)
            activity.end()
            self.channel.send(Kind.RESPONSE, frames.FINAL, self.request, self.generation)
            return
        outputs = hosted.backend.infer(parsed.inputs, context)
        inferred_ns = time.monotonic_ns()
        response = oip.Response(parsed, hosted.version, outputs)
        header.infer_ns = inferred_ns - parsed_ns
        header.output_ns = time.monotonic_ns() - inferred_ns
        # Before the answer is out: what kills the process after it is not this model's doing.
        activity.end()
        self.channel.send_response(self.request, self.generation, header, response, frames.FINAL)

    def _stream(
        self,
        hosted: Hosted,
        parsed: oip.ParsedRequest,
        context: InferContext,
        header: worker_pb2.ResponseHeader,
    ) -> None:
        begin_ns = time.monotonic_ns()
        for outputs in hosted.backend.infer_stream(parsed.inputs, context):
            response = oip.Response(parsed, hosted.version, outputs)
            header.infer_ns = time.monotonic_ns() - begin_ns
            self._await_credit(context)
            self.spend_credit(response)
            self.channel.send_response(self.request, self.generation, header, response, 0)
            context.check_cancelled()
            begin_ns = time.monotonic_ns()
            header = worker_pb2.ResponseHeader(item_count=0)

    def _await_credit(self, context: InferContext) -> None:
        assert self._changed is not None
        with self._changed:
            while self.credit <= 0:
                context.check_cancelled()
                self._changed.wait(CREDIT_WAIT_S)
