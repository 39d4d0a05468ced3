"""What every kind of source does, once its files come through the real pump into a real store."""

import asyncio
import hashlib
import itertools
import json
import os
import random
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import ClassVar, Protocol

import pytest

from bench.loopback_hub import LoopbackHub, Repo
from modelhostd.adapters.blobs import BlobStore, StoreConfig
from modelhostd.adapters.downloads import SourceDownloads
from modelhostd.adapters.files import FileStore
from modelhostd.adapters.github import GitHub
from modelhostd.adapters.http_source import HttpSourceConfig
from modelhostd.adapters.hub import Hub, HubConfig
from modelhostd.adapters.local_files import LocalConfig, LocalFiles
from modelhostd.adapters.ollama import Ollama
from modelhostd.adapters.source import SourceAdapter
from modelhostd.adapters.trees import TreeStore
from modelhostd.adapters.urls import Urls
from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.origins import OriginPolicy
from modelhostd.core.resources import Phase, Progress, Source
from modelhostd.core.sources import scheme_of
from modelhostd.ports import DownloadJob
from tests import gguf
from tests.adapters.downloads_support import tiny
from tests.adapters.loopback_site import LoopbackSite, Page


class Place(Protocol):
    """Where one kind of source keeps its models."""

    adapter: SourceAdapter

    def sample(self, data_bytes: int = 1000, seed: int = 0) -> dict[str, bytes]:
        """Return the files of a small model, of names that this source can have."""

    def put(self, name: str, files: Mapping[str, bytes]) -> str:
        """Put exactly these files there, as a new revision; return the source's URI."""

    def missing(self) -> str:
        """Return the URI of a source that is not there."""


class AnyNames:
    """Sources whose files have the names that somebody gave them."""

    def sample(self, data_bytes: int = 1000, seed: int = 0) -> dict[str, bytes]:
        return tiny(data_bytes, seed)


class HubPlace(AnyNames):
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


class LocalPlace(AnyNames):
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


class UrlPlace(AnyNames):
    """A list with checksums, and its files behind a redirect to a CDN."""

    def __init__(self, site: LoopbackSite) -> None:
        self.site = site
        self.adapter: SourceAdapter = Urls(
            HttpSourceConfig(OriginPolicy().with_endpoints(site.url))
        )

    def put(self, name: str, files: Mapping[str, bytes]) -> str:
        lines = [f"{hashlib.sha256(data).hexdigest()}  {path}\n" for path, data in files.items()]
        self.site.pages[f"/{name}/SHA256SUMS"] = Page("".join(lines).encode())
        for path, data in files.items():
            at = f"/{name}/{path}"
            self.site.pages[at] = Page(
                b"", 302, {"Location": f"{self.site.cdn}{at}?signed"}, etag=""
            )
            self.site.cdn_pages[f"{at}?signed"] = Page(data)
        return f"{self.site.url}/{name}/SHA256SUMS"

    def missing(self) -> str:
        return f"{self.site.url}/missing/SHA256SUMS"


class GitHubPlace(AnyNames):
    """A release; its assets are named without folders."""

    def __init__(self, site: LoopbackSite) -> None:
        self.site = site
        self.ids = itertools.count(1)
        self.adapter: SourceAdapter = GitHub(HttpSourceConfig(), site.url)

    def put(self, name: str, files: Mapping[str, bytes]) -> str:
        assets = []
        for path, data in files.items():
            flat, number = path.replace("/", "-"), next(self.ids)
            told = hashlib.sha256(data).hexdigest() if number % 2 else None
            assets.append(
                {
                    "id": number,
                    "name": flat,
                    "size": len(data),
                    "state": "uploaded",
                    "digest": told and f"sha256:{told}",
                }
            )
            moved = Page(b"", 302, {"Location": f"{self.site.cdn}/{number}"}, etag="")
            self.site.pages[f"/org/{name}/releases/download/v1/{flat}"] = moved
            self.site.pages[f"/repos/org/{name}/releases/assets/{number}"] = moved
            self.site.cdn_pages[f"/{number}"] = Page(data)
        answer = json.dumps({"tag_name": "v1", "assets": assets}).encode()
        self.site.pages[f"/repos/org/{name}/releases/latest"] = Page(answer)
        return f"github://org/{name}"

    def sample(self, data_bytes: int = 1000, seed: int = 0) -> dict[str, bytes]:
        # Assets have no folders.
        return {path.replace("/", "-"): data for path, data in tiny(data_bytes, seed).items()}

    def missing(self) -> str:
        return "github://org/missing"


class OllamaPlace:
    """A manifest and layers; files are named for what they are."""

    KINDS: ClassVar = {"tiny.gguf": "model", "template.txt": "template", "params.json": "params"}

    def __init__(self, site: LoopbackSite) -> None:
        self.site = site
        self.adapter: SourceAdapter = Ollama(HttpSourceConfig(), site.url)

    def sample(self, data_bytes: int = 1000, seed: int = 0) -> dict[str, bytes]:
        weights = gguf.model(random.Random(seed).randbytes(data_bytes))
        return {"tiny.gguf": weights, "template.txt": b"{{ .Prompt }}", "params.json": b"{}"}

    def put(self, name: str, files: Mapping[str, bytes]) -> str:
        layers = []
        for path, data in files.items():
            if path not in self.KINDS:
                pytest.skip("a registry names its files itself")
            digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
            media = f"application/vnd.ollama.image.{self.KINDS[path]}"
            layers.append({"mediaType": media, "digest": digest, "size": len(data)})
            at = f"/v2/library/{name}/blobs/{digest}"
            self.site.pages[at] = Page(b"", 307, {"Location": f"{self.site.cdn}/{digest}"}, etag="")
            self.site.cdn_pages[f"/{digest}"] = Page(data)
        answer = json.dumps({"schemaVersion": 2, "layers": layers}).encode()
        self.site.pages[f"/v2/library/{name}/manifests/latest"] = Page(answer)
        return f"ollama://{name}"

    def missing(self) -> str:
        return "ollama://missing"


@pytest.fixture(params=["hf", "file", "https", "github", "ollama"])
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
    assert facts.predicted_bytes == (300_000 if "model.safetensors" in files else 0)
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
