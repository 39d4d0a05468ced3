"""Downloads that are cancelled, paused, deleted, refused or not stored, at each phase of their way."""

import asyncio
import json
from dataclasses import replace
from pathlib import Path

import pytest

from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.registry import ModelSpec
from modelhostd.core.resources import (
    ArtifactState,
    OperationState,
    Phase,
    Source,
)
from tests.fakes.clock import settle
from tests.fakes.database import disk_full
from tests.fakes.downloads import FakeRepo
from tests.host.support import Running, World, held, release
from tests.support import DEADLINE_S

PHASES = [Phase.PLANNING, Phase.DOWNLOADING, Phase.VERIFYING, Phase.COMMITTING]
in_each_phase = pytest.mark.parametrize("phase", PHASES, ids=lambda p: p.value)


@pytest.fixture
async def world(tmp_path: Path) -> World:
    return World(tmp_path)


def state(run: Running, model: str) -> ArtifactState:
    return run.host.models.get(model).state


@pytest.mark.parametrize(
    ("own", "told", "tags", "task"),
    [
        ("", "", (), "text-generation"),
        ("", "", ("sentence-similarity",), "feature-extraction"),
        ("", "robotics", (), "other"),
        ("depth-estimation", "", (), "depth-estimation"),
    ],
    ids=["config", "tag", "unknown word", "own"],
)
async def test_a_source_without_a_task_has_that_of_its_config(
    world: World, own: str, told: str, tags: tuple[str, ...], task: str
) -> None:
    """The model's own entry goes before the source's words, and those before what config.json tells."""
    config = {"architectures": ["LlamaForCausalLM"], "vocab_size": 8}
    files = {"config.json": json.dumps(config).encode(), "model.safetensors": b"w"}
    async with world.host() as run:
        world.downloads.add("hf://org/a", files, task=told, tags=tags)
        await run.host.models.create(ModelSpec(source=Source(uri="hf://org/a"), task=own), "a")
        await run.end(await run.host.transfers.download("a"))
        assert run.host.models.get("a").task == task


@in_each_phase
async def test_cancelled_in_each_phase(world: World, phase: Phase) -> None:
    """A cancelled download ends CANCELLED and leaves no artifact and no files; a retry works."""
    async with world.host() as run:
        await run.add("a")
        operation = await held(run, "a", phase)
        done = await run.host.operations.cancel(operation.id)
        assert done.state is OperationState.CANCELLED
        assert done.cancel_requested
        assert state(run, "a") is ArtifactState.ABSENT
        assert not world.files.trees
        release(run, "a", phase)
        await run.end(await run.host.transfers.download("a"))


@in_each_phase
async def test_paused_and_resumed_in_each_phase(world: World, phase: Phase) -> None:
    """A paused download stands still, stays paused when asked again, and goes on where it stood."""
    async with world.host() as run:
        await run.add("a")
        operation = await held(run, "a", phase)
        for _ in range(2):
            paused = await run.host.transfers.pause(operation.id)
            assert paused.state is OperationState.PAUSED
        assert state(run, "a") is ArtifactState.PAUSED
        assert world.downloads.active == 0
        release(run, "a", phase)
        resumed = await run.host.transfers.resume(operation.id)
        assert resumed.state in (OperationState.QUEUED, OperationState.RUNNING)
        await run.end(operation)
        after = await run.host.operations.wait(operation.id, timeout_s=DEADLINE_S)
        assert after.state is OperationState.SUCCEEDED


async def test_cancelled_before_it_began(world: World) -> None:
    """A download that waits for its place, or has just got one, ends at once when it is cancelled."""
    async with world.host() as run:
        for model in "abcd":
            await run.add(model)
        first = await held(run, "a")
        for model in "bc":
            await held(run, model)
        waiting = await run.host.transfers.download("d")
        assert waiting.queue_position == 1
        done = await run.host.operations.cancel(waiting.id)
        assert done.state is OperationState.CANCELLED
        again = await run.host.transfers.download("d")

        def cancel(_: object) -> None:
            # Called after the host's own: the place is taken, and its task has not begun yet.
            assert again.id in run.host.transfers._tasks
            assert again.id not in run.host.transfers._started
            run.host.operations._cancel[again.id]()

        run.host.transfers._tasks[first.id].add_done_callback(cancel)
        release(run, "a")
        assert await run.ended(again.id) is OperationState.CANCELLED
        assert state(run, "d") is ArtifactState.ABSENT


