"""What the next daemon finds: every state of downloads, loads and deletions, cut off by a crash."""

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.registry import ModelSpec
from modelhostd.core.resources import (
    FINAL_STATES,
    ArtifactState,
    Operation,
    OperationState,
    Phase,
    Settings,
    Source,
)
from modelhostd.host.registry import Request
from tests.fakes.clock import settle
from tests.fakes.database import disk_full
from tests.host.support import World, held, release
from tests.support import DEADLINE_S

PHASES = [Phase.PLANNING, Phase.DOWNLOADING, Phase.VERIFYING, Phase.COMMITTING]


@pytest.fixture
async def world(tmp_path: Path) -> World:
    return World(tmp_path)


async def restarted_error(world: World, operation: Operation) -> str:
    """Return why an operation of the last daemon failed, as the next one tells it."""
    async with world.host() as run:
        done = run.host.operations.get(operation.id)
        assert done.state is OperationState.FAILED
        assert done.error is not None
        return done.error.reason


@pytest.mark.parametrize("phase", PHASES, ids=lambda p: p.value)
async def test_a_download_goes_on_from_each_phase(world: World, phase: Phase) -> None:
    """A download cut off in any phase is finished by the next daemon under the same operation."""
    async with world.host() as run:
        await run.add("a")
        operation = await held(run, "a", phase)
        await run.crash()
    release(run, "a", phase)
    async with world.host() as run:
        await run.end(operation)
        assert run.host.models.get("a").state is ArtifactState.AVAILABLE
        assert list(world.files.trees) == [("a", 1)]


async def test_files_without_their_row_are_fetched_again(world: World) -> None:
    """A crash between the files and their row shows nothing half, and the download ends well."""
    async with world.host() as run:
        await run.add("a")
        operation = await held(run, "a", Phase.COMMITTING)
        run.database.hold_commits()
        release(run, "a", Phase.COMMITTING)
        await run.database.wait_for_waiting(1)
        assert world.files.trees
        await run.crash()
    hold = world.downloads.hold("hf://org/a")
    async with world.host() as run:
        await hold.reached.wait()
        assert run.host.models.get("a").available is None
        release(run, "a")
        await run.end(operation)


async def test_a_paused_download_stays_paused(world: World) -> None:
    """A paused download is still paused after a restart, can be resumed, and can be cancelled."""
    async with world.host() as run:
        for model in "ab":
            await run.add(model)
            await run.host.transfers.pause((await held(run, model)).id)
        first, second = run.host.operations.list()
        await run.crash()
    for model in "ab":
        release(run, model)
    async with world.host() as run:
        await settle()
        assert {o.state for o in run.host.operations.list()} == {OperationState.PAUSED}
        await run.host.transfers.resume(first.id)
        await run.end(first)
        cancelled = await run.host.operations.cancel(second.id)
        assert cancelled.state is OperationState.CANCELLED
        assert run.host.models.get(second.model).state is ArtifactState.ABSENT


async def test_the_queue_keeps_its_order(world: World) -> None:
    """Waiting downloads start after a restart as they would have before it."""
    async with world.host() as run:
        await run.host.update_settings(
            Settings(max_concurrent_downloads=1), ["max_concurrent_downloads"]
        )
        for model in "cabd":
            await run.add(model)
        await held(run, "c")
        waiting = [await run.host.transfers.download(m) for m in "abd"]
        await run.host.transfers.update(waiting[2].id, priority=5)
        await run.crash()
    release(run, "c")
    world.downloads.jobs.clear()
    async with world.host() as run:
        for operation in waiting:
            await run.end(operation)
        assert [job.model for job in world.downloads.jobs] == ["d", "c", "a", "b"]


async def test_a_cancel_that_was_under_way_is_carried_out(world: World) -> None:
    """A download whose cancellation a crash cut off is not fetched again."""
    async with world.host() as run:
        await run.add("a")
        operation = await held(run, "a")
        run.database.hold_commits()
        cancel = asyncio.ensure_future(run.host.operations.cancel(operation.id))
        await run.database.wait_for_waiting(1)
        await run.database.release_commits(1)
        await settle()
        await run.crash()
        cancel.cancel()
    release(run, "a")
    world.downloads.jobs.clear()
    async with world.host() as run:
        await settle()
        assert run.host.operations.get(operation.id).state is OperationState.CANCELLED
        assert run.host.models.get("a").artifacts == ()
        assert not world.downloads.jobs
        await run.end(await run.host.transfers.download("a"))


