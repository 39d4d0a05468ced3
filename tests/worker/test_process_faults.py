"""Workers that die, hang or lie: only what was in flight fails, typed, and a new worker takes over."""

import asyncio
import dataclasses
import gc
import os
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from modelhostd.adapters.workers.arenas import Arenas
from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.resources import Isolation
from tests.support import wait_until, wait_until_async
from tests.worker.harness import (
    CONFIG,
    DEADLINE_S,
    ROOT,
    encode,
    ignore,
    numbers,
    open_descriptors,
    running,
    spec,
    started,
)

HOSTILE = Path(__file__).with_name("hostile_worker.py")
HASTY = dataclasses.replace(CONFIG, hang_timeout_s=4.0, escalation_s=2.0)
"""Finds a hang soon. For tests that want one: on a loaded machine it may find one where there is none."""


@pytest.mark.parametrize(
    ("what", "exit"),
    [
        ("kill:SIGKILL", "signal SIGKILL"),
        ("segv", "signal SIGSEGV"),
        ("exit:0", "exit code 0"),
        ("exit:3", "exit code 3"),
        ("kill:SIGABRT", "signal SIGABRT"),
    ],
)
async def test_a_dead_worker_fails_what_was_in_flight_and_is_replaced(what, exit, tmp_path):
    """Every way to die is reported with its cause and the model at work, and a new worker serves."""
    async with running() as (workers, listener):
        await workers.load("cpu", spec("bad", backend="trouble"), ignore)
        await workers.load("cpu", spec("good", backend="trouble"), ignore)
        bystander = workers.infer(
            "cpu", "good-1", 1,
            encode({}, name="good", parameters={"do": f"wait:{tmp_path / 'never'}"}),
            timeout_s=None,
        )  # fmt: skip
        await wait_until_async(lambda: started(tmp_path / "never") == 1)
        payload = encode({}, name="bad", parameters={"do": what})
        killer = workers.infer("cpu", "bad-1", 1, payload, timeout_s=None)
        for reply, model in ((killer, "bad"), (bystander, "good")):
            with pytest.raises(ModelhostError) as caught:
                await reply
            assert caught.value.reason is Reason.WORKER_LOST
            assert caught.value.metadata == {"model": model, "device": "cpu", "exit": exit}
            assert caught.value.retry_delay_s
        await listener.wait(exits=1, ready=2)
        (ended,) = listener.exits
        assert (ended.device, ended.exit, ended.blamed, ended.model) == ("cpu", exit, "bad", "")
        assert listener.ready[1][1] != ended.pid
        with pytest.raises(ModelhostError) as caught:
            await workers.infer("cpu", "good-1", 1, encode({}, name="good"), timeout_s=None)
        assert caught.value.reason is Reason.MODEL_NOT_LOADED
        await workers.load("cpu", spec("good", generation=2), ignore)
        await workers.infer("cpu", "good-1", 2, encode({}, name="good"), timeout_s=None)


async def test_the_last_words_of_a_worker_are_in_its_report():
    """What a dying worker wrote to standard error, a crash's stacks included, comes with its exit."""
    async with running() as (workers, listener):
        await workers.load("cpu", spec(backend="trouble"), ignore)
        for number, (what, words) in enumerate([("exit:1", "last words"), ("segv", "infer")], 1):
            await workers.load("cpu", spec(backend="trouble", generation=number + 1), ignore)
            request = encode({}, parameters={"do": what})
            with pytest.raises(ModelhostError):
                await workers.infer("cpu", "m-1", number + 1, request, timeout_s=None)
            await listener.wait(exits=number, ready=number + 1)
            assert words in listener.exits[-1].stderr_tail


async def test_a_load_that_kills_the_worker_fails_with_it_and_bears_the_blame():
    """A crash during a load fails the load with WORKER_LOST and names the model."""
    async with running() as (workers, listener):
        with pytest.raises(ModelhostError) as caught:
            await workers.load("cpu", spec("fatal", backend="trouble", load="exit"), ignore)
        assert caught.value.reason is Reason.WORKER_LOST
        await listener.wait(exits=1, ready=2)
        assert listener.exits[0].blamed == "fatal"
        await workers.load("cpu", spec(), ignore)


