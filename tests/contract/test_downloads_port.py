"""What every implementation of the downloads port does: the Hub's, and the fake that host tests use."""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Protocol

import pytest

from bench.loopback_hub import Fault, LoopbackHub, Repo
from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.resources import Phase, Progress, Source
from modelhostd.ports import DownloadJob, Downloads, Files
from tests.adapters.downloads_support import Site, tiny
from tests.fakes.downloads import FakeDownloads

URI = "hf://org/tiny"


class World(Protocol):
    """A downloads port with the sources it reaches, and where its files go."""

    downloads: Downloads
    files: Files

    def add(self, uri: str, files: Mapping[str, bytes]) -> str:
        """Put a source there (or a new revision of it); return the revision."""

    def hold(self, uri: str, files: Mapping[str, bytes]) -> Callable[[], Awaitable[object]]:
        """Stop the next fetch in its bytes; the returned function waits until it stands there."""


class RealWorld:
    def __init__(self, home: Path, hub: LoopbackHub) -> None:
        self.hub = hub
        site = Site(home, hub)
        self.downloads: Downloads = site.downloads
        self.files: Files = site.files

    def add(self, uri: str, files: Mapping[str, bytes]) -> str:
        name = uri.removeprefix("hf://")
        if name in self.hub.repos:
            return self.hub.repos[name].commit(files)
        facts = {"pipeline_tag": "sentence-similarity", "licence": "mit"}
        self.hub.repos[name] = Repo(files, **facts)  # type: ignore[arg-type]
        return self.hub.repos[name].head

    def hold(self, uri: str, files: Mapping[str, bytes]) -> Callable[[], Awaitable[object]]:
        sha256 = hashlib.sha256(files["model.safetensors"]).hexdigest()
        fault = self.hub.fault(
            Fault(f"/{sha256}", stall_after=len(files["model.safetensors"]) // 2)
        )
        return lambda: asyncio.to_thread(fault.reached.wait, 20)


class FakeWorld:
    def __init__(self) -> None:
        self.fake = FakeDownloads()
        self.downloads: Downloads = self.fake
        self.files: Files = self.fake.files

    def add(self, uri: str, files: Mapping[str, bytes]) -> str:
        return self.fake.add(uri, files, task="sentence-similarity", licence="mit").revision

    def hold(self, uri: str, files: Mapping[str, bytes]) -> Callable[[], Awaitable[object]]:
        return self.fake.hold(uri).reached.wait


@pytest.fixture(params=["real", "fake"])
async def world(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[World]:
    """The same promises from both."""
    if request.param == "fake":
        yield FakeWorld()
        return
    with LoopbackHub() as hub:
        yield RealWorld(tmp_path / "home", hub)


def job(uri: str = URI, version: int = 1, model: str = "tiny") -> DownloadJob:
    return DownloadJob(
        f"op-{model}-{version}", model, version, Source(uri), {"display_name": "Tiny"}
    )


def ignore(_: Progress) -> None:
    """Take no notice of progress."""


async def test_inspect_tells_the_plan_without_fetching(world: World) -> None:
    """Revision, files with sizes, what is left out and why, task and licence in the source's words."""
    files = tiny()
    revision = world.add(URI, {**files, "pytorch_model.bin": b"pickle"})
    facts = await world.downloads.inspect(Source(URI))
    assert facts.revision == revision
    assert {file.path: file.size_bytes for file in facts.files} == {
        path: len(data) for path, data in files.items()
    }
    assert [path for path, _ in facts.skipped] == ["pytorch_model.bin"]
    assert (facts.task, facts.licence) == ("sentence-similarity", "mit")
    assert not facts.gated
    assert not facts.private


async def test_fetch_publishes_exactly_the_files(world: World) -> None:
    """The result and the files port agree, digests are those of the bytes."""
    files = tiny()
    revision = world.add(URI, files)
    fetched = await world.downloads.fetch(job(), ignore)
    assert fetched.facts.revision == revision
    assert {file.path: file.sha256 for file in fetched.files} == {
        path: hashlib.sha256(data).hexdigest() for path, data in files.items()
    }
    assert list(await world.files.list_files("tiny", 1)) == list(fetched.files)
    assert await world.files.check({"tiny": [1]}, deep=True, repair=False) == ()


async def test_progress_goes_through_the_phases_and_never_back(world: World) -> None:
    """Totals stand once they are known, done never falls nor passes the total, the end is whole."""
    files = tiny(100_000)
    world.add(URI, files)
    reports: list[Progress] = []
    await world.downloads.fetch(job(), reports.append)
    phases = [
        phase
        for n, phase in enumerate(r.phase for r in reports)
        if n == 0 or reports[n - 1].phase is not phase
    ]
    assert phases == [Phase.PLANNING, Phase.DOWNLOADING, Phase.VERIFYING, Phase.COMMITTING]
    done = [report.done_bytes for report in reports]
    assert done == sorted(done)
    total = sum(map(len, files.values()))
    assert {r.total_bytes for r in reports if r.phase is not Phase.PLANNING} == {total}
    assert all(report.done_bytes <= total for report in reports)
    assert reports[-1].done_bytes == total
    assert reports[-1].done_files == reports[-1].total_files == len(files)


async def test_a_cancelled_fetch_leaves_nothing_visible_and_goes_on_later(world: World) -> None:
    """The task ends cancelled; the next one succeeds with the same bytes."""
    files = tiny(400_000)
    world.add(URI, files)
    reached = world.hold(URI, files)
    task = asyncio.create_task(world.downloads.fetch(job(), ignore))
    await reached()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    with pytest.raises(ModelhostError) as caught:
        await world.files.list_files("tiny", 1)
    assert caught.value.reason is Reason.STORAGE_ERROR
    if isinstance(world, FakeWorld):
        world.fake.unhold(URI)
    fetched = await world.downloads.fetch(job(), ignore)
    assert {file.path for file in fetched.files} == set(files)


async def test_what_is_there_is_not_fetched_again(world: World) -> None:
    """A file that another model has counts as reused, and is shared."""
    files = tiny(50_000)
    world.add(URI, files)
    world.add("hf://org/other", {"model.safetensors": files["model.safetensors"]})
    await world.downloads.fetch(job(), ignore)
    before = (await world.files.use()).blob_bytes
    fetched = await world.downloads.fetch(job("hf://org/other", model="other"), ignore)
    assert fetched.reused_bytes == len(files["model.safetensors"])
    assert (await world.files.use()).blob_bytes == before


async def test_a_new_revision_stands_beside_the_old(world: World) -> None:
    """Another version, its own files, the old one untouched."""
    first = tiny(seed=1)
    world.add(URI, first)
    old = await world.downloads.fetch(job(), ignore)
    second = world.add(URI, tiny(seed=2))
    new = await world.downloads.fetch(job(version=2), ignore)
    assert new.facts.revision == second != old.facts.revision
    assert list(await world.files.list_files("tiny", 1)) == list(old.files)
    assert list(await world.files.list_files("tiny", 2)) == list(new.files)


@pytest.mark.parametrize(
    ("uri", "revision", "reason"),
    [
        ("hf://org/missing", "", Reason.SOURCE_NOT_FOUND),
        (URI, "no-such-branch", Reason.SOURCE_NOT_FOUND),
        ("https://example.com/f", "", Reason.UNIMPLEMENTED),
        ("ollama://tiny", "", Reason.UNIMPLEMENTED),
    ],
)
async def test_what_cannot_be_had_has_its_reason(
    world: World, uri: str, revision: str, reason: Reason
) -> None:
    """Asked or fetched alike, and nothing is left behind."""
    world.add(URI, tiny())
    source = Source(uri, revision)
    with pytest.raises(ModelhostError) as asked:
        await world.downloads.inspect(source)
    with pytest.raises(ModelhostError) as fetched:
        await world.downloads.fetch(DownloadJob("op", "tiny", 1, source, {}), ignore)
    assert asked.value.reason is fetched.value.reason is reason
    assert await world.files.check({}, deep=False, repair=False) == ()


async def test_only_pickles_is_refused_unless_allowed(world: World) -> None:
    """UNSAFE_FILE before a byte; with the operator's permission they come."""
    world.add(URI, {"config.json": b"{}", "pytorch_model.bin": b"\x80\x04N."})
    with pytest.raises(ModelhostError) as caught:
        await world.downloads.fetch(job(), ignore)
    assert caught.value.reason is Reason.UNSAFE_FILE
    allowed = DownloadJob("op", "tiny", 1, Source(URI), {}, allow_unsafe=True)
    fetched = await world.downloads.fetch(allowed, ignore)
    assert "pytorch_model.bin" in {file.path for file in fetched.files}


async def test_patterns_of_the_model_decide(world: World) -> None:
    """Allow and ignore patterns come with the source."""
    world.add(URI, tiny())
    source = Source(URI, "", ("*.safetensors", "*.txt"), ("empty*",))
    fetched = await world.downloads.fetch(DownloadJob("op", "tiny", 1, source, {}), ignore)
    assert [file.path for file in fetched.files] == ["model.safetensors", "nested/vocab.txt"]
