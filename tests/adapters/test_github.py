"""``github://`` sources against an API on loopback: releases, digests, tokens, limits."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from modelhostd.adapters.credentials import Credentials
from modelhostd.adapters.github import GitHub
from modelhostd.adapters.http_source import HttpSourceConfig
from modelhostd.adapters.source import TransferConfig
from modelhostd.core.errors import Reason
from modelhostd.core.origins import parse_target
from tests.adapters.downloads_support import PATIENT, safetensors, tiny
from tests.adapters.loopback_site import LoopbackSite, Page
from tests.adapters.source_desk import SourceDesk

WEIGHTS = safetensors(50_000)
TOKEN = "ghp_canary_0123456789"
ASSET = "/repos/org/tiny/releases/assets/{}"


class Repo:
    """A repository's releases on a site; with a token it is private."""

    def __init__(self, site: LoopbackSite, token: str = "") -> None:
        self.site = site
        self.authorization = f"Bearer {token}" if token else ""
        self.assets: dict[int, tuple[str, bytes]] = {}

    def release(
        self, tag: str, files: dict[str, bytes], *, digests: bool = True, latest: bool = True
    ) -> None:
        """Publish a release; its assets get ids of their own."""
        listed = []
        for name, data in files.items():
            number = len(self.assets) + 1
            self.assets[number] = (name, data)
            digest = f"sha256:{hashlib.sha256(data).hexdigest()}" if digests else None
            one = {"id": number, "name": name, "size": len(data), "state": "uploaded"}
            listed.append({**one, "digest": digest})
            moved = {"Location": f"{self.site.cdn}/{number}"}
            self.site.pages[ASSET.format(number)] = Page(
                b"", 302, moved, etag="", token=self.authorization
            )
            self.site.pages[f"/org/tiny/releases/download/{tag}/{name}"] = Page(
                b"", 404 if self.authorization else 302, moved, etag=""
            )
            self.site.cdn_pages[f"/{number}"] = Page(data)
        answer = json.dumps({"tag_name": tag.replace("%2F", "/"), "assets": listed}).encode()
        page = Page(answer, token=self.authorization)
        self.site.pages[f"/repos/org/tiny/releases/tags/{tag}"] = page
        if latest:
            self.site.pages["/repos/org/tiny/releases/latest"] = page


@pytest.fixture
def site() -> Iterator[LoopbackSite]:
    """An API, the pages of repositories, and a CDN on another port."""
    with LoopbackSite() as site:
        yield site


def desk_for(tmp_path: Path, site: LoopbackSite, token: str = "") -> SourceDesk:
    """Return a home that asks the site, with a token or without."""
    origin = parse_target(site.url, "x").origin
    credentials = Credentials((), {origin: ("GITHUB_TOKEN", token)} if token else {})
    config = HttpSourceConfig(credentials=credentials, transfer=TransferConfig(retry=PATIENT))
    return SourceDesk(tmp_path / "home", GitHub(config, site.url))


@pytest.fixture
def desk(tmp_path: Path, site: LoopbackSite) -> SourceDesk:
    """A home without a token."""
    return desk_for(tmp_path, site)


async def test_an_asset_of_the_latest_release_or_of_a_tag(
    desk: SourceDesk, site: LoopbackSite
) -> None:
    """Each by its name; tags with slashes too."""
    repo = Repo(site)
    repo.release("v1", {"a.safetensors": WEIGHTS}, latest=False)
    repo.release("release%2F2", {"a.safetensors": safetensors(9), "b.safetensors": WEIGHTS})
    await desk.fetch("github://org/tiny@v1/a.safetensors", 1)
    await desk.fetch("github://org/tiny/a.safetensors", 2)
    await desk.fetch("github://org/tiny@release/2/b.safetensors", 3)
    assert [desk.content(version) for version in (1, 2, 3)] == [
        {"a.safetensors": WEIGHTS},
        {"a.safetensors": safetensors(9)},
        {"b.safetensors": WEIGHTS},
    ]


async def test_a_release_without_an_asset_is_all_of_it(
    desk: SourceDesk, site: LoopbackSite
) -> None:
    """By the choice that any repository gets."""
    files = {path: data for path, data in tiny().items() if "/" not in path}
    Repo(site).release("v1", {**files, "pytorch_model.bin": b"x", "install.sh": b"x"})
    facts = await desk.inspect("github://org/tiny")
    assert {file.path for file in facts.files} == files.keys()
    await desk.fetch("github://org/tiny")
    assert desk.content() == files