async def test_an_idle_worker_that_is_killed_blames_nobody():
    """A worker killed between requests is replaced, with no model to blame."""
    async with running() as (workers, listener):
        await workers.load("cpu", spec(), ignore)
        await workers.infer("cpu", "m-1", 1, encode({}), timeout_s=None)
        (pid,) = workers.pids()
        os.kill(pid, signal.SIGKILL)
        await listener.wait(exits=1, ready=2)
        assert (listener.exits[0].pid, listener.exits[0].blamed) == (pid, "")
        assert pid not in workers.pids()


@pytest.mark.parametrize("verb", ["stuck", "hold"])
async def test_a_worker_that_hangs_is_found_and_replaced(verb, tmp_path):
    """A thread that does not get on, or holds the interpreter, costs the worker; its stacks are kept."""
    mark = tmp_path / "mark"
    async with running(HASTY) as (workers, listener):
        await workers.load("cpu", spec(backend="trouble"), ignore)
        request = encode({}, parameters={"do": f"{verb}:{mark}"})
        reply = workers.infer("cpu", "m-1", 1, request, timeout_s=None)
        with pytest.raises(ModelhostError) as caught:
            await reply
        assert caught.value.reason is Reason.WORKER_LOST
        await listener.wait(exits=1, ready=2)
        ended = listener.exits[0]
        assert ended.exit.startswith("hung: no ")
        assert ended.blamed == "m"
        if verb == "stuck":
            assert "trouble_backend.py" in ended.stderr_tail


async def test_an_unload_that_hangs_is_found_as_a_hang():
    """A backend that does not come back from its unload costs the worker, and the unload ends with that."""
    async with running(HASTY) as (workers, listener):
        await workers.load("cpu", spec(backend="trouble", unload="stuck"), ignore)
        async with asyncio.timeout(DEADLINE_S):
            await workers.unload("cpu", "m-1", 1)
        await listener.wait(exits=1, ready=2)
        assert listener.exits[0].exit.startswith("hung: no progress")
        assert listener.exits[0].blamed == "m"


async def test_a_stopped_worker_is_found_and_killed():
    """A worker under SIGSTOP takes no signal but SIGKILL, and gets it."""
    async with running(HASTY) as (workers, listener):
        await workers.load("cpu", spec(), ignore)
        (pid,) = workers.pids()
        os.kill(pid, signal.SIGSTOP)
        await wait_until_async(lambda: all_stopped(pid))
        reply = workers.infer("cpu", "m-1", 1, encode({}), timeout_s=None)
        with pytest.raises(ModelhostError):
            await reply
        await listener.wait(exits=1, ready=2)
        assert listener.exits[0].exit.startswith("hung: no heartbeat")


async def test_long_work_that_reports_progress_is_not_a_hang(tmp_path):
    """A request may run far longer than the hang timeout as long as its backend shows progress."""
    gate = tmp_path / "gate"
    async with running(HASTY) as (workers, listener):
        await workers.load("cpu", spec(backend="trouble"), ignore)
        payload = encode({}, parameters={"do": f"advance:{gate}"})
        reply = workers.infer("cpu", "m-1", 1, payload, timeout_s=None)
        loop = asyncio.get_running_loop()
        beyond = loop.time() + 2 * HASTY.hang_timeout_s
        await wait_until_async(lambda: loop.time() > beyond or listener.exits)
        gate.touch()
        await reply
        assert listener.exits == []


async def test_a_device_fault_ends_the_worker_after_its_answer():
    """A poisoned process answers the request that found it, then makes room for a new one."""
    async with running() as (workers, listener):
        await workers.load("cpu", spec(backend="trouble"), ignore)
        with pytest.raises(ModelhostError) as caught:
            request = encode({}, parameters={"do": "poison"})
            await workers.infer("cpu", "m-1", 1, request, timeout_s=None)
        assert caught.value.reason is Reason.INFERENCE_FAILED
        await listener.wait(exits=1, ready=2)
        assert (listener.exits[0].exit, listener.exits[0].blamed) == ("exit code 70", "m")


