"""Loads, unloads, checks and the stop of real workers."""

import asyncio
import dataclasses
import os
import signal

import pytest

from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.resources import Health, Isolation, Phase
from tests.support import wait_until_async
from tests.worker.harness import (
    CONFIG,
    cancelled_in_vain,
    encode,
    ignore,
    numbers,
    open_descriptors,
    running,
    spec,
    started,
)

MIB = 2**20


async def test_a_load_reports_its_way_and_what_it_holds():
    """Starting the worker, bytes, and the check are reported in order; the result has true bytes."""
    async with running() as (workers, listener):
        seen = []
        loaded = await workers.load("cpu", spec(backend="trouble", bytes=10 * MIB), seen.append)
        assert [report.phase for report in seen] == [
            Phase.STARTING_WORKER, Phase.LOADING, Phase.LOADING, Phase.CHECKING,
        ]  # fmt: skip
        assert [report.done_bytes for report in seen[1:]] == [5 * MIB, 10 * MIB, 10 * MIB]
        assert {report.total_bytes for report in seen[1:]} == {10 * MIB}
        assert (loaded.backend, loaded.measured_bytes) == ("trouble", 10 * MIB)
        assert len(listener.ready) == 1


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"load": "fail"}, Reason.LOAD_FAILED),
        ({"load": "bug"}, Reason.LOAD_FAILED),
        ({"load": "unsupported"}, Reason.UNSUPPORTED_MODEL),
        ({"load": "memory"}, Reason.OUT_OF_DEVICE_MEMORY),
        ({"check": "bad"}, Reason.LOAD_FAILED),
        ({"check": "raise"}, Reason.LOAD_FAILED),
    ],
    ids=str,
)
async def test_a_load_that_fails_is_typed_and_holds_nothing(options, reason, tmp_path):
    """Each way to fail has its reason, names no path, leaves the worker serving and its memory free."""
    async with running() as (workers, listener):
        await workers.load("cpu", spec("before"), ignore)
        (pid,) = workers.pids()
        before = resident_bytes(pid)
        with pytest.raises(ModelhostError) as caught:
            failing = spec(backend="trouble", model_dir=tmp_path, bytes=64 * MIB, **options)
            await workers.load("cpu", failing, ignore)
        assert caught.value.reason is reason
        assert str(tmp_path) not in caught.value.message
        assert resident_bytes(pid) < before + 32 * MIB
        await workers.infer("cpu", "before-1", 1, encode({}, name="before"), timeout_s=None)
        assert listener.exits == []


@pytest.mark.parametrize(
    ("backend", "task", "reason"),
    [
        ("forbidden", "other", Reason.BACKEND_NOT_AVAILABLE),
        ("", "other", Reason.UNSUPPORTED_MODEL),
    ],
)
async def test_a_model_without_a_backend_is_refused(backend, task, reason):
    """A backend that is not allowed, or a task that none serves, is said with what there is."""
    async with running() as (workers, _):
        with pytest.raises(ModelhostError) as caught:
            await workers.load("cpu", spec(backend=backend, task=task), ignore)
        assert caught.value.reason is reason
        assert "identity" in caught.value.message


async def test_the_task_chooses_the_backend():
    """Without a backend in its config a model gets the first that serves its task."""
    async with running() as (workers, _):
        loaded = await workers.load("cpu", spec(backend="", task="trouble"), ignore)
        assert loaded.backend == "trouble"


async def test_a_cancelled_load_leaves_nothing(tmp_path):
    """Cancelling ends the load in the worker before the call returns, and frees its memory."""
    gate = tmp_path / "gate"
    async with running() as (workers, _):
        await workers.load("cpu", spec("other"), ignore)
        (pid,) = workers.pids()
        before = resident_bytes(pid)
        slow = spec(backend="trouble", bytes=64 * MIB, load=f"wait:{gate}")
        load = asyncio.create_task(workers.load("cpu", slow, ignore))
        await wait_until_async(lambda: started(gate) == 1)
        load.cancel()
        with pytest.raises(asyncio.CancelledError):
            await load
        assert resident_bytes(pid) < before + 32 * MIB
        with pytest.raises(ModelhostError) as caught:
            await workers.infer("cpu", "m-1", 1, encode({}), timeout_s=None)
        assert caught.value.reason is Reason.MODEL_NOT_LOADED
        (worker,) = workers._workers()
        assert set(worker.leavings._bytes) == {("other-1", 1)}
        await workers.load("cpu", spec(generation=2), ignore)