async def test_a_cancel_overrides_a_pause_on_its_way(world: World) -> None:
    """A cancel that comes while the pause is being stored ends the download."""
    async with world.host() as run:
        await run.add("a")
        operation = await held(run, "a")
        run.database.hold_commits()
        pause = asyncio.ensure_future(run.host.transfers.pause(operation.id))
        await run.database.wait_for_waiting(1)
        cancel = asyncio.ensure_future(run.host.operations.cancel(operation.id))
        await settle()
        await run.database.release_commits()
        assert (await cancel).state is OperationState.CANCELLED
        await pause
        assert state(run, "a") is ArtifactState.ABSENT


async def test_what_is_whole_is_kept(world: World) -> None:
    """A cancel that comes when the files are verified and only their row is missing comes too late."""
    async with world.host() as run:
        await run.add("a")
        operation = await held(run, "a", Phase.COMMITTING)
        run.database.hold_commits()
        release(run, "a", Phase.COMMITTING)
        await run.database.wait_for_waiting(1)
        cancel = asyncio.ensure_future(run.host.operations.cancel(operation.id))
        await settle()
        await run.database.release_commits()
        assert (await cancel).state is OperationState.SUCCEEDED
        assert state(run, "a") is ArtifactState.AVAILABLE


async def test_a_caller_that_goes_away_stops_no_download(world: World) -> None:
    """Downloads whose caller gave up before their commit run, and end when cancelled."""
    async with world.host() as run:
        for model in "ab":
            await run.add(model)
        for model in "ab":
            world.downloads.hold(f"hf://org/{model}")
            run.database.hold_commits()
            call = asyncio.ensure_future(run.host.transfers.download(model))
            await run.database.wait_for_waiting(1)
            call.cancel()
            await run.database.release_commits()
            await settle()
        first, second = run.host.operations.list()
        assert (await run.host.operations.cancel(first.id)).state is OperationState.CANCELLED
        for model in "ab":
            release(run, model)
        await run.end(second)


async def test_a_resume_whose_caller_goes_away_goes_on(world: World) -> None:
    """A resumed download runs, though nobody waited for the answer."""
    async with world.host() as run:
        await run.add("a")
        operation = await held(run, "a")
        await run.host.transfers.pause(operation.id)
        release(run, "a")
        run.database.hold_commits()
        call = asyncio.ensure_future(run.host.transfers.resume(operation.id))
        await run.database.wait_for_waiting(1)
        call.cancel()
        await run.database.release_commits()
        await run.end(operation)


async def test_a_download_that_could_not_be_stored_is_none(world: World) -> None:
    """When its commit fails a download is not begun, and the next one is."""
    async with world.host() as run:
        await run.add("a")
        run.database.fail_commits()
        with pytest.raises(ModelhostError):
            await run.host.transfers.download("a")
        await settle()
        assert not world.downloads.jobs
        assert state(run, "a") is ArtifactState.ABSENT
        await run.end(await run.host.transfers.download("a"))


@in_each_phase
async def test_failing_commits_lose_no_download(world: World, phase: Phase) -> None:
    """Commits that fail while a download runs delay its end and lose nothing of it."""
    async with world.host() as run:
        await run.add("a")
        operation = await held(run, "a", phase)
        run.database.fail_commits(*[disk_full() for _ in range(3)])
        release(run, "a", phase)
        await world.clock.advance(10.0)
        await run.end(operation)
        assert state(run, "a") is ArtifactState.AVAILABLE
        assert len(world.downloads.jobs) == 1