async def test_a_model_of_its_own_process_dies_alone():
    """With process isolation a crash does not touch the device's shared worker."""
    async with running() as (workers, listener):
        await workers.load("cpu", spec("shared"), ignore)
        alone = spec("alone", backend="trouble", isolation=Isolation.PROCESS)
        await workers.load("cpu", alone, ignore)
        assert sorted(workers.pids().values()) == ["cpu", "cpu"]
        with pytest.raises(ModelhostError):
            request = encode({}, name="alone", parameters={"do": "kill:SIGKILL"})
            await workers.infer("cpu", "alone-1", 1, request, timeout_s=None)
        await listener.wait(exits=1)
        assert (listener.exits[0].model, listener.exits[0].blamed) == ("alone", "alone")
        await workers.infer("cpu", "shared-1", 1, encode({}, name="shared"), timeout_s=None)
        await workers.load("cpu", dataclasses.replace(alone, generation=2), ignore)
        await workers.unload("cpu", "alone-1", 2)
        assert len(workers.pids()) == 1
        assert len(listener.exits) == 1


@pytest.mark.parametrize(
    "mode",
    ["garbage", "huge-length", "wrong-id", "twice", "not-final", "slot-outside", "bad-header",
     "endless", "flood", "close", "half", "control-garbage"],
)  # fmt: skip
async def test_a_worker_that_breaks_the_protocol_is_dropped(mode, tmp_path):
    """Whatever comes over its socket, that worker is killed and only what was in it fails."""
    config = hostile(mode, tmp_path)
    async with running(config) as (workers, listener):
        await workers.load("cpu", spec(), ignore)
        reply = workers.infer("cpu", "m-1", 1, encode({"x": numbers(4)}), timeout_s=None)
        later = workers.infer("cpu", "m-1", 1, encode({"x": numbers(4)}), timeout_s=None)
        results = await asyncio.gather(reply, later, return_exceptions=True)
        assert isinstance(results[1], ModelhostError)
        assert results[1].reason is Reason.WORKER_LOST
        await listener.wait(exits=1)


@pytest.mark.parametrize(
    "mode", ["silent", "version", "exit-early", "wrong-answer", "bad-hello", "bad-loaded"]
)
async def test_a_worker_that_cannot_be_greeted_fails_the_load(mode, tmp_path):
    """A worker that never gets ready fails who waits for it, with the reason, and nothing hangs."""
    config = dataclasses.replace(hostile(mode, tmp_path), start_timeout_s=1.0)
    async with running(config) as (workers, _):
        with pytest.raises(ModelhostError) as caught:
            await workers.load("cpu", spec(), ignore)
        assert caught.value.reason is Reason.WORKER_LOST
        await wait_until_async(lambda: not workers.pids() or mode == "wrong-answer")


async def test_an_interpreter_that_is_not_there_is_a_typed_error(tmp_path):
    """Where no process can be started the load says so, and says it again at the next try."""
    config = dataclasses.replace(CONFIG, python=str(tmp_path / "nowhere"))
    async with running(config) as (workers, _):
        for _ in range(2):
            with pytest.raises(ModelhostError) as caught:
                await workers.load("cpu", spec(), ignore)
            assert caught.value.reason is Reason.WORKER_LOST
            assert "could not be started" in caught.value.message


async def test_letting_go_of_a_dead_worker_holds_nobody_up(monkeypatch):
    """A death is told, and the next worker runs, before the memory of the dead one is given back."""
    gate = threading.Event()
    close = Arenas.close

    def slow(arenas):
        assert threading.current_thread() is not threading.main_thread()
        gate.wait(DEADLINE_S)
        close(arenas)

    monkeypatch.setattr(Arenas, "close", slow)
    async with running() as (workers, listener):
        await workers.load("cpu", spec(backend="trouble"), ignore)
        request = encode({}, parameters={"do": "kill:SIGKILL"})
        with pytest.raises(ModelhostError):
            await workers.infer("cpu", "m-1", 1, request, timeout_s=None)
        await listener.wait(exits=1, ready=2)
        await workers.load("cpu", spec(generation=2), ignore)
        gate.set()


