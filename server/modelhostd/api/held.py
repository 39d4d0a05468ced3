"""What one stream of answers holds while it runs, and what ends it when nobody reads."""

import asyncio
from typing import Any, Protocol

import grpc
import structlog

from modelhostd.api import errors
from modelhostd.api.admission import Gate
from modelhostd.api.calls import Calls
from modelhostd.api.methods import Method
from modelhostd.core.errors import ModelhostError, Reason

log = structlog.get_logger(__name__)

STALL_S = 30.0
"""How long a write may stay unread."""


class GoneError(Exception):
    """The client is gone or does not read: nobody is there to be told of an error."""


class Door(Protocol):
    """Lets calls in and counts them out."""

    calls: Calls
    stall_s: float
    stalled_count: int

    def admit(self, method: Method, gate: Gate) -> int:
        """Let a call in and return its ticket, or raise why not."""

    def release(self, gate: Gate, ticket: int) -> None:
        """Count a call out."""


class Held:
    """What one stream holds: its permit, its ticket and its generator."""

    __slots__ = (
        *("door", "freeing", "gate", "items", "method"),
        *("stalled", "ticket", "writing"),
    )

    def __init__(self, door: Door, method: Method, gate: Gate) -> None:
        self.door = door
        self.method = method
        self.gate = gate
        self.ticket = 0
        self.items: Any = None
        self.writing = False
        self.stalled = False
        self.freeing: asyncio.Future[None] | None = None

    def take(self) -> None:
        """Let the call in."""
        self.ticket = self.door.admit(self.method, self.gate)

    def give_back(self) -> None:
        """Count the call out, once."""
        ticket, self.ticket = self.ticket, 0
        if ticket:
            self.door.release(self.gate, ticket)

    async def write(self, context: "grpc.aio.ServicerContext[Any, Any]", data: bytes) -> None:
        """Send one answer. Raises :class:`GoneError`, or what its caller is told where it stayed unread."""
        stall = asyncio.get_running_loop().call_later(self.door.stall_s, self.let_go)
        self.writing = True
        self.door.calls.writing.add(self)
        try:
            await context.write(data)
            self.writing = False
        except asyncio.CancelledError:
            raise
        except Exception as error:
            # cygrpc's ExecuteBatchError and its kin: the connection is gone.
            raise GoneError from error
        finally:
            stall.cancel()
            self.door.calls.writing.discard(self)
        if self.stalled and self.door.calls.draining.is_set():
            raise errors.shutting_down()
        if self.stalled:
            raise ModelhostError(
                Reason.DEADLINE_EXCEEDED,
                f"the stream was not read for {self.door.stall_s:g} s and was ended; open it again from "
                f"where it stopped",
                {"method": self.method.name},
            )

    def let_go(self) -> None:
        """Give up on a write that nobody reads: free what the stream holds, and leave the call."""
        if self.stalled:
            return
        self.stalled = True
        self.door.stalled_count += 1
        log.warning("a stream is not read", method=self.method.path)
        self.freeing = asyncio.ensure_future(self.free())

    async def free(self) -> None:
        """Close the generator and count the call out, once."""
        items, self.items = self.items, None
        try:
            if items is not None:
                await items.aclose()
        finally:
            self.give_back()
