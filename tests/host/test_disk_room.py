"""Downloads and room on disk: refused, made to wait, and going on by themselves."""

from pathlib import Path

import pytest

from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.resources import ArtifactState, Operation, OperationState, Phase, Settings
from tests.fakes.clock import settle
from tests.host.support import Running, World, held, release

SHORT = Reason.INSUFFICIENT_DISK_SPACE.value


@pytest.fixture
async def world(tmp_path: Path) -> World:
    return World(tmp_path)


async def set_budget(run: Running, size: int) -> None:
    """Change the disk's budget while the host runs."""
    await run.host.update_settings(Settings(disk_budget_bytes=size), ["disk_budget_bytes"])


async def waiting(run: Running, model: str) -> Operation:
    """Begin a download that finds no room, and return it as it waits."""
    operation = await run.host.transfers.download(model)
    await settle(20)
    await run.host.registry.flush()
    found = run.host.operations.get(operation.id)
    assert found.state is OperationState.PAUSED, found
    return found


async def test_a_download_waits_for_room_and_goes_on_when_there_is(world: World) -> None:
    """PAUSED with the numbers and the next look; a deletion makes room, and it goes on by itself."""
    async with world.host() as run:
        await set_budget(run, 1000)
        await run.have("a", 700)
        await run.add("b", 600)
        operation = await waiting(run, "b")
        retry = operation.progress.retry
        assert retry is not None
        assert (retry.reason, retry.attempt) == (SHORT, 1)
        assert retry.next_time > world.clock.time()
        assert operation.progress.phase is Phase.WAITING
        artifact = run.host.models.get("b").artifacts[-1]
        assert artifact.state is ArtifactState.PAUSED
        assert artifact.error is not None
        assert artifact.error.metadata["neededBytes"] == "598"
        assert artifact.error.metadata["freeBytes"] == "300"
        assert run.reasons("operations")[-1] == run.reasons("models")[-1] == SHORT
        await world.clock.advance(30.0)
        assert run.host.operations.get(operation.id).state is OperationState.PAUSED
        await run.end(await run.host.models.delete("a", force=False))
        await world.clock.advance(6.0)
        done = await run.end(operation)
        assert done.progress.retry is None
        assert run.host.models.get("b").artifacts[-1].error is None


async def test_a_raised_budget_is_room(world: World) -> None:
    """It acts at once on who waits; a lowered one takes nothing away."""
    async with world.host() as run:
        await run.have("a", 700)
        await set_budget(run, 1200)
        await run.add("b", 600)
        operation = await waiting(run, "b")
        await set_budget(run, 1298)
        await world.clock.advance(6.0)
        await run.end(operation)
        await set_budget(run, 10)
        await world.clock.advance(70.0)
        assert all(model.available for model in run.host.models.list())


async def test_what_could_never_fit_is_refused(world: World) -> None:
    """More than the whole budget: FAILED with the numbers, nothing waits."""
    async with world.host() as run:
        await set_budget(run, 500)
        await run.add("a", 600)
        done = await run.failed(await run.host.transfers.download("a"))
        assert done.error is not None
        assert done.error.reason == SHORT
        assert done.error.metadata["neededBytes"] == "600"


async def test_two_downloads_do_not_promise_the_same_space(world: World) -> None:
    """Each alone fits; the second waits until the first is there, and then for ever larger room."""
    async with world.host() as run:
        await set_budget(run, 1000)
        for model, size in (("a", 600), ("b", 601)):
            await run.add(model, size)
        first = await held(run, "a")
        second = await waiting(run, "b")
        release(run, "a")
        await run.end(first)
        await world.clock.advance(20.0)
        assert run.host.operations.get(second.id).state is OperationState.PAUSED
        await run.end(await run.host.models.delete("a", force=False))
        await world.clock.advance(30.0)
        await run.end(second)


async def test_a_restart_forgets_nobody_who_waits(world: World) -> None:
    """After a crash it waits on, and goes on when there is room."""
    async with world.host() as run:
        await set_budget(run, 1000)
        await run.have("a", 700)
        await run.add("b", 600)
        key = (await waiting(run, "b")).id
        await run.crash()
    async with world.host() as run:
        assert world.files.budget_bytes == 1000
        assert run.host.operations.get(key).state is OperationState.PAUSED
        await world.clock.advance(30.0)
        assert run.host.operations.get(key).state is OperationState.PAUSED
        await set_budget(run, 0)
        await world.clock.advance(6.0)
        await run.end(run.host.operations.get(key))


