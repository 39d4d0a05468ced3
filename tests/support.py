"""Waiting in tests: for a condition, with a deadline, never for a time; and a port to wait at.

Import it as ``from tests.support import wait_until``; shared fakes live in ``tests.fakes``.
"""

import asyncio
import random
import select
import socket
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")

DEADLINE_S = 60.0
"""Far above what anything takes on a loaded machine: it bounds a failure, it measures nothing."""

# Below what the kernel gives to whoever binds port 0 or connects: those come by the hundred beside a test,
# and one of them could take a port between the look at it and its use.
_PORTS = range(11_000, 29_000)

_FIRST_PAUSE_S = 0.001
_LONGEST_PAUSE_S = 0.05


class ConditionNotMetError(AssertionError):
    """A condition did not hold before the deadline; the message says which, and its last value."""


def free_port() -> int:
    """Return a port of 127.0.0.1 that nobody listens on, and that nobody is given who asks for any port."""
    while True:
        port = random.SystemRandom().choice(_PORTS)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


def readable(*descriptors: int, timeout_s: float = DEADLINE_S) -> list[int]:
    """Return those of the descriptors that can be read (of a pidfd: whose process has ended) in time.

    Unlike ``select`` it takes any number: a long run of tests may have more than 1,024 open.
    """
    poll = select.poll()
    for descriptor in descriptors:
        poll.register(descriptor, select.POLLIN)
    return [descriptor for descriptor, _ in poll.poll(max(0.0, timeout_s) * 1000)]


def wait_until(condition: Callable[[], T], deadline_s: float = DEADLINE_S, *, what: str = "") -> T:
    """Return the first true value of ``condition()``, asked again and again from this thread.

    For threads and other processes. Inside a coroutine use :func:`wait_until_async`: this one would
    hold up the loop that the condition depends on. An exception of the condition ends the wait.
    """
    end = time.monotonic() + deadline_s
    pause_s = _FIRST_PAUSE_S
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() >= end:
            raise _not_met(condition, what, value, deadline_s)
        time.sleep(pause_s)
        pause_s = min(pause_s * 2, _LONGEST_PAUSE_S)


async def wait_until_async(
    condition: Callable[[], T | Awaitable[T]], deadline_s: float = DEADLINE_S, *, what: str = ""
) -> T:
    """Return the first true value of ``condition()``, which may be a coroutine function.

    Where the thing waited for can tell by itself (an event, a future, a stream), wait for that
    under ``asyncio.timeout`` instead.
    """
    loop = asyncio.get_running_loop()
    end = loop.time() + deadline_s
    pause_s = _FIRST_PAUSE_S
    while True:
        asked = condition()
        value = await asked if isinstance(asked, Awaitable) else asked
        if value:
            return value
        if loop.time() >= end:
            raise _not_met(condition, what, value, deadline_s)
        await asyncio.sleep(pause_s)
        pause_s = min(pause_s * 2, _LONGEST_PAUSE_S)


def _not_met(
    condition: Callable[[], object], what: str, value: object, deadline_s: float
) -> ConditionNotMetError:
    name = what or getattr(condition, "__qualname__", repr(condition))
    return ConditionNotMetError(f"not within {deadline_s:g} s: {name}; last value {value!r}")
