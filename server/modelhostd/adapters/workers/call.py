"""One request in flight, and the future that its caller waits for."""

import asyncio
from collections.abc import Callable
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

    __slots__ = (
        "abandoned", "credit", "generation", "header", "inline_bytes", "model", "on_message", "owner",
        "parts", "reply", "request", "size", "slot", "unsent",
    )  # fmt: skip

    def __init__(self, owner: "Owner", request: int, generation: int, model: str) -> None:
        self.owner = owner
        self.request = request
        self.generation = generation
        self.model = model
        self.reply: Reply | None = None
        self.on_message: Callable[[InferReply | ModelhostError | None], None] | None = None
        self.slot: int | None = None
        self.inline_bytes = 0
        self.unsent: memoryview | None = None
        self.abandoned = False
        self.credit = 0
        self.header = b""
        self.parts: list[bytes] = []
        self.size = 0

    def abandon(self) -> None:
        """Note that nobody waits any more, and tell the worker."""
        if not self.abandoned:
            self.abandoned = True
            self.owner.cancel(self)

    def fail(self, error: ModelhostError) -> None:
        """Answer with an error, if anybody waits."""
        if self.reply is not None:
            if not self.reply.done():
                self.reply.set_exception(error)
        elif self.on_message is not None:
            self.on_message(error)


def to_reply(header: worker_pb2.ResponseHeader, payload: bytes) -> InferReply:
    """Return a RESPONSE as the port gives it."""
    return InferReply(
        payload=payload,
        item_count=header.item_count,
        batch_size=header.batch_size,
        queue_ns=header.queue_ns,
        input_ns=header.input_ns,
        infer_ns=header.infer_ns,
        output_ns=header.output_ns,
    )
