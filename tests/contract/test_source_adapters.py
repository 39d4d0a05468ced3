"""What every kind of source does, once its files come through the real pump into a real store."""

import asyncio
import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

import pytest

from bench.loopback_hub import LoopbackHub, Repo
from modelhostd.adapters.blobs import BlobStore, StoreConfig
from modelhostd.adapters.downloads import SourceDownloads
from modelhostd.adapters.files import FileStore
from modelhostd.adapters.hub import Hub, HubConfig
from modelhostd.adapters.local_files import LocalConfig, LocalFiles
from modelhostd.adapters.source import SourceAdapter
from modelhostd.adapters.trees import TreeStore
from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.resources import Phase, Progress, Source
from modelhostd.core.sources import scheme_of
from modelhostd.ports import DownloadJob
from tests.adapters.downloads_support import tiny


class Place(Protocol):
    """Where one kind of source keeps its models."""

    adapter: SourceAdapter

    def put(self, name: str, files: Mapping[str, bytes]) -> str:
        """Put exactly these files there, as a new revision; return the source's URI."""

    def missing(self) -> str:
        """Return the URI of a source that is not there."""


class HubPlace:
    def __init__(self, hub: LoopbackHub) -> None:
        self.hub = hub
        self.adapter: SourceAdapter = Hub(HubConfig(endpoint=hub.endpoint))

    def put(self, name: str, files: Mapping[str, bytes]) -> str:
        if (repo := self.hub.repos.get(f"org/{name}")) is not None:
            repo.commit(files)
        else:
            self.hub.repos[f"org/{name}"] = Repo(files)
        return f"hf://org/{name}"

    def missing(self) -> str:
        return "hf://org/missing"


class LocalPlace:
    def __init__(self, root: Path) -> None:
        self.root = root
        self.stamp = 10**18
        self.adapter: SourceAdapter = LocalFiles(LocalConfig((root,)))

    def put(self, name: str, files: Mapping[str, bytes]) -> str:
        folder = self.root / name
        shutil.rmtree(folder, ignore_errors=True)
        self.stamp += 1
        for path, data in files.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(data)
            os.utime(folder / path, ns=(self.stamp, self.stamp))
        return f"file://{folder}"

    def missing(self) -> str:
        return f"file://{self.root}/missing"


