"""Images that outlive their worker: the next one adopts what holds, on real processes, and reads what does not."""

import asyncio
import dataclasses
import os
import signal

import pytest

from modelhostd.adapters.workers.images import ImageMemory
from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.worker.wire import images
from modelhostd.worker.wire.images import PAGE_BYTES, SPACE_BYTES, Kept, Range
from tests.support import wait_until_async
from tests.worker.adoption_scene import DEADLINE_S, REAL, Scene
from tests.worker.harness import cancelled_in_vain, ignore, running

pytestmark = pytest.mark.timeout(900)  # each starts workers that import torch, on a busy machine


@pytest.mark.parametrize("device", ["cpu", "sim-0"])
async def test_the_next_worker_answers_without_the_files(device, tmp_path):
    """What was on the device and what was warm is adopted, twice over, and answers the same bits; nothing else stays."""
    async with running(REAL) as (workers, listener):
        scene = Scene(workers, listener, device, tmp_path)
        expected = await scene.load("a", "b")
        if device != "cpu":
            assert await workers.demote(device, "a-1", ord("a"))
        scene.hide()
        for _ in range(2 if device == "cpu" else 1):
            kept = await scene.kill()
            assert set(kept) == {"a", "b"}
            assert workers.unowned_bytes() == sum(kept.values())
            # To the page: of each image, and of what tells what lies where in it.
            pages = sum(-(-size // PAGE_BYTES) * PAGE_BYTES for size in kept.values())
            assert scene.memory.held_bytes == pages + 2 * PAGE_BYTES
            adopted = [(await scene.promote(model)).adopted_bytes for model in "ab"]
            assert adopted == [kept["a"], kept["b"]]
            assert [await scene.infer(model) for model in "ab"] == expected
            assert workers.unowned_bytes() == 0
        for model in "ab":
            await workers.unload(device, f"{model}-1", ord(model))
        assert scene.memory.held_bytes == 0


async def test_what_changed_since_is_not_used_and_what_was_half_never_known(tmp_path):
    """A byte that was written over is found, the file is read again; loads that did not end, or were not hashed, leave nothing."""
    async with running(REAL) as (workers, listener):
        scene = Scene(workers, listener, "cpu", tmp_path)
        expected = await scene.load("a", "b")
        with pytest.raises(ModelhostError):
            await workers.load("cpu", scene.spec("c", fail=True), ignore)
        os.kill(scene.worker.pid, 19)  # SIGSTOP: what it would still tell is not told
        late = asyncio.create_task(workers.load("cpu", scene.spec("d"), ignore))
        await asyncio.sleep(0)
        assert set(await scene.kill()) == {"a", "b"}
        with pytest.raises(ModelhostError):
            await late
        at = scene.memory.kept["a-1", ord("a")].weights
        os.pwrite(scene.memory._fd, b"\x01", at.start + at.length // 2)
        with pytest.raises(ModelhostError) as caught:
            await scene.promote("a")
        assert caught.value.reason is Reason.MODEL_NOT_LOADED
        assert caught.value.metadata["state"] == "DAMAGED"
        await workers.unload("cpu", "a-1", ord("a"))
        loaded = await workers.load("cpu", scene.spec("a"), ignore)
        assert loaded.adopted_bytes == 0
        assert (await scene.promote("b")).adopted_bytes
        assert [await scene.infer(model) for model in "ab"] == expected


async def test_what_outlived_a_worker_can_be_dropped_with_and_without_another(tmp_path):
    """Unloaded before the next worker knows of it, or after, its memory is free when that returns; nothing is adopted then."""
    async with running(REAL) as (workers, listener):
        scene = Scene(workers, listener, "sim-0", tmp_path)
        await scene.load("a", "b", "c")
        assert await workers.demote("sim-0", "c-1", ord("c"))
        await scene.kill()
        before = scene.memory.held_bytes
        await workers.unload("sim-0", "a-1", ord("a"))
        assert scene.memory.held_bytes == before * 2 // 3
        assert (await scene.promote("b")).adopted_bytes
        assert await workers.demote("sim-0", "c-1", ord("c"))
        await workers.unload("sim-0", "c-1", ord("c"))
        for model in "ac":
            with pytest.raises(ModelhostError) as caught:
                await scene.promote(model)
            assert caught.value.reason is Reason.MODEL_NOT_LOADED
        await workers.unload("sim-0", "b-1", ord("b"))
        # The slabs are the worker's own.
        assert scene.memory.held_bytes == 0


async def test_what_outlived_a_worker_is_free_when_a_cancelled_unload_says_so(tmp_path):
    """With a worker that was told of it, and that is slow to free it: to the page, and no sooner."""
    async with running(REAL) as (workers, listener):
        scene = Scene(workers, listener, "sim-0", tmp_path)
        await scene.load("a")
        await scene.kill()
        await wait_until_async(lambda: len(listener.ready) == 2, DEADLINE_S)
        os.kill(scene.worker.pid, signal.SIGSTOP)
        unload = asyncio.create_task(workers.unload("sim-0", "a-1", ord("a")))
        await cancelled_in_vain(unload, scene.worker.pid)
        assert scene.memory.held_bytes == 0


async def test_a_dropped_copy_is_free_at_once_and_outlives_no_worker(tmp_path):
    """To the page, while requests run; what was told of it is void, and what is loaded in its place is adopted as ever."""
    async with running(REAL) as (workers, listener):
        scene = Scene(workers, listener, "sim-0", tmp_path)
        expected = await scene.load("a", "b")
        before = scene.memory.held_bytes
        runs = [asyncio.create_task(scene.infer("a")) for _ in range(20)]
        assert await workers.drop_copy("sim-0", "a-1", ord("a")) == 0
        assert scene.memory.held_bytes == before // 2
        assert await asyncio.gather(*runs) == expected[:1] * 20
        await workers.load("sim-0", scene.spec("c"), ignore)
        await wait_until_async(lambda: workers.at_rest("sim-0") == 2, DEADLINE_S)
        assert scene.memory.held_bytes == before
        kept = await scene.kill()
        assert set(kept) == {"b", "c"}
        assert [(await scene.promote(m)).adopted_bytes for m in "bc"] == [kept["b"], kept["c"]]
        assert await scene.infer("b") == expected[1]
        with pytest.raises(ModelhostError) as caught:
            await scene.promote("a")
        assert caught.value.reason is Reason.MODEL_NOT_LOADED


async def test_what_is_told_of_a_copy_that_goes_is_not_believed(tmp_path):
    """A copy that is dropped while it is hashed leaves nothing, whichever comes first; so does a worker that dies of it."""
    async with running(REAL) as (workers, listener):
        scene = Scene(workers, listener, "sim-0", tmp_path)
        for model in "abcd":
            await workers.load("sim-0", scene.spec(model), ignore)
            assert await workers.drop_copy("sim-0", f"{model}-1", ord(model)) == 0
        assert workers.at_rest("sim-0") == 0
        await scene.load("e")
        drop = asyncio.create_task(workers.drop_copy("sim-0", "e-1", ord("e")))
        await asyncio.sleep(0)
        assert await scene.kill() == {}
        assert await drop == 0
        assert scene.memory.held_bytes == 0


async def test_what_was_of_no_use_is_not_offered_again(tmp_path):
    """A module that does with little of what was adopted has it freed: the next crash leaves it to nobody, and others theirs."""
    async with running(REAL) as (workers, listener):
        scene = Scene(workers, listener, "sim-0", tmp_path)
        await workers.load("sim-0", scene.spec("a", converted_later=True), ignore)
        await workers.load("sim-0", scene.spec("b"), ignore)
        await wait_until_async(lambda: workers.at_rest("sim-0") == 2, DEADLINE_S)
        expected = await scene.infer("b")
        assert set(await scene.kill()) == {"a", "b"}
        before = scene.memory.held_bytes
        assert (await scene.promote("a")).adopted_bytes == 0
        assert scene.memory.held_bytes == before - PAGE_BYTES  # of what told what lies where
        assert workers.at_rest("sim-0") == 0
        assert (await scene.promote("b")).adopted_bytes
        await workers.load("sim-0", scene.spec("c"), ignore)
        await wait_until_async(lambda: workers.at_rest("sim-0") == 2, DEADLINE_S)
        assert set(await scene.kill()) == {"b", "c"}
        await scene.promote("b")
        assert await scene.infer("b") == expected


async def test_an_adoption_that_is_cancelled_twice_has_ended_when_it_says_so(tmp_path):
    """Neither a load nor a way back is half done for whoever asks next, however often its waiter was cancelled."""
    async with running(REAL) as (workers, listener):
        scene = Scene(workers, listener, "sim-0", tmp_path)
        expected = await scene.load("a")
        await scene.kill()
        await wait_until_async(lambda: len(listener.ready) == 2, DEADLINE_S)
        for _ in range(2):  # adopted first, then back from host memory
            os.kill(scene.worker.pid, signal.SIGSTOP)
            task = asyncio.create_task(scene.promote("a"))
            await cancelled_in_vain(task, scene.worker.pid)
            await scene.promote("a")
            assert await scene.infer("a") == expected[0]
            assert await workers.demote("sim-0", "a-1", ord("a"))


async def test_a_load_that_fails_leaves_what_outlived_its_process(tmp_path):
    """A model with a process of its own keeps its image over a load that fails, and the memory that it is in."""
    async with running(REAL) as (workers, listener):
        scene = Scene(workers, listener, "sim-0", tmp_path)
        own = dataclasses.replace(scene.spec("a"), isolated=True)
        await workers.load("sim-0", own, ignore)
        await wait_until_async(lambda: workers.at_rest("sim-0"), DEADLINE_S)
        expected = await scene.infer("a")
        scene.worker.kill("signal SIGKILL")
        await wait_until_async(lambda: listener.exits, DEADLINE_S)
        with pytest.raises(ModelhostError):
            failing = scene.spec("a", fail=True)
            await workers.load(
                "sim-0", dataclasses.replace(failing, generation=7, isolated=True), ignore
            )
        assert workers.unowned_bytes() > 0
        assert (await scene.promote("a")).adopted_bytes > 0
        assert await scene.infer("a") == expected
        await workers.unload("sim-0", "a-1", ord("a"))
        assert not workers.pids()


async def test_killed_for_memory_it_leaves_nothing(tmp_path, monkeypatch):
    """After a SIGKILL that nobody here sent, while the kernel killed somebody for memory, all of it is free."""
    async with running(REAL) as (workers, listener):
        scene = Scene(workers, listener, "cpu", tmp_path)
        await scene.load("a")
        monkeypatch.setattr("modelhostd.adapters.memory.oom_kills", lambda: 10**9)
        os.kill(scene.worker.pid, 9)
        await wait_until_async(lambda: listener.exits, DEADLINE_S)
        assert listener.exits[0].kept == {}
        await scene.memory.settled()
        assert scene.memory.held_bytes == 0


async def test_the_memory_keeps_what_it_is_told_to_and_can_never_shrink_or_grow(tmp_path):
    """Holes are punched into all but what is kept; a worker cannot change its size; letting go of it frees all."""
    memory = ImageMemory("test")
    fd = memory.open()
    assert memory.open() == fd
    for offset in (0, 5, 9):
        os.pwrite(fd, b"x" * PAGE_BYTES, offset * PAGE_BYTES)
    kept = Kept(Range(0, 100), Range(9 * PAGE_BYTES, PAGE_BYTES), b"1")
    memory.keep({("a", 1): kept})
    await memory.settled()
    assert memory.held_bytes == 2 * PAGE_BYTES
    assert os.pread(fd, 1, 5 * PAGE_BYTES) == b"\0"
    assert os.pread(fd, 1, 9 * PAGE_BYTES) == b"x"
    for size in (PAGE_BYTES, SPACE_BYTES + PAGE_BYTES):
        with pytest.raises(PermissionError):
            os.ftruncate(fd, size)
    memory.drop(("a", 1))
    await memory.settled()
    assert memory.held_bytes == 0
    memory.close()
    await memory.settled()
    with pytest.raises(OSError, match="descriptor"):
        os.fstat(fd)


@pytest.mark.parametrize(
    ("weights", "description"),
    [
        (Range(1, 10), Range(PAGE_BYTES, 10)),
        (Range(0, 0), Range(PAGE_BYTES, 10)),
        (Range(0, 1001), Range(PAGE_BYTES, 10)),
        (Range(0, 10), Range(0, 10)),
        (Range(SPACE_BYTES, 10), Range(0, 10)),
        (Range(0, 10), Range(PAGE_BYTES, images.DESCRIPTION_MAX_BYTES + 1)),
    ],
)
def test_numbers_that_no_image_has_are_not_believed(weights, description):
    """What a worker says of its images is held against pages, the space, the instance's bytes, and each other."""
    assert Kept(Range(0, 1000), Range(PAGE_BYTES, 10), b"1").sound(1000)
    assert not Kept(weights, description, b"1").sound(1000)