async def test_failing_commits_delay_a_start(world: World) -> None:
    """A download whose first commit fails stays in the queue and starts when the disk has room."""
    async with world.host() as run:
        await run.add("a")
        run.database.hold_commits()
        call = asyncio.ensure_future(run.host.transfers.download("a"))
        await run.database.wait_for_waiting(1)
        await run.database.release_commits(1)
        operation = await call
        await run.database.wait_for_waiting(1)
        run.database.fail_commits(disk_full(), disk_full())
        await run.database.release_commits()
        await settle()
        assert not world.downloads.jobs
        await world.clock.advance(5.0)
        await run.end(operation)


async def test_failing_commits_delay_a_cancel(world: World) -> None:
    """A cancel whose commit fails is stored later; nothing is fetched meanwhile."""
    async with world.host() as run:
        await run.add("a")
        operation = await held(run, "a")
        run.database.fail_commits(*[disk_full() for _ in range(3)])
        cancel = asyncio.ensure_future(run.host.operations.cancel(operation.id))
        await settle()
        run.host.transfers.pump()
        assert world.downloads.active == 0
        await world.clock.advance(10.0)
        assert (await cancel).state is OperationState.CANCELLED
        assert len(world.downloads.jobs) == 1


async def test_failures_say_why_and_a_retry_keeps_the_version(world: World) -> None:
    """A failed download is FAILED, wrong bytes are QUARANTINED; a retry fills the same version."""
    error = ModelhostError(Reason.NETWORK_ERROR, "no", {"source": "hf://org/a"})
    wrong = ModelhostError(Reason.CHECKSUM_MISMATCH, "no", {"file": "x"})
    async with world.host() as run:
        await run.add("a")
        for raised, expected in (
            (error, ArtifactState.FAILED),
            (wrong, ArtifactState.QUARANTINED),
        ):
            world.downloads.fail("hf://org/a", raised, Phase.DOWNLOADING)
            done = await run.failed(await run.host.transfers.download("a"))
            assert done.error is not None
            assert done.error.reason == raised.reason
            artifact = run.host.models.get("a").artifacts[-1]
            assert (artifact.state, artifact.version) == (expected, 1)
            assert artifact.error == done.error
        await run.end(await run.host.transfers.download("a"))
        assert run.host.models.get("a").artifacts[-1].version == 1