@pytest.fixture(params=["hf", "file"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    """The same promises from each kind of source."""
    if request.param == "file":
        (tmp_path / "models").mkdir()
        yield LocalPlace(tmp_path / "models")
        return
    with LoopbackHub() as hub:
        yield HubPlace(hub)


class Desk:
    """A home whose downloads know one kind of source."""

    def __init__(self, home: Path, place: Place) -> None:
        store = BlobStore(StoreConfig(home, reserve_bytes=0))
        trees = TreeStore(store)
        self.files = FileStore(store, trees)
        scheme = scheme_of(Source(place.missing()))
        self.downloads = SourceDownloads({scheme: place.adapter}, store, trees)
        self.reports: list[Progress] = []

    def job(self, uri: str, version: int = 1, *, allow_unsafe: bool = False) -> DownloadJob:
        return DownloadJob("op", "tiny", version, Source(uri), {}, allow_unsafe=allow_unsafe)

    def content(self, version: int = 1) -> dict[str, bytes]:
        root = self.files.model_dir("tiny", version)
        found = sorted(path for path in root.rglob("*") if path.is_file())
        return {str(path.relative_to(root)): path.read_bytes() for path in found}


@pytest.fixture
def desk(tmp_path: Path, place: Place) -> Desk:
    """Return a home for the place."""
    return Desk(tmp_path / "home", place)


async def test_what_is_planned_is_what_comes(desk: Desk, place: Place) -> None:
    """Files, sizes, revision and the weights' memory are told first; then exactly these bytes come."""
    files = tiny(300_000)
    uri = place.put("tiny", {**files, "pytorch_model.bin": b"pickle"})
    facts = await desk.downloads.inspect(Source(uri))
    sizes = {path: len(data) for path, data in files.items()}
    assert {file.path: file.size_bytes for file in facts.files} == sizes
    assert "pytorch_model.bin" in dict(facts.skipped)
    assert facts.predicted_bytes == 300_000
    fetched = await desk.downloads.fetch(desk.job(uri), desk.reports.append)
    assert fetched.facts.revision == facts.revision
    assert desk.content() == files
    assert {file.path: file.sha256 for file in fetched.files} == {
        path: hashlib.sha256(data).hexdigest() for path, data in files.items()
    }
    assert await desk.files.check({"tiny": [1]}, deep=True, repair=False) == ()
    done = [report.done_bytes for report in desk.reports]
    assert done == sorted(done)
    assert done[-1] == desk.reports[-1].total_bytes == sum(sizes.values())


async def test_the_revision_changes_with_the_files_alone(desk: Desk, place: Place) -> None:
    """Asked twice it is the same; with other files it is another, and both stand side by side."""
    uri = place.put("tiny", tiny(seed=1))
    first = (await desk.downloads.inspect(Source(uri))).revision
    assert first == (await desk.downloads.inspect(Source(uri))).revision != ""
    await desk.downloads.fetch(desk.job(uri), lambda _: None)
    place.put("tiny", tiny(seed=2))
    fetched = await desk.downloads.fetch(desk.job(uri, 2), lambda _: None)
    assert fetched.facts.revision != first
    assert (desk.content(1), desk.content(2)) == (tiny(seed=1), tiny(seed=2))


@pytest.mark.parametrize(
    "phase", [Phase.PLANNING, Phase.DOWNLOADING, Phase.VERIFYING, Phase.COMMITTING]
)
async def test_a_cancel_in_any_phase_leaves_nothing_visible(
    desk: Desk, place: Place, phase: Phase
) -> None:
    """And the next attempt ends right, whatever the first one left."""
    uri = place.put("tiny", tiny(3_000_000))
    tasks: list[asyncio.Task[object]] = []

    def cancel(report: Progress) -> None:
        if report.phase is phase:
            tasks[0].cancel()

    tasks.append(asyncio.create_task(desk.downloads.fetch(desk.job(uri), cancel)))
    with pytest.raises(asyncio.CancelledError):
        await tasks[0]
    with pytest.raises(ModelhostError):
        await desk.files.list_files("tiny", 1)
    await desk.downloads.fetch(desk.job(uri), lambda _: None)
    assert desk.content() == tiny(3_000_000)
    assert await desk.files.check({"tiny": [1]}, deep=True, repair=False) == ()


async def test_a_missing_source_is_not_found(desk: Desk, place: Place) -> None:
    """Asked or fetched alike, with the URI in the message and nothing left behind."""
    uri = place.missing()
    with pytest.raises(ModelhostError, match="missing") as asked:
        await desk.downloads.inspect(Source(uri))
    with pytest.raises(ModelhostError, match="missing") as fetched:
        await desk.downloads.fetch(desk.job(uri), lambda _: None)
    assert asked.value.reason is fetched.value.reason is Reason.SOURCE_NOT_FOUND
    assert await desk.files.check({}, deep=False, repair=False) == ()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
async def test_pickles_are_refused_under_any_name(desk: Desk, place: Place, name: str) -> None:
    """By its suffix before the first byte, by its content at the latest before anything is visible."""
    uri = place.put("tiny", {"config.json": b"{}", name: b"\x80\x04" + b"N." * 40})
    with pytest.raises(ModelhostError) as caught:
        await desk.downloads.fetch(desk.job(uri), lambda _: None)
    assert caught.value.reason in {Reason.UNSAFE_FILE, Reason.MALFORMED_FILE}
    with pytest.raises(ModelhostError):
        await desk.files.list_files("tiny", 1)


async def test_patterns_choose(desk: Desk, place: Place) -> None:
    """Allow and ignore patterns mean the same everywhere."""
    uri = place.put("tiny", tiny())
    source = Source(uri, "", ("*.safetensors", "*.txt"), ("empty*",))
    facts = await desk.downloads.inspect(source)
    assert {file.path for file in facts.files} == {"model.safetensors", "nested/vocab.txt"}


async def test_names_that_collide_are_refused(desk: Desk, place: Place) -> None:
    """Two files that differ by case are one file elsewhere."""
    uri = place.put("tiny", {**tiny(), "Config.json": b"{ }"})
    with pytest.raises(ModelhostError) as caught:
        await desk.downloads.inspect(Source(uri))
    assert caught.value.reason is Reason.UNSAFE_FILE
