"""A worker's start and the memory of its arenas: side by side, and either may fail."""

import asyncio
import errno
import os
import signal
import threading

import pytest

from modelhostd.adapters.workers.arenas import Arenas
from modelhostd.core.errors import ModelhostError, Reason
from tests.support import wait_until_async
from tests.worker.harness import DEADLINE_S, ignore, running, spec


async def test_a_worker_starts_before_its_arenas_have_memory(monkeypatch):
    """The process runs while its memory is still being allocated; it is greeted when that is done."""
    gate = threading.Event()
    fill = Arenas.fill

    def slow(arenas):
        gate.wait(DEADLINE_S)
        fill(arenas)

    monkeypatch.setattr(Arenas, "fill", slow)
    async with running() as (workers, listener):
        load = asyncio.create_task(workers.load("cpu", spec(), ignore))
        await wait_until_async(workers.pids)
        assert not listener.ready
        gate.set()
        await load


@pytest.mark.parametrize("kill", [False, True], ids=["no memory", "killed meanwhile"])
async def test_a_worker_without_its_memory_is_ended(monkeypatch, kill):
    """Where there is no memory, or the worker dies before it has it, the load says so; the next one works."""
    gate = threading.Event()
    fill = Arenas.fill

    def fail(arenas):
        gate.wait(DEADLINE_S)
        if not kill:
            raise OSError(errno.ENOSPC, "No space left on device")
        fill(arenas)

    async with running() as (workers, _):
        with monkeypatch.context() as patched:
            patched.setattr(Arenas, "fill", fail)
            load = asyncio.create_task(workers.load("cpu", spec(), ignore))
            await wait_until_async(workers.pids)
            (pid,) = workers.pids()
            if kill:
                os.kill(pid, signal.SIGKILL)
                await wait_until_async(lambda: not workers.pids())
            gate.set()
            with pytest.raises(ModelhostError) as caught:
                await load
            assert caught.value.reason is Reason.WORKER_LOST
            assert ("no memory" in caught.value.message) is not kill
        await workers.load("cpu", spec(generation=2), ignore)
