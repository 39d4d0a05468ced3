"""Calls under way: what a handler knows of its call, and the registry that draining waits for."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable
from contextlib import aclosing
from typing import Any, Protocol, TypeVar

import grpc

from modelhost.v1 import options_pb2
from modelhostd.api.errors import shutting_down
from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.values import dataclass

T = TypeVar("T")

USER_RIGHTS = frozenset({options_pb2.READ, options_pb2.INFER, options_pb2.MANAGE})
OPERATOR_RIGHTS = USER_RIGHTS | {options_pb2.OPERATE}


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls, as far as the listener tells: its name in operations and events, and its rights."""

    principal: str
    rights: frozenset[int]


class Writer(Protocol):
    """A stream whose write is under way."""

    def let_go(self) -> None:
        """Free what the stream holds, and leave the call to the connection."""


class Calls:
    """Every call under way. Draining waits on this, since grpc's ``stop`` does not wait for handlers."""

    def __init__(self) -> None:
        self._tasks: dict[int, tuple[str, asyncio.Task[Any]]] = {}
        self._next = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self.writing: set[Writer] = set()
        """Streams that wait for their client to read."""
        self.draining = asyncio.Event()
        """Set when the daemon begins to stop: streams and waits end, new calls are refused."""
        self.closing = False
        """Whether the time for draining is over and handlers are being cancelled."""

    def enter(self, method: str) -> int:
        """Register the current task and return its ticket for ``leave``."""
        task = asyncio.current_task()
        assert task is not None
        self._next += 1
        self._tasks[self._next] = method, task
        self._idle.clear()
        return self._next

    def leave(self, ticket: int) -> None:
        """Forget a call; a ticket may be given back twice."""
        self._tasks.pop(ticket, None)
        if not self._tasks:
            self._idle.set()

    def __len__(self) -> int:
        return len(self._tasks)

    async def wait_idle(self, timeout_s: float) -> bool:
        """Wait until no call is under way; False when that takes longer than ``timeout_s``."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    def let_writers_go(self) -> None:
        """Give up on the writes that are under way: their clients do not read."""
        for writer in list(self.writing):
            writer.let_go()

    def cancel_all(self) -> list[str]:
        """Cancel the handlers of what is still under way; returns their methods."""
        self.closing = True
        left = list(self._tasks.values())
        for _, task in left:
            task.cancel()
        return [method for method, _ in left]


@dataclass(slots=True, eq=False)
class Call:
    """One call, as its handler sees it; not to be changed (frozen, making one would cost 2 us more).

    ``method`` is gRPC's path (``/modelhost.v1.ModelService/GetModel``); ``request_id`` is the caller's
    ``x-request-id``, or one made here.
    """

    method: str
    caller: Caller
    request_id: str
    calls: Calls
    context: "grpc.aio.ServicerContext[Any, Any]"
    named: bool = False
    """Whether ``request_id`` is the caller's own."""

    @property
    def principal(self) -> str:
        """Who calls, as operations and events are to show it."""
        return self.caller.principal

    @property
    def draining(self) -> asyncio.Event:
        """Set when the daemon begins to stop."""
        return self.calls.draining

    def remaining_s(self) -> float | None:
        """Return the seconds until the call's deadline; None when it has none."""
        remaining: float | None = self.context.time_remaining()
        return remaining

    def require(self, right: int, what: str) -> None:
        """Raise PERMISSION_DENIED unless the caller has ``right``, which ``what`` (a field) needs."""
        if right not in self.caller.rights:
            raise denied(self.method, right, self.caller.principal, what)

    async def or_shutdown(self, work: Awaitable[T]) -> T:
        """Return what ``work`` gives, or raise SHUTTING_DOWN when draining begins before; then it is
        cancelled.
        """
        task = asyncio.ensure_future(work)
        drained = asyncio.ensure_future(self.draining.wait())
        try:
            await asyncio.wait({task, drained}, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            raise shutting_down()
        finally:
            drained.cancel()
            if not task.done():
                task.cancel()
                # Its finally blocks run before the caller goes on.
                await asyncio.wait({task})
            if not task.cancelled():
                # Looked at, or it would be logged as lost: a caller that leaves as the work ends
                # never asks for the outcome.
                task.exception()

    async def until_shutdown(self, items: AsyncIterator[T]) -> AsyncGenerator[T, None]:
        """Yield what ``items`` (an async generator) yields; raise SHUTTING_DOWN once draining begins."""
        async with aclosing(items):  # type: ignore[type-var]
            while True:
                try:
                    item = await self.or_shutdown(anext(items))
                except StopAsyncIteration:
                    return
                yield item


def denied(method: str, right: int, principal: str, what: str = "") -> ModelhostError:
    """Return PERMISSION_DENIED for a method, or for ``what`` of it."""
    short = method.rpartition("/")[2]
    name = options_pb2.Right.Name(right)  # type: ignore[arg-type]
    return ModelhostError(
        Reason.PERMISSION_DENIED,
        f"{what or short} needs the right {name}, which '{principal}' does not have; call it over "
        f"the admin socket (GetHost lists the listeners)",
        {"method": short, "right": name},
    )