async def test_a_bug_in_a_download_ends_it(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception that the port does not promise ends the download INTERNAL, and its place is free."""
    async with world.host() as run:
        await run.add("a")

        async def broken(*args: object) -> None:
            raise ZeroDivisionError

        monkeypatch.setattr(world.downloads, "fetch", broken)
        done = await run.failed(await run.host.transfers.download("a"))
        assert done.error is not None
        assert done.error.reason == "INTERNAL"
        monkeypatch.undo()
        await run.end(await run.host.transfers.download("a"))


async def test_the_revision_that_is_there_is_not_kept_twice(world: World) -> None:
    """A refresh that finds the same revision keeps the artifact that was there, and its files."""
    async with world.host() as run:
        await run.have("a")
        done = await run.end(await run.host.transfers.download("a", refresh=True))
        await settle()
        assert done.result["version"] == 1
        assert [a.version for a in run.host.models.get("a").artifacts] == [1]
        assert list(world.files.trees) == [("a", 1)]


async def test_old_versions_go_unless_they_are_used(world: World) -> None:
    """The newest two revisions are kept, and any that an instance uses; the files of others go."""
    async with world.host() as run:
        await run.have("a")
        await run.load("a")
        for number in range(3):
            world.downloads.add("hf://org/a", {"model.safetensors": b"%d" % number})
            await run.end(await run.host.transfers.download("a", refresh=True))
        await settle()
        assert sorted(world.files.trees) == [("a", 1), ("a", 3), ("a", 4)]


async def test_old_files_that_stay_fail_no_download(world: World) -> None:
    """A download has SUCCEEDED, though the files of an old version could not be deleted."""
    async with world.host() as run:
        await run.have("a")
        for number in range(2):
            world.downloads.add("hf://org/a", {"model.safetensors": b"%d" % number})
            world.files.fail_next = (
                ModelhostError(Reason.PERMISSION_DENIED_ON_DISK, "no", {"path": "p"})
                if number
                else None
            )
            await run.end(await run.host.transfers.download("a", refresh=True))
        await settle()
        assert [a.version for a in run.host.models.get("a").artifacts] == [2, 3]
        assert world.files.fail_next is None


async def test_another_source_needs_another_download(world: World) -> None:
    """Files are those of the source that was asked when the download began, and say so."""
    async with world.host() as run:
        await run.add("a")
        world.downloads.add("hf://org/b", {"model.safetensors": b"other"})
        operation = await held(run, "a")
        await run.host.models.update("a", lambda s: replace(s, source=Source("hf://org/b")))
        release(run, "a")
        await run.end(operation)
        assert run.host.models.get("a").artifacts[0].source == Source("hf://org/a")
        await run.end(await run.host.transfers.download("a"))
        assert [job.source.uri for job in world.downloads.jobs] == ["hf://org/a", "hf://org/b"]


@pytest.mark.parametrize("refresh", [False, True])
async def test_unsafe_files_come_beside_what_is_on_disk_without(
    world: World, refresh: bool
) -> None:
    """The same revision is fetched once more for them, without `refresh`, too; once they are there, or are none, nothing is."""
    async with world.host() as run:
        for model, extra in (("a", {"more.pt": b"x"}), ("b", {})):
            await run.add(model)
            files = {"config.json": b"{}", "model.gguf": b"GGUF", **extra}
            world.downloads.repos[f"hf://org/{model}"] = FakeRepo(files, "r1")
            await run.end(await run.host.transfers.download(model))
            jobs = len(world.downloads.jobs)
            for times in (1, 1):
                operation = await run.host.transfers.download(
                    model, allow_unsafe=True, refresh=refresh
                )
                await run.end(operation)
                newest = run.host.models.get(model).newest
                assert newest is not None
                assert newest.version == (2 if extra else 1)
                _, there = await run.host.models.files(model, newest.version)
                assert {file.path for file in there} == set(files)
                if not refresh:
                    assert len(world.downloads.jobs) == jobs + times


async def test_unsafe_files_come_for_the_download_that_may(world: World) -> None:
    """Refused without, fetched with, also by the next daemon; one without is not joined."""
    async with world.host() as run:
        await run.add("a")
        world.downloads.repos["hf://org/a"] = FakeRepo({"pytorch_model.bin": b"x"}, "r1")
        failed = await run.host.transfers.download("a")
        failed = await run.host.operations.wait(failed.id, timeout_s=DEADLINE_S)
        assert failed.error is not None
        assert failed.error.reason == "UNSAFE_FILE"
        world.downloads.hold("hf://org/a", Phase.DOWNLOADING)
        first = await run.host.transfers.download("a", allow_unsafe=True)
        assert (await run.host.transfers.download("a", allow_unsafe=True)).id == first.id
    async with world.host() as run:
        world.downloads.unhold("hf://org/a", Phase.DOWNLOADING)
        done = await run.host.operations.wait(first.id, timeout_s=DEADLINE_S)
        assert done.state is OperationState.SUCCEEDED
        await run.add("b")
        safe = await held(run, "b")
        with pytest.raises(ModelhostError, match="allow_unsafe") as caught:
            await run.host.transfers.download("b", allow_unsafe=True)
        assert caught.value.reason is Reason.CONFLICTING_OPERATION
        assert caught.value.metadata["operation"] == safe.id
        release(run, "b")


async def test_a_stop_leaves_downloads_to_the_next_daemon(world: World) -> None:
    """At a stop the bytes stop; the next daemon goes on under the same operation."""
    async with world.host() as run:
        await run.add("a")
        operation = await held(run, "a")
    assert world.downloads.active == 0
    release(run, "a")
    async with world.host() as run:
        await run.end(operation)