async def test_an_asset_that_is_not_there_is_named(desk: SourceDesk, site: LoopbackSite) -> None:
    """A repository, a tag and an asset alike are SOURCE_NOT_FOUND."""
    Repo(site).release("v1", {"a.safetensors": WEIGHTS})
    for uri in ("github://org/other", "github://org/tiny@v9", "github://org/tiny/b.gguf"):
        assert (await desk.refused(uri)).reason is Reason.SOURCE_NOT_FOUND


async def test_strangers_cost_the_api_one_request(desk: SourceDesk, site: LoopbackSite) -> None:
    """60 an hour are all there are: the bytes come from the release's page."""
    Repo(site).release("v1", {"a.safetensors": WEIGHTS, "config.json": b"{}"})
    await desk.fetch("github://org/tiny")
    assert len(site.seen("home", "/repos/")) == 1


async def test_without_a_digest_the_id_is_asked_for(desk: SourceDesk, site: LoopbackSite) -> None:
    """Another asset may be put under the name: then what was planned is gone, and not taken."""
    Repo(site).release("v1", {"a.safetensors": WEIGHTS}, digests=False)
    await desk.fetch("github://org/tiny")
    assert site.seen("home", "/assets/1")
    assert not site.seen("home", "/download/")
    assert desk.content() == {"a.safetensors": WEIGHTS}


async def test_another_content_than_the_digest_is_refused(
    desk: SourceDesk, site: LoopbackSite
) -> None:
    """Replaced between plan and fetch, or broken on the way."""
    Repo(site).release("v1", {"a.safetensors": WEIGHTS})
    site.cdn_pages["/1"].data = safetensors(50_000, seed=1)
    assert (await desk.refused("github://org/tiny")).reason is Reason.CHECKSUM_MISMATCH


async def test_the_token_is_for_the_api_alone(tmp_path: Path, site: LoopbackSite) -> None:
    """A private repository by its assets' ids; the CDN never sees the token."""
    Repo(site, TOKEN).release("v1", {"a.safetensors": WEIGHTS, "config.json": b"{}"})
    stranger = desk_for(tmp_path / "stranger", site)
    error = await stranger.refused("github://org/tiny")
    assert error.reason is Reason.AUTHENTICATION_REQUIRED
    site.requests.clear()
    desk = desk_for(tmp_path, site, TOKEN)
    await desk.fetch("github://org/tiny")
    assert desk.content() == {"a.safetensors": WEIGHTS, "config.json": b"{}"}
    assert {one.headers.get("authorization") for one in site.seen("home")} == {f"Bearer {TOKEN}"}
    assert {one.headers.get("authorization") for one in site.seen("cdn")} == {None}


async def test_a_used_up_limit_is_no_refusal(desk: SourceDesk, site: LoopbackSite) -> None:
    """403 with nothing left: RATE_LIMITED, tried again when GitHub says."""
    Repo(site).release("v1", {"a.safetensors": WEIGHTS})
    limits = {"X-RateLimit-Remaining": "0", "X-RateLimit-Reset": "0"}
    limited = iter([Page(b"slow down", 403, limits)])
    site.answer = lambda _where, _path: next(limited, None)
    await desk.fetch("github://org/tiny")
    assert [one.status for one in site.seen("home", "/repos/")] == [403, 200]


async def test_a_limit_told_by_a_cdn_is_a_refusal(desk: SourceDesk, site: LoopbackSite) -> None:
    """Only GitHub itself can say that its limit is used up."""
    Repo(site).release("v1", {"a.safetensors": WEIGHTS})
    site.cdn_pages["/1"] = Page(b"no", 403, {"X-RateLimit-Remaining": "0"})
    assert (await desk.refused("github://org/tiny")).reason is Reason.ACCESS_DENIED


@pytest.mark.parametrize(
    "answer", [b"<html>", b"{}", b'{"tag_name": "v1", "assets": [{}]}', b"0" * 9_000_000]
)
async def test_an_answer_that_is_no_release_is_refused(
    desk: SourceDesk, site: LoopbackSite, answer: bytes
) -> None:
    """A login page, half an answer, an endless one."""
    site.pages["/repos/org/tiny/releases/latest"] = Page(answer)
    assert (await desk.refused("github://org/tiny")).reason is Reason.BAD_SOURCE_REPLY


@pytest.mark.parametrize("name", ["../a.safetensors", "a\\b.safetensors", "a\n.safetensors"])
async def test_hostile_names_of_assets_are_refused(
    desk: SourceDesk, site: LoopbackSite, name: str
) -> None:
    """Before any of them is asked for."""
    Repo(site).release("v1", {name: WEIGHTS})
    assert (await desk.refused("github://org/tiny")).reason is Reason.UNSAFE_FILE
    assert site.seen("cdn") == []