async def test_an_artifact_without_its_operation_has_failed(world: World) -> None:
    """An artifact on its way whose operation is lost is FAILED with the reason, and can be retried."""
    async with world.host() as run:
        await run.add("a")
        operation = await held(run, "a")
        await run.crash()
    del world.disk.rows[next(k for k in world.disk.rows if k[1] == operation.id)]
    release(run, "a")
    async with world.host() as run:
        artifact = run.host.models.get("a").artifacts[0]
        assert artifact.state is ArtifactState.FAILED
        assert artifact.error is not None
        assert artifact.error.reason == "DAEMON_RESTARTED"
        await run.end(await run.host.transfers.download("a"))


@pytest.mark.parametrize("moment", ["waiting", "loading", "ready", "draining", "failed"])
async def test_an_instance_is_gone_from_each_state(world: World, moment: str) -> None:
    """Whatever an instance was doing, the next daemon says that it is gone, and loads it on demand."""
    async with world.host(budget=500) as run:
        for model in "ab":
            await run.have(model)
        if moment == "waiting":
            await run.load("b")
            run.workers.infer_gate("b").close()
            run.infer("b").add_done_callback(lambda t: t.cancelled() or t.exception())
            await run.workers.infer_gate("b").reached()
        if moment == "failed":
            run.workers.load_errors["a"] = ModelhostError(Reason.LOAD_FAILED, "no", {"model": "a"})
        if moment in ("loading", "waiting"):
            run.workers.load_gate("a").close()
        operation = await run.host.residency.load("a")
        if moment in ("ready", "draining", "failed"):
            await run.host.operations.wait(operation.id, timeout_s=DEADLINE_S)
        if moment == "draining":
            run.workers.unload_gate("a").close()
            operation = await run.host.residency.unload("a")
        await settle()
        await run.host.registry.flush()
        last = run.host.registry.journal.last_sequence
        await run.crash()
    async with world.host(budget=500) as run:
        events = await run.host.registry.journal.read(last + 1)
        gone = [e.key for e in events if e.kind.value == "instances"]
        assert [key.split("/")[0] for key in gone if key.startswith("a")] == ["a"]
        assert all(e.resource is None for e in events if e.kind.value == "instances")
        assert run.host.operations.get(operation.id).state in FINAL_STATES
        assert await run.infer("a", DEADLINE_S) == b"x"


async def test_other_work_ends_with_its_daemon(world: World) -> None:
    """Unloads, reloads and verifications of the last daemon FAILED with DAEMON_RESTARTED."""
    for verb in ("unload", "reload", "verify"):
        async with world.host() as run:
            if not run.host.models.list():
                await run.have("a")
            await run.load("a")
            run.workers.unload_gate("a").close()
            run.database.hold_commits()
            command = {
                "unload": run.host.residency.unload("a"),
                "reload": run.host.reloads.reload("a"),
                "verify": run.host.verification.verify("a"),
            }
            for name, unused in command.items():
                if name != verb:
                    unused.close()
            call = asyncio.ensure_future(command[verb])
            await run.database.wait_for_waiting(1)
            await run.database.release_commits(1)
            operation = await call
            await run.crash()
        assert await restarted_error(world, operation) == "DAEMON_RESTARTED"


async def test_a_deletion_cut_off_before_its_row(world: World) -> None:
    """A deletion that a crash cuts off while it drains has deleted nothing."""
    async with world.host() as run:
        await run.have("a")
        await run.load("a")
        run.workers.unload_gate("a").close()
        operation = await run.host.models.delete("a", force=True)
        await run.workers.unload_gate("a").reached()
        await run.host.registry.flush()
        await run.crash()
    assert await restarted_error(world, operation) == "DAEMON_RESTARTED"
    async with world.host() as run:
        assert await run.infer("a", DEADLINE_S) == b"x"
        await run.end(await run.host.models.delete("a", force=True))
        assert not world.files.trees