# As many processes start one after the other: seconds each where the machine has other work.
@pytest.mark.parametrize(
    "crashes",
    [
        pytest.param(25, marks=pytest.mark.timeout(900)),
        pytest.param(250, marks=[pytest.mark.slow, pytest.mark.timeout(9000)]),
    ],
)
async def test_crashes_leave_no_descriptor_and_no_task_behind(crashes):
    """After many crashes the daemon holds exactly what it held after the first."""
    patient = dataclasses.replace(CONFIG, arena_bytes=2**17)
    async with running(patient) as (workers, listener):
        baseline = None
        tasks = 0
        for number in range(1, crashes + 1):
            seat = workers._seats.get(("cpu", ""))
            if seat is not None:
                # Each crash would double the wait for the next start, which is tested elsewhere.
                seat._backoff = type(seat._backoff)()
            await workers.load("cpu", spec(backend="trouble", generation=number), ignore)
            request = encode({}, parameters={"do": "kill:SIGKILL"})
            with pytest.raises(ModelhostError):
                await workers.infer("cpu", "m-1", number, request, timeout_s=None)
            await listener.wait(exits=number, ready=number + 1)
            if number == 1:
                baseline = len(open_descriptors())
                tasks = len(asyncio.all_tasks())
        gc.collect()
        # What belonged to the last one that died goes a moment after its replacement is ready.
        await wait_until_async(
            lambda: len(open_descriptors()) <= baseline and len(asyncio.all_tasks()) <= tasks,
            what=f"no more than {baseline} descriptors and {tasks} tasks",
        )


async def test_a_worker_that_floods_standard_error_is_read_and_bounded():
    """Megabytes on standard error neither block the worker nor grow the daemon's memory of it."""
    async with running() as (workers, listener):
        await workers.load("cpu", spec(backend="trouble"), ignore)
        request = encode({}, parameters={"do": "shout:20000"})
        await workers.infer("cpu", "m-1", 1, request, timeout_s=None)
        with pytest.raises(ModelhostError):
            request = encode({}, parameters={"do": "exit:1"})
            await workers.infer("cpu", "m-1", 1, request, timeout_s=None)
        await listener.wait(exits=1)
        assert len(listener.exits[0].stderr_tail) <= 32_000


def test_a_worker_does_not_outlive_a_killed_daemon(tmp_path):
    """When the process that started it is gone by SIGKILL, the worker is too."""
    note = tmp_path / "pid"
    program = (
        "import asyncio, pathlib, sys\n"
        "from tests.worker.harness import ProcessWorkers, CONFIG, ignore, spec\n"
        "async def main():\n"
        "    workers = ProcessWorkers(CONFIG)\n"
        "    await workers.load('cpu', spec(), ignore)\n"
        "    (pid,) = workers.pids()\n"
        "    path = pathlib.Path(sys.argv[1])\n"
        "    path.with_suffix('.part').write_text(str(pid))\n"
        "    path.with_suffix('.part').rename(path)\n"
        "    await asyncio.Event().wait()\n"
        "asyncio.run(main())\n"
    )
    paths = os.pathsep.join(str(ROOT / part) for part in ("client", "server", ""))
    parent = subprocess.Popen(
        [sys.executable, "-c", program, str(note)], env={**os.environ, "PYTHONPATH": paths}
    )
    try:
        wait_until(lambda: note.exists() or parent.poll() is not None)
        worker = os.pidfd_open(int(note.read_text()))
    finally:
        parent.kill()
        parent.wait(DEADLINE_S)
    try:
        wait_until(lambda: is_dead(worker))
    finally:
        os.close(worker)


def all_stopped(pid):
    """Whether each thread of a process has come to its stop."""
    threads = Path(f"/proc/{pid}/task").glob("*/stat")
    return all(path.read_text().rpartition(")")[2].split()[0] == "T" for path in threads)


def is_dead(pidfd):
    """Whether a process that is not our child has ended (a zombie has)."""
    try:
        signal.pidfd_send_signal(pidfd, 0)
    except ProcessLookupError:
        return True
    with open(f"/proc/self/fdinfo/{pidfd}") as info:
        (pid,) = (line.split()[1] for line in info if line.startswith("Pid:"))
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def hostile(mode, tmp_path):
    """Return a configuration whose workers misbehave."""
    program = tmp_path / "hostile"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} {HOSTILE} "$@"\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return dataclasses.replace(
        CONFIG, python=str(program), environment={"HOSTILE": mode}, max_message_bytes=4 * 2**20
    )
