"""Calls under way: what waits for work or for the end of the daemon, and what it leaves behind."""

import asyncio
import gc
from typing import Any

import pytest

from modelhostd.api.calls import USER_RIGHTS, Call, Caller, Calls


def made() -> Call:
    """Return a call without a connection."""
    caller = Caller("tester", USER_RIGHTS)
    nobody: Any = None
    return Call("/s/m", caller, "1", Calls(), nobody)


async def test_work_that_fails_as_its_caller_goes_away_is_no_surprise() -> None:
    """Whoever leaves in the very moment in which the work fails leaves no exception to be logged."""
    told: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))
    gate = asyncio.Event()

    async def work() -> None:
        await gate.wait()
        raise StopAsyncIteration

    waiting = asyncio.ensure_future(made().or_shutdown(work()))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    gate.set()
    await asyncio.sleep(0)
    # The work has failed; the one who waits for it has not looked yet.
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    del waiting
    gc.collect()
    await asyncio.sleep(0)
    assert not told