async def test_a_load_does_not_hold_up_inference(tmp_path):
    """While one model loads, another in the same worker answers."""
    gate = tmp_path / "gate"
    async with running() as (workers, _):
        await workers.load("cpu", spec("ready"), ignore)
        slow = spec("slow", backend="trouble", load=f"wait:{gate}")
        load = asyncio.create_task(workers.load("cpu", slow, ignore))
        await wait_until_async(lambda: started(gate) == 1)
        for _ in range(20):
            await workers.infer("cpu", "ready-1", 1, encode({}, name="ready"), timeout_s=None)
        assert not load.done()
        gate.touch()
        await load


async def test_loads_of_two_models_run_at_the_same_time(tmp_path):
    """Neither of two loads waits for the other."""
    gates = [tmp_path / "one", tmp_path / "two"]
    async with running() as (workers, _):
        loads = [
            asyncio.create_task(
                workers.load("cpu", spec(gate.name, backend="trouble", load=f"wait:{gate}"), ignore)
            )
            for gate in gates
        ]
        await wait_until_async(lambda: all(started(gate) == 1 for gate in gates))
        assert len(workers.pids()) == 1
        for gate in gates:
            gate.touch()
        await asyncio.gather(*loads)


async def test_unload_frees_the_memory_before_it_returns():
    """When an unload has returned, the process is smaller and the instance gone; twice is harmless."""
    async with running() as (workers, _):
        await workers.load("cpu", spec(backend="trouble", bytes=128 * MIB), ignore)
        (pid,) = workers.pids()
        loaded = resident_bytes(pid)
        await workers.unload("cpu", "m-1", 1)
        assert resident_bytes(pid) < loaded - 100 * MIB
        await workers.unload("cpu", "m-1", 1)
        await workers.unload("cpu", "never", 1)
        with pytest.raises(ModelhostError) as caught:
            await workers.infer("cpu", "m-1", 1, encode({}), timeout_s=None)
        assert caught.value.reason is Reason.MODEL_NOT_LOADED


async def test_unload_waits_for_what_runs_and_refuses_what_waits(tmp_path):
    """A request in the middle is finished; those behind it are told that the model is gone."""
    gate = tmp_path / "gate"
    async with running() as (workers, _):
        await workers.load("cpu", spec(backend="trouble"), ignore)
        payload = encode({"x": numbers(1)}, parameters={"do": f"wait:{gate}"})
        replies = [workers.infer("cpu", "m-1", 1, payload, timeout_s=None) for _ in range(3)]
        await wait_until_async(lambda: started(gate) == 1)
        unload = asyncio.create_task(workers.unload("cpu", "m-1", 1))
        for reply in replies[1:]:
            with pytest.raises(ModelhostError) as caught:
                await reply
            assert caught.value.reason is Reason.MODEL_NOT_LOADED
        assert not unload.done()
        gate.touch()
        await replies[0]
        await unload


async def test_a_check_tells_what_the_backend_finds(tmp_path):
    """Health is what a canary in the worker finds now, and UNHEALTHY where nothing answers."""
    fault = tmp_path / "fault"
    async with running() as (workers, _):
        await workers.load("cpu", spec(backend="trouble", check=f"file:{fault}"), ignore)
        assert await workers.check("cpu", "m-1", 1) == (Health.HEALTHY, "All well.")
        fault.touch()
        assert await workers.check("cpu", "m-1", 1) == (Health.UNHEALTHY, "The file is there.")
        for generation, device in ((2, "cpu"), (1, "cuda-7")):
            health, _ = await workers.check(device, "m-1", generation)
            assert health is Health.UNHEALTHY


async def test_a_check_that_is_not_answered_in_time_is_unhealthy(tmp_path):
    """A model that is busy for too long does not keep the checker waiting."""
    gate = tmp_path / "gate"
    async with running(dataclasses.replace(CONFIG, check_timeout_s=0.1)) as (workers, _):
        await workers.load("cpu", spec(backend="trouble"), ignore)
        payload = encode({}, parameters={"do": f"wait:{gate}"})
        reply = workers.infer("cpu", "m-1", 1, payload, timeout_s=None)
        await wait_until_async(lambda: started(gate) == 1)
        health, why = await workers.check("cpu", "m-1", 1)
        assert (health, "0.1 s" in why) == (Health.UNHEALTHY, True)
        gate.touch()
        await reply


