"""Blocking work in threads of its own, and its outcome in the loop.

Not the loop's executor: a thread that is stuck in a name look-up must neither take a place from others nor
hold up the end of the process, so these are daemon threads, one per piece of work, bounded by the caller.
"""

import asyncio
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from modelhostd.adapters.blobs import Stopped
from modelhostd.adapters.cancel import Canceller

T = TypeVar("T")

SETTLE_S = 2.0
"""How long a cancelled piece of work may take to notice: its sockets are shut down already."""


def in_thread(work: Callable[[], T], name: str = "modelhostd-files") -> "asyncio.Future[T]":
    """Start ``work`` in a thread of its own; return the future of its outcome."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: BaseException | None) -> None:
        if future.done():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)  # type: ignore[arg-type]

    def run() -> None:
        result, failure = None, None
        try:
            result = work()
        except BaseException as error:
            failure = error
        try:
            loop.call_soon_threadsafe(settle, result, failure)
        except RuntimeError:
            return  # the loop is closed: nobody waits any more

    # An abandoned piece of work may fail: nobody is left to be told.
    future.add_done_callback(lambda done: done.cancelled() or done.exception())
    threading.Thread(target=run, name=name, daemon=True).start()
    return future


async def cancellable(canceller: Canceller, work: Callable[[], T]) -> T:
    """Run ``work`` in a thread; cancelling the task cancels the canceller and gives it time to end."""
    future = in_thread(work, "modelhostd-transfer")
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        canceller.cancel()
        await asyncio.wait({future}, timeout=SETTLE_S)
        raise


async def first_failure(tasks: Sequence["asyncio.Task[None]"], canceller: Canceller) -> None:
    """Wait for tasks that share a canceller; the first that fails by itself ends the others, and is raised."""
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        if all(task.done() and not task.exception() for task in tasks):
            return
        canceller.cancel()
        await asyncio.wait(tasks, timeout=SETTLE_S)
    finally:
        if not all(task.done() for task in tasks):
            canceller.cancel()
        for task in tasks:
            task.cancel()
        ended = await asyncio.gather(*tasks, return_exceptions=True)
    # Those that were stopped were stopped because of one that failed.
    failures = [end for end in ended if isinstance(end, BaseException)]
    raise min(failures, key=lambda failure: isinstance(failure, Stopped))


async def to_the_end(future: "asyncio.Future[Any]") -> None:
    """Wait for work that must not be left half-way, however often the task is cancelled meanwhile."""
    while not future.done():
        try:
            await asyncio.wait({future})
        except asyncio.CancelledError:
            continue