async def test_a_deletion_cut_off_after_its_row(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the removal of files on the entry is gone; the next start finishes it, a namesake lives."""
    async with world.host() as run:
        await run.have("a")
        reached = asyncio.Event()

        async def stuck(model: str, version: int) -> int:
            reached.set()
            await asyncio.Event().wait()
            return 0

        monkeypatch.setattr(world.files, "delete_artifact", stuck)
        operation = await run.host.models.delete("a", force=False)
        await reached.wait()
        with pytest.raises(ModelhostError) as caught:
            await run.add("a")
        assert caught.value.reason is Reason.CONFLICTING_OPERATION
        await run.crash()
    monkeypatch.undo()
    assert await restarted_error(world, operation) == "DAEMON_RESTARTED"
    async with world.host() as run:
        assert not run.host.models.list()
        check = await run.end(await run.host.storage.check(deep=False, repair=False))
        assert not check.result["findings"]
        await run.have("a")
        assert await run.infer("a", DEADLINE_S) == b"x"


async def test_what_was_acknowledged_is_there(world: World) -> None:
    """Every change that was answered is there after a crash that follows at once."""
    async with world.host() as run:
        await run.have("a")
        await run.host.models.pin("a", pinned=True)
        await run.host.models.update("a", _named)
        await run.host.residency.set_budget("sim-0", 777)
        await run.host.update_settings(Settings(queue_limit=9), ["queue_limit"])
        await run.crash()
    world_budget_unset = World.host
    async with world_budget_unset(world, budget=0) as run:
        model = run.host.models.get("a")
        assert (model.pinned, model.display_name) == (True, "name")
        assert run.host.registry.committed.devices["sim-0"].budget_bytes == 777
        assert run.host.registry.committed.settings.queue_limit == 9
        await settle()
        assert set(run.workers.resident) == {"a"}


async def test_an_answer_waits_for_what_it_repeats(world: World) -> None:
    """A pin that is decided but not durable is not acknowledged to a second caller either."""
    async with world.host() as run:
        await run.add("a")
        run.database.hold_commits()
        first = asyncio.ensure_future(run.host.models.pin("a", pinned=True))
        await run.database.wait_for_waiting(1)
        second = asyncio.ensure_future(run.host.models.pin("a", pinned=True))
        await settle()
        assert not second.done()
        run.database.fail_commits()
        await run.database.release_commits()
        for call in (first, second):
            with pytest.raises(ModelhostError):
                await call
        assert not run.host.models.get("a").pinned


async def test_request_ids_outlive_a_crash(world: World) -> None:
    """A request repeated after a crash gets the operation or model it made, and does nothing twice."""
    create, download = Request("r1", "create"), Request("r2", "download")
    spec = ModelSpec(source=Source("hf://org/a"))
    async with world.host() as run:
        await run.add("a")
        await run.end(await run.host.models.delete("a", force=False))
        made = await run.host.models.create(spec, "a", request=create)
        operation = await run.host.transfers.download("a", request=download)
        await run.end(operation)
        await run.crash()
    async with world.host() as run:
        assert (await run.host.models.create(spec, "a", request=create)).uid == made.uid
        assert (await run.host.transfers.download("a", request=download)).id == operation.id
        with pytest.raises(ModelhostError) as caught:
            await run.host.models.create(spec, "b", request=replace(create, fingerprint="other"))
        assert caught.value.reason is Reason.REQUEST_ID_REUSED


async def test_pinned_and_autoload_models_load_again(world: World) -> None:
    """After a restart pinned models and those with autoload are loaded; what does not fit is not."""
    async with world.host() as run:
        await run.have("pinned", 300)
        await run.have("auto", 300, autoload=True)
        await run.have("plain", 300)
        await run.have("huge", 5000, autoload=True)
        await run.host.models.pin("pinned", pinned=True)
    async with world.host() as run:
        await settle()
        assert set(run.workers.resident) == {"pinned", "auto"}


async def test_a_daemon_that_cannot_write_does_not_start(world: World) -> None:
    """A start whose commit fails raises and leaves the disk as it was; the next start works."""
    async with world.host() as run:
        await run.add("a")
        await held(run, "a")
        await run.crash()
    rows = dict(world.disk.rows)
    with pytest.raises(ModelhostError) as caught:
        async with world.host(failing=[disk_full()]):
            pytest.fail("it started")
    assert caught.value.reason is Reason.INSUFFICIENT_DISK_SPACE
    assert world.disk.rows == rows
    release(run, "a")
    async with world.host() as run:
        for operation in run.host.operations.list():
            await run.end(operation)


def _named(spec: ModelSpec) -> ModelSpec:
    return replace(spec, display_name="name")