async def test_stop_lets_requests_finish_and_refuses_new_work(tmp_path):
    """Stopping answers what is in flight, then ends the process; nothing can be asked any more."""
    gate = tmp_path / "gate"
    async with running() as (workers, listener):
        await workers.load("cpu", spec(backend="trouble"), ignore)
        payload = encode({"x": numbers(1)}, parameters={"do": f"wait:{gate}"})
        reply = workers.infer("cpu", "m-1", 1, payload, timeout_s=None)
        await wait_until_async(lambda: started(gate) == 1)
        stop = asyncio.create_task(workers.stop(20))
        await asyncio.sleep(0)
        with pytest.raises(ModelhostError) as caught:
            await workers.load("cpu", spec("late"), ignore)
        assert caught.value.reason is Reason.SHUTTING_DOWN
        with pytest.raises(ModelhostError) as caught:
            await workers.infer("cpu", "m-1", 1, payload, timeout_s=None)
        assert caught.value.reason is Reason.SHUTTING_DOWN
        gate.touch()
        await reply
        await stop
        assert workers.pids() == {}
        assert listener.exits == []


async def test_stop_kills_a_worker_that_does_not_end(tmp_path):
    """A worker that is stuck is killed when the time is up; what was in it is told so."""
    mark = tmp_path / "mark"
    async with running() as (workers, _):
        await workers.load("cpu", spec(backend="trouble"), ignore)
        payload = encode({}, parameters={"do": f"stuck:{mark}"})
        reply = workers.infer("cpu", "m-1", 1, payload, timeout_s=None)
        await wait_until_async(mark.exists)
        await workers.stop(0.1)
        assert workers.pids() == {}
        with pytest.raises(ModelhostError) as caught:
            await reply
        assert caught.value.reason is Reason.SHUTTING_DOWN


async def test_stop_in_the_middle_of_a_start_leaves_no_process():
    """Stopping while a worker starts ends it too, and fails who waits for it."""
    async with running() as (workers, _):
        load = asyncio.create_task(workers.load("cpu", spec(), ignore))
        await wait_until_async(workers.pids)
        await workers.stop(5)
        assert workers.pids() == {}
        with pytest.raises((ModelhostError, asyncio.CancelledError)):
            await load


async def test_each_device_has_its_own_worker():
    """Models of two devices never share a process."""
    async with running() as (workers, _):
        await workers.load("cpu", spec("one"), ignore)
        await workers.load("sim-0", spec("two"), ignore)
        assert sorted(workers.pids().values()) == ["cpu", "sim-0"]


async def test_a_model_of_its_own_process_that_crashed_leaves_nothing_open():
    """It may never be loaded again; and where it is, it loads as before."""
    async with running() as (workers, listener):
        alone = spec(isolation=Isolation.PROCESS)
        for crashes in (1, 2):
            await workers.load("cpu", alone, ignore)
            (pid,) = workers.pids()
            os.kill(pid, 9)
            await listener.wait(exits=crashes)
            await workers.unload("cpu", "m-1", 1)
            await wait_until_async(
                lambda: not [name for name in open_descriptors().values() if "images" in name]
            )


async def test_a_model_of_its_own_process_ends_with_it():
    """Unloading an isolated model ends its process before the call returns, without an alarm."""
    async with running() as (workers, listener):
        await workers.load("cpu", spec(isolation=Isolation.PROCESS), ignore)
        (pid,) = workers.pids()
        await workers.unload("cpu", "m-1", 1)
        assert workers.pids() == {}
        assert listener.exits == []
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


async def test_an_unload_that_is_cancelled_has_ended_when_it_says_so():
    """However often: the memory is free by then, and a process that was the model's own has gone."""
    async with running() as (workers, _):
        await workers.load("cpu", spec(isolation=Isolation.PROCESS), ignore)
        (pid,) = workers.pids()
        os.kill(pid, signal.SIGSTOP)
        unload = asyncio.create_task(workers.unload("cpu", "m-1", 1))
        await cancelled_in_vain(unload, pid)
        assert workers.pids() == {}


def resident_bytes(pid: int) -> int:
    """Return the resident memory of a process, its shared arenas left out."""
    fields = {}
    with open(f"/proc/{pid}/status") as file:
        for line in file:
            name, _, value = line.partition(":")
            fields[name] = value.split()
    return int(fields["RssAnon"][0]) * 1024
