"""One request in flight, and the future that its caller waits for."""

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from modelhostd.core.errors import ModelhostError
from modelhostd.ports import InferReply
from modelhostd.worker.v1 import worker_pb2


class Owner(Protocol):
    """Whoever sent the call."""

    def cancel(self, call: "Call") -> None:
        """Stop a call that nobody waits for any more."""


class Reply(asyncio.Future[InferReply]):
    """The answer to one request. Cancelling it tells the worker; the slot stays until its last frame."""

    call: "Call | None" = None

    def cancel(self, msg: object = None) -> bool:
        """Give up waiting."""
        cancelled = super().cancel(msg)
        if cancelled and self.call is not None:
            self.call.abandon()
        return cancelled


class Call:
    """One request, from being sent to its final frame."""

    # Here, not in the constructor, which runs for each request: most are never set.
    reply: Reply | None = None
    on_message: Callable[[InferReply | ModelhostError | None], None] | None = None
    slot: int | None = None
    inline_bytes = 0
    unsent: memoryview | None = None
    abandoned = False
    credit = 0
    header = b""
    parts: Sequence[bytes] = ()
    size = 0

    def __init__(self, owner: "Owner", request: int, generation: int, model: str) -> None:
        self.owner = owner
        self.request = request
        self.generation = generation
        self.model = model
        self.sent_ns = time.monotonic_ns()

    def abandon(self) -> None:
        """Note that nobody waits any more, and tell the worker."""
        if not self.abandoned:
            self.abandoned = True
            self.owner.cancel(self)

    def settle(self) -> Reply | None:
        """Return who waits for the one answer, if anybody still does, and let go of it.

        Each holds the other: an answer of 16 MiB would else stay until the collector comes by (bench/RESULTS.md).
        """
        reply, self.reply = self.reply, None
        if reply is None:
            return None
        reply.call = None
        return None if reply.done() else reply

    def fail(self, error: ModelhostError) -> None:
        """Answer with an error, if anybody waits."""
        if self.on_message is not None:
            self.on_message(error)
        elif (reply := self.settle()) is not None:
            reply.set_exception(error)

    def answer(self, header: worker_pb2.ResponseHeader, payload: bytes) -> InferReply:
        """Return a RESPONSE as the port gives it.

        No time in it is longer than what has passed since the request was sent, whatever the worker says.
        """
        passed_ns = time.monotonic_ns() - self.sent_ns
        queue_ns, input_ns = header.queue_ns, header.input_ns
        infer_ns, output_ns = header.infer_ns, header.output_ns
        if queue_ns + input_ns + infer_ns + output_ns > passed_ns:
            queue_ns, input_ns = min(queue_ns, passed_ns), min(input_ns, passed_ns)
            infer_ns, output_ns = min(infer_ns, passed_ns), min(output_ns, passed_ns)
        items, size = header.item_count, header.batch_size
        return InferReply(
            payload, items, size, queue_ns, input_ns, infer_ns, output_ns, header.last
        )
