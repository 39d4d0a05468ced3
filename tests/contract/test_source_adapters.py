"""What every kind of source does, once its files come through the real pump into a real store."""

import asyncio
import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.loopback_hub import LoopbackHub
from modelhostd.adapters.blobs import BlobStore, StoreConfig
from modelhostd.adapters.downloads import SourceDownloads
from modelhostd.adapters.files import FileStore
from modelhostd.adapters.trees import TreeStore
from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.resources import Phase, Progress, Source
from modelhostd.core.sources import scheme_of
from modelhostd.ports import DownloadJob
from tests.adapters.loopback_objects import LoopbackObjects
from tests.adapters.loopback_site import LoopbackSite
from tests.adapters.source_places import (
    GitHubPlace,
    HubPlace,
    LocalPlace,
    ObjectPlace,
    OllamaPlace,
    Place,
    UrlPlace,
)


@pytest.fixture(params=["hf", "file", "https", "github", "ollama", "s3", "gs"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    """The same promises from each kind of source."""
    if request.param == "file":
        (tmp_path / "models").mkdir()
        yield LocalPlace(tmp_path / "models")
        return
    if request.param == "hf":
        with LoopbackHub() as hub:
            yield HubPlace(hub)
        return
    if request.param in {"s3", "gs"}:
        with LoopbackObjects() as store:
            yield ObjectPlace(store, request.param)
        return
    kinds = {"https": UrlPlace, "github": GitHubPlace, "ollama": OllamaPlace}
    with LoopbackSite() as site:
        yield kinds[request.param](site)


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
    files = place.sample(300_000)
    uri = place.put("tiny", files)
    facts = await desk.downloads.inspect(Source(uri))
    sizes = {path: len(data) for path, data in files.items()}
    assert {file.path: file.size_bytes for file in facts.files} == sizes
    gguf = sum(file.size_bytes for file in facts.files if file.path.endswith(".gguf"))
    assert facts.predicted_bytes == (300_000 if "model.safetensors" in files else gguf)
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
    uri = place.put("tiny", place.sample(seed=1))
    first = (await desk.downloads.inspect(Source(uri))).revision
    assert first == (await desk.downloads.inspect(Source(uri))).revision != ""
    await desk.downloads.fetch(desk.job(uri), lambda _: None)
    place.put("tiny", place.sample(seed=2))
    fetched = await desk.downloads.fetch(desk.job(uri, 2), lambda _: None)
    assert fetched.facts.revision != first
    assert (desk.content(1), desk.content(2)) == (place.sample(seed=1), place.sample(seed=2))


@pytest.mark.parametrize(
    "phase", [Phase.PLANNING, Phase.DOWNLOADING, Phase.VERIFYING, Phase.COMMITTING]
)
async def test_a_cancel_in_any_phase_leaves_nothing_visible(
    desk: Desk, place: Place, phase: Phase
) -> None:
    """And the next attempt ends right, whatever the first one left."""
    uri = place.put("tiny", place.sample(3_000_000))
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
    assert desk.content() == place.sample(3_000_000)
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
    files = place.sample()
    uri = place.put("tiny", files)
    source = Source(uri, "", ("*.safetensors", "*.gguf", "*.txt"), ("empty*", "template*"))
    facts = await desk.downloads.inspect(source)
    expected = {p for p in files if not p.endswith(".json") and p[:5] not in {"empty", "templ"}}
    assert {file.path for file in facts.files} == expected != set()


async def test_pickles_beside_safetensors_are_left_out(desk: Desk, place: Place) -> None:
    """With a word why; what is chosen loads without them."""
    uri = place.put("tiny", {**place.sample(), "pytorch_model.bin": b"x", "modeling.py": b"x"})
    facts = await desk.downloads.inspect(Source(uri))
    assert {"pytorch_model.bin", "modeling.py"} <= dict(facts.skipped).keys()
    assert {file.path for file in facts.files} == place.sample().keys()


async def test_names_that_collide_are_refused(desk: Desk, place: Place) -> None:
    """Two files that differ by case are one file elsewhere."""
    uri = place.put("tiny", {**place.sample(), "Config.json": b"{ }"})
    with pytest.raises(ModelhostError) as caught:
        await desk.downloads.inspect(Source(uri))
    assert caught.value.reason is Reason.UNSAFE_FILE
