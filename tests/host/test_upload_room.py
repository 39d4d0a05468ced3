"""Uploads and room on disk: the storage policy makes it for them, too."""

import hashlib
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest

from modelhostd.core import registry as rules
from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.resources import ArtifactState, Model, OperationState, Settings, Source
from modelhostd.core.uploads import UploadChunk, UploadCommit, UploadFile, UploadStart, UploadStep
from tests.fakes.clock import settle
from tests.host.support import Running, World

DATA = b"u" * 500
SHA256 = hashlib.sha256(DATA).hexdigest()
FILE = UploadFile("data.txt", len(DATA), SHA256)


@pytest.fixture
async def world(tmp_path: Path) -> World:
    return World(tmp_path)


async def full(run: Running, policy: str = "lru") -> None:
    """Have two models of 400 bytes below a budget of 1000, the first of them used last; and one to upload."""
    for model in ("a", "b"):
        await run.have(model, 400 if model == "a" else 401)
        await run.world.clock.advance(1.0)
    await run.load("a")
    await run.end(await run.host.residency.unload("a"))
    await run.host.models.create(rules.ModelSpec(Source("")), "mine")
    settings = Settings(storage_policy=policy, disk_budget_bytes=1000)
    await run.host.update_settings(settings, ["storage_policy", "disk_budget_bytes"])


async def upload(run: Running, *files: tuple[UploadFile, bytes], total: int = 0) -> Model:
    """Upload whole files."""

    async def steps() -> AsyncIterator[UploadStep]:
        for file, data in files:
            yield file
            if data:
                yield UploadChunk(data)
        yield UploadCommit()

    model, _ = await run.host.uploads.upload("mine", UploadStart(total_bytes=total), steps())
    return model


def on_disk(run: Running, models: Sequence[str] = ("a", "b", "mine")) -> str:
    """Return which of the models have files."""
    return " ".join(model for model in models if run.host.models.get(model).available)


@pytest.mark.parametrize("total", [500, 0])
async def test_the_least_recently_used_makes_room_for_an_upload(world: World, total: int) -> None:
    """As for a download, whether the sender says how many bytes it brings or not."""
    async with world.host() as run:
        await full(run)
        assert (await upload(run, (FILE, DATA), total=total)).available is not None
        assert on_disk(run) == "a mine"
        assert "EVICTED_FROM_DISK" in run.reasons("models")


async def test_the_question_takes_nothing_away(world: World) -> None:
    """A dry run says yes where the policy could make the room, and does not make it."""
    async with world.host() as run:
        await full(run)
        assert list(await run.host.uploads.have("mine", [FILE])) == [0]
        assert on_disk(run) == "a b"


@pytest.mark.parametrize("policy", ["off", "lru"])
async def test_what_no_policy_makes_room_for_is_refused(world: World, policy: str) -> None:
    """With the numbers, the question as well as the upload; and nothing goes in vain."""
    async with world.host() as run:
        await full(run, policy)
        for model in ("a", "b"):
            await run.host.models.pin(model, pinned=policy == "lru")
        for refused in (run.host.uploads.have("mine", [FILE]), upload(run, (FILE, DATA))):
            with pytest.raises(ModelhostError) as caught:
                await refused
            assert caught.value.reason is Reason.INSUFFICIENT_DISK_SPACE
            assert caught.value.metadata["neededBytes"] == "500"
        assert on_disk(run) == "a b"
        operations = run.host.registry.committed.operations.values()
        (operation,) = [o for o in operations if o.model == "mine"]
        assert operation.state is OperationState.FAILED
        assert run.host.models.get("mine").state is ArtifactState.FAILED


async def test_a_models_own_versions_make_no_room_for_its_upload(world: World) -> None:
    """They are what is there to go back to; the question knows that as well."""
    async with world.host() as run:
        await full(run)
        await upload(run, (FILE, DATA), total=500)
        await run.host.models.pin("a", pinned=True)
        other = b"v" * 300
        file = UploadFile("data.txt", len(other), hashlib.sha256(other).hexdigest())
        for refused in (run.host.uploads.have("mine", [file]), upload(run, (file, other))):
            with pytest.raises(ModelhostError, match="300 bytes are needed"):
                await refused
        assert on_disk(run) == "a mine"


@pytest.mark.parametrize("size", [300, 700])
async def test_what_an_upload_need_not_send_does_not_go_for_it(world: World, size: int) -> None:
    """Files that are there in another model stay: others go instead, or the question is answered with a refusal."""
    async with world.host() as run:
        await full(run)
        there = await world.files.list_files("b", 1)
        other = b"v" * size
        files = [(UploadFile(f.path, f.size_bytes, f.sha256, f.size_bytes), b"") for f in there]
        files.append((UploadFile("own.txt", size, hashlib.sha256(other).hexdigest()), other))
        asked = run.host.uploads.have("mine", [file for file, _ in files])
        if size > 1000 - 401:
            with pytest.raises(ModelhostError, match="700 bytes are needed"):
                await asked
            assert on_disk(run) == "a b"
        else:
            assert list(await asked) == [*(f.size_bytes for f in there), 0]
            assert (await upload(run, *files, total=size)).available is not None
            assert on_disk(run) == "b mine"


async def test_what_was_uploaded_goes_by_no_policy(world: World) -> None:
    """Nobody could bring it again: a download waits for room instead, and is told who was kept and why."""
    async with world.host() as run:
        await full(run)
        await upload(run, (FILE, DATA), total=500)
        settings = Settings(storage_policy="ttl", storage_ttl_s=3600.0)
        await run.host.update_settings(settings, ["storage_policy", "storage_ttl_s"])
        world.clock.jump(3700.0)
        await run.host.space.enforce()
        assert on_disk(run) == "mine"
        (report,) = (await run.host.storage.report()).models
        assert (report.model, report.kept_by) == ("mine", "UPLOADED")
        await run.host.update_settings(Settings(storage_policy="lru"), ["storage_policy"])
        await run.add("c", 600)
        operation = await run.host.transfers.download("c")
        await settle(30)
        assert run.host.operations.get(operation.id).state is OperationState.PAUSED
        assert on_disk(run) == "mine"
        await run.end(await run.host.models.delete("mine", force=False))
        await world.clock.advance(11.0)
        await run.end(operation)
