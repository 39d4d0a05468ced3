"""No name from outside becomes a file elsewhere: from listings, lists of checksums, assets and headers."""

import json
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest

from bench.loopback_hub import LoopbackHub, Repo
from modelhostd.adapters.github import GitHub
from modelhostd.adapters.http_source import HttpSourceConfig
from modelhostd.adapters.hub import Hub, HubConfig
from modelhostd.adapters.urls import Urls
from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.origins import OriginPolicy
from tests.adapters.downloads_support import PATIENT, safetensors
from tests.adapters.hostile_places import NAMES
from tests.adapters.loopback_site import LoopbackSite, Page
from tests.adapters.source_desk import SourceDesk

FILES = {"config.json": b"{}", "model.safetensors": safetensors(100)}
HOSTILE = pytest.mark.parametrize("name", NAMES, ids=[str(n) for n in range(len(NAMES))])
# Where the store may write, below its home.
OURS = {"blobs", "models", "staging", "quarantine", "trash", "tmp"}


@pytest.fixture
def site() -> Iterator[LoopbackSite]:
    """A server that says anything."""
    with LoopbackSite() as site:
        yield site


def escapes(root: Path, home: Path) -> list[Path]:
    """Return what is below ``root`` and should not be: outside the home, a link, no known folder."""
    found = [path for path in root.rglob("*") if path != home and home not in path.parents]
    inside = [path for path in home.rglob("*") if path.relative_to(home).parts[0] not in OURS]
    return [*found, *inside, *(path for path in home.rglob("*") if path.is_symlink())]


async def outcome(desk: SourceDesk, uri: str) -> Reason | None:
    """Return why a download is refused, in a message that is plain; None when it is not."""
    try:
        await desk.fetch(uri)
    except ModelhostError as error:
        return error.reason if error.message.isprintable() else Reason.INTERNAL
    return None


async def test_in_a_listing_of_the_hub(tmp_path: Path) -> None:
    """A repository's tree with the name among good ones: refused, or left out and shown escaped."""
    with LoopbackHub() as hub:
        for number, name in enumerate(NAMES):
            hub.repos["org/tiny"] = Repo({**FILES, name: b"{}"})
            adapter = Hub(HubConfig(endpoint=hub.endpoint, retry=PATIENT))
            desk = SourceDesk(tmp_path / str(number), adapter)
            if (reason := await outcome(desk, "hf://org/tiny")) is None:
                facts = await desk.inspect("hf://org/tiny")
                assert all(path.isprintable() for path, _ in facts.skipped), ascii(name)
                assert desk.content() == FILES, ascii(name)
            else:
                assert reason in {Reason.UNSAFE_FILE, Reason.BAD_SOURCE_REPLY}, ascii(name)
                assert not list(desk.home.glob("models/*/*")), ascii(name)
            assert escapes(desk.home, desk.home) == [], ascii(name)
    assert {path.name for path in tmp_path.iterdir()} == set(map(str, range(len(NAMES))))


@HOSTILE
async def test_in_a_list_of_checksums(tmp_path: Path, site: LoopbackSite, name: str) -> None:
    """Beside good names."""
    lines = [f"{'0' * 64}  {each}" for each in (*FILES, name)]
    site.pages["/l/SHA256SUMS"] = Page("\n".join(lines).encode("utf-8"))
    site.pages |= {f"/l/{path}": Page(data) for path, data in FILES.items()}
    policy = OriginPolicy().with_endpoints(site.url)
    desk = SourceDesk(tmp_path / "home", Urls(HttpSourceConfig(policy)))
    with pytest.raises(ModelhostError):  # at the latest by the digests, which are of nothing
        await desk.fetch(f"{site.url}/l/SHA256SUMS")
    # `sha256sum ./*` writes `./`, which means nothing.
    harmless = [*FILES, name[2:]] if name == "./x.json" else FILES
    asked = {seen.path for seen in site.requests}
    assert asked <= {"/l/SHA256SUMS", *(f"/l/{path}" for path in harmless)}
    assert not list(desk.home.glob("models/*/*"))
    assert escapes(tmp_path, desk.home) == []


@HOSTILE
async def test_in_a_release_and_in_a_header(tmp_path: Path, site: LoopbackSite, name: str) -> None:
    """An asset's name, and what Content-Disposition calls a file."""
    assets = [
        {"id": n, "name": each, "size": 2, "state": "uploaded", "digest": None}
        for n, each in enumerate((*FILES, name))
    ]
    answer = json.dumps({"tag_name": "v1", "assets": assets}).encode()
    site.pages["/repos/o/r/releases/latest"] = Page(answer)
    github = SourceDesk(tmp_path / "a" / "home", GitHub(HttpSourceConfig(), site.url))
    (tmp_path / "a").mkdir(exist_ok=True)
    with pytest.raises(ModelhostError):  # refused, or not there: the site has no asset at all
        await github.fetch("github://o/r")
    assert escapes(tmp_path / "a", github.home) == []
    encoded = quote(name.encode("utf-8"), safe="")
    disposition = f"attachment; filename*=UTF-8''{encoded}"
    site.pages["/api"] = Page(
        FILES["model.safetensors"], headers={"Content-Disposition": disposition}
    )
    policy = OriginPolicy().with_endpoints(site.url)
    urls = SourceDesk(tmp_path / "b" / "home", Urls(HttpSourceConfig(policy)))
    (tmp_path / "b").mkdir(exist_ok=True)
    reason = await outcome(urls, f"{site.url}/api")
    assert reason in {None, Reason.UNSAFE_FILE, Reason.SOURCE_NOT_FOUND, Reason.UNSUPPORTED_MODEL}
    if reason is None:
        (path,) = urls.content()
        assert "/" not in path
    assert escapes(tmp_path / "b", urls.home) == []