async def test_what_an_operator_paused_does_not_go_on_by_itself(world: World) -> None:
    """Pausing one that waits for room takes it out of the waiting; ResumeOperation puts it back."""
    async with world.host() as run:
        await set_budget(run, 1000)
        await run.have("a", 700)
        await run.add("b", 600)
        operation = await waiting(run, "b")
        paused = await run.host.transfers.pause(operation.id)
        assert (paused.state, paused.progress.retry) == (OperationState.PAUSED, None)
        assert run.host.models.get("b").artifacts[-1].error is None
        await set_budget(run, 0)
        await world.clock.advance(60.0)
        assert run.host.operations.get(operation.id).state is OperationState.PAUSED
        await run.host.transfers.resume(operation.id)
        await run.end(operation)


async def test_one_that_waits_can_be_cancelled_and_deleted(world: World) -> None:
    """As any download."""
    async with world.host() as run:
        await set_budget(run, 1000)
        await run.have("a", 700)
        for model, size in (("b", 600), ("c", 601)):
            await run.add(model, size)
        first, second = await waiting(run, "b"), await waiting(run, "c")
        cancelled = await run.host.operations.cancel(first.id)
        assert cancelled.state is OperationState.CANCELLED
        assert run.host.models.get("b").state is ArtifactState.ABSENT
        await run.end(await run.host.models.delete("c", force=True))
        assert await run.ended(second.id) is OperationState.CANCELLED


async def test_a_smaller_one_passes_one_that_does_not_fit(world: World) -> None:
    """Room for the second alone: it goes on, the first waits."""
    async with world.host() as run:
        await set_budget(run, 1000)
        await run.have("a", 700)
        await run.add("b", 900)
        await run.add("c", 400)
        large, small = await waiting(run, "b"), await waiting(run, "c")
        await set_budget(run, 1200)
        await world.clock.advance(6.0)
        await run.end(small)
        assert run.host.operations.get(large.id).state is OperationState.PAUSED


async def test_a_disk_that_lies_is_not_tried_as_fast_as_it_can(world: World) -> None:
    """A quota is full where the file system says that there is room: looks become rarer."""
    error = ModelhostError(Reason.INSUFFICIENT_DISK_SPACE, "quota", {"path": "p"})
    async with world.host() as run:
        await run.add("a")
        world.downloads.fail("hf://org/a", error, Phase.DOWNLOADING, times=10**6)
        operation = await waiting(run, "a")
        retry = operation.progress.retry
        assert retry is not None
        await world.clock.advance(400.0)
        assert len(world.downloads.jobs) < 10
        found = run.host.operations.get(operation.id)
        assert found.progress.retry is not None
        assert found.progress.retry.attempt > 5
        assert found.progress.retry.next_time - world.clock.time() <= 330.0
        world.downloads._failures.clear()
        await world.clock.advance(330.0)
        await run.end(operation)


async def test_a_disk_that_fills_up_in_the_middle_pauses(world: World) -> None:
    """ENOSPC while bytes come: what is missing still is what is waited for."""
    error = ModelhostError(Reason.INSUFFICIENT_DISK_SPACE, "full", {"path": "p"})
    async with world.host() as run:
        await run.add("a", 402)
        world.files.disk_bytes = 450
        operation = await held(run, "a")
        world.files.staged["of others"] = 300
        world.downloads.fail("hf://org/a", error, Phase.DOWNLOADING)
        release(run, "a")
        await settle(20)
        await run.host.registry.flush()
        artifact = run.host.models.get("a").artifacts[-1]
        assert artifact.error is not None
        assert artifact.error.metadata == {"path": "p", "neededBytes": "201", "freeBytes": "0"}
        await world.clock.advance(30.0)
        assert run.host.operations.get(operation.id).state is OperationState.PAUSED
        del world.files.staged["of others"]
        await world.clock.advance(30.0)
        await run.end(operation)


async def test_a_budget_that_is_imported_acts_at_once(world: World) -> None:
    """As one that is set."""
    async with world.host() as run:
        await set_budget(run, 700)
        document = b"".join([chunk async for chunk in run.host.registry_io.export()])
        await set_budget(run, 0)
        assert world.files.budget_bytes == 0
        await run.host.registry_io.apply(
            await run.host.registry_io.read(document),
            conflict="SKIP",
            include_settings=True,
            dry_run=False,
        )
        assert world.files.budget_bytes == 700


async def test_the_budget_of_the_configuration_holds_from_the_first_moment(world: World) -> None:
    """Before any download of the last run goes on."""
    async with world.host() as run:
        await set_budget(run, 700)
        await run.add("a", 600)
        assert run.host.registry.committed.settings.disk_budget_bytes == 700
    async with world.host():
        assert world.files.budget_bytes == 700
