"""No URL from outside leads to a forbidden address: as a source, behind redirects, in every answer."""

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from bench.loopback_hub import Fault, LoopbackHub, Repo
from modelhostd.adapters.github import GitHub
from modelhostd.adapters.gs import GoogleStorage
from modelhostd.adapters.http_source import HttpSourceConfig
from modelhostd.adapters.hub import Hub, HubConfig
from modelhostd.adapters.ollama import Ollama
from modelhostd.adapters.s3 import S3
from modelhostd.adapters.source import TransferConfig
from modelhostd.adapters.urls import Urls
from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.origins import OriginPolicy
from modelhostd.core.resources import Source
from modelhostd.core.sources import parse_source
from modelhostd.core.transfer import RetryPolicy
from tests.adapters.downloads_support import tiny
from tests.adapters.hostile_places import HOME, NAMES, URLS, Watch
from tests.adapters.loopback_objects import Answer, LoopbackObjects
from tests.adapters.loopback_site import LoopbackSite, Page
from tests.adapters.source_desk import SourceDesk

ONCE = TransferConfig(retry=RetryPolicy(tries=1))
REFUSALS = {Reason.SOURCE_NOT_ALLOWED, Reason.BAD_SOURCE_REPLY}
# Refused, or public and not there, or a name that is none.
OUTCOMES = {*REFUSALS, Reason.NETWORK_ERROR, Reason.INVALID_ARGUMENT, Reason.SOURCE_NOT_FOUND}
HOSTILE = pytest.mark.parametrize("url", URLS, ids=[str(n) for n in range(len(URLS))])


def port_of(url: str) -> int:
    """Return the port of a server on loopback."""
    port = urlsplit(url).port
    assert port is not None
    return port


def named(url: str) -> str:
    """Return the URL of a server on loopback by a name, so that its address is nobody's to use."""
    return f"http://{HOME}:{port_of(url)}"


def header(url: str) -> str:
    """Return a URL as the bytes of a header carry it."""
    return url.encode("utf-8").decode("latin-1").replace("\r\n", " ")


@pytest.fixture
def site() -> Iterator[LoopbackSite]:
    """A server that the operator named."""
    with LoopbackSite() as site:
        yield site


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch, site: LoopbackSite) -> Watch:
    """Everything but this one server is only written down."""
    watch = Watch({("127.0.0.1", port_of(site.url))})
    return watch.install(monkeypatch)


async def ends(desk: SourceDesk, uri: str | Source) -> Reason:
    """Return how a download ends that cannot succeed."""
    with pytest.raises(ModelhostError) as caught:
        await desk.fetch(uri)
    assert not list(desk.home.glob("models/*/*"))
    return caught.value.reason


def test_the_tables_are_long_enough() -> None:
    """Sixty of each, and none twice."""
    assert len(set(URLS)) == len(URLS) >= 60
    assert len(set(NAMES)) == len(NAMES) >= 60


@HOSTILE
async def test_no_source_is_there(tmp_path: Path, watch: Watch, url: str) -> None:
    """As somebody typed it: refused by its form, its scheme, its host or its address."""
    desk = SourceDesk(tmp_path / "home", Urls(HttpSourceConfig(transfer=ONCE)))
    with suppress(ModelhostError):
        source = parse_source(f"{url}a.safetensors" if url.endswith("/") else url)
        assert await ends(desk, source) in OUTCOMES
    # The same without the first door, as a database of another day might have it.
    assert await ends(desk, Source(url)) in {*OUTCOMES, Reason.UNIMPLEMENTED}
    assert watch.forbidden == []


@HOSTILE
async def test_no_redirect_leads_there(
    tmp_path: Path, watch: Watch, site: LoopbackSite, url: str
) -> None:
    """Each hop is judged like the first."""
    policy = OriginPolicy().with_endpoints(named(site.url))
    desk = SourceDesk(tmp_path / "home", Urls(HttpSourceConfig(policy, transfer=ONCE)))
    location = header(url)
    site.pages["/a.safetensors"] = Page(b"", 302, {"Location": "/b"}, etag="")
    site.pages["/b"] = Page(b"", 307, {"Location": location}, etag="")
    assert await ends(desk, f"{named(site.url)}/a.safetensors") in OUTCOMES
    assert [seen.path for seen in site.requests] == ["/a.safetensors", "/b"]
    assert watch.forbidden == []


async def test_no_asset_is_there(tmp_path: Path, watch: Watch, site: LoopbackSite) -> None:
    """Where GitHub says that the bytes of an asset are."""
    asset = {"id": 1, "name": "a.safetensors", "size": 5, "state": "uploaded", "digest": None}
    release = json.dumps({"tag_name": "v1", "assets": [asset]}).encode()
    site.pages["/repos/o/r/releases/latest"] = Page(release)
    adapter = GitHub(HttpSourceConfig(transfer=ONCE), named(site.url))
    desk = SourceDesk(tmp_path / "home", adapter)
    for url in URLS:
        moved = Page(b"", 302, {"Location": header(url)}, etag="")
        site.pages["/repos/o/r/releases/assets/1"] = moved
        assert await ends(desk, "github://o/r") in OUTCOMES, url
        assert watch.forbidden == [], url


async def test_no_layer_and_no_realm_is_there(
    tmp_path: Path, watch: Watch, site: LoopbackSite
) -> None:
    """Where a registry says that a blob is, and where its login is."""
    digest = f"sha256:{'0' * 64}"
    layer = {"mediaType": "application/vnd.ollama.image.model", "digest": digest, "size": 5}
    manifest = json.dumps({"schemaVersion": 2, "layers": [layer]}).encode()
    site.pages["/v2/library/x/manifests/latest"] = Page(manifest)
    adapter = Ollama(HttpSourceConfig(transfer=ONCE), named(site.url))
    desk = SourceDesk(tmp_path / "home", adapter)
    for url in URLS:
        moved = Page(b"", 302, {"Location": header(url)}, etag="")
        site.pages[f"/v2/library/x/blobs/{digest}"] = moved
        assert await ends(desk, "ollama://x") in OUTCOMES, url
        challenge = f'Bearer realm="{header(url)}"'
        site.pages["/v2/library/y/manifests/latest"] = Page(token="Bearer x", challenge=challenge)
        assert await ends(desk, "ollama://y") in {*OUTCOMES, Reason.AUTHENTICATION_REQUIRED}, url
        assert watch.forbidden == [], url


@pytest.mark.parametrize("scheme", ["s3", "gs"])
@pytest.mark.parametrize("where", ["listing", "bytes"])
async def test_no_object_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str, where: str
) -> None:
    """Where a store says that its listing or an object is; the libraries' requests go by the same door."""
    with LoopbackObjects() as store:
        watch = Watch({("127.0.0.1", port_of(store.url))}).install(monkeypatch)
        store.put("bucket/m.safetensors", tiny()["model.safetensors"])
        kind: type[S3 | GoogleStorage] = S3 if scheme == "s3" else GoogleStorage
        adapter = kind(HttpSourceConfig(transfer=ONCE), named(store.url))
        desk = SourceDesk(tmp_path / "home", adapter)
        at: list[str] = []

        def moved(method: str, path: str) -> Answer | None:
            byte = "alt=media" in path or (method == "GET" and path == "/bucket/m.safetensors")
            return Answer(302, b"", {"Location": at[0]}) if byte or where == "listing" else None

        store.answer = moved
        # One plan of S3's library takes as long as ten of the other's; the door is the same.
        for url in URLS if scheme == "gs" else URLS[::4]:
            at[:] = [header(url)]
            assert await ends(desk, f"{scheme}://bucket/m.safetensors") in OUTCOMES, url
            assert watch.forbidden == [], url


@pytest.mark.parametrize("where", ["redirect", "next", "cdn"])
async def test_no_answer_of_the_hub_leads_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """A redirect of its API, the next page of a listing, the location of a file; huggingface_hub's own
    requests go through the same door.
    """
    with LoopbackHub({"org/tiny": Repo(tiny())}) as hub:
        watch = Watch({("127.0.0.1", port_of(hub.endpoint))}).install(monkeypatch)
        adapter = Hub(HubConfig(endpoint=named(hub.endpoint), retry=ONCE.retry))
        desk = SourceDesk(tmp_path / "home", adapter)
        for url in URLS:
            if where == "next":
                hub.next_link = header(url)
            else:
                match = "/api/*" if where == "redirect" else "*/resolve/*"
                headers = {"Location": header(url)}
                hub.clear_faults()
                hub.fault(Fault(match, where="hub", status=302, headers=headers, times=99))
            await ends(desk, "hf://org/tiny")
            assert watch.forbidden == [], url


async def test_what_was_judged_is_what_is_connected_to(
    tmp_path: Path, watch: Watch, site: LoopbackSite
) -> None:
    """One look-up for each connection: a name that changes its mind in between is not believed."""
    desk = SourceDesk(tmp_path / "home", Urls(HttpSourceConfig(transfer=ONCE)))
    assert await ends(desk, "https://rebinding.example/a.gguf") is Reason.NETWORK_ERROR
    assert watch.looked_up == ["rebinding.example"]
    assert watch.connected == [("93.184.216.34", 443)]
    assert await ends(desk, "https://rebinding.example/a.gguf") is Reason.SOURCE_NOT_ALLOWED
    assert len(watch.connected) == 1


async def test_hosts_that_are_not_listed_are_not_looked_up(tmp_path: Path, watch: Watch) -> None:
    """Neither as a source nor behind a redirect; the listed one is."""
    config = HttpSourceConfig(OriginPolicy(hosts=("*.good.example",)), transfer=ONCE)
    desk = SourceDesk(tmp_path / "home", Urls(config))
    assert await ends(desk, "https://public.example/a.gguf") is Reason.SOURCE_NOT_ALLOWED
    assert await ends(desk, "https://good.example.evil.example/a") is Reason.SOURCE_NOT_ALLOWED
    assert watch.looked_up == []
    assert await ends(desk, "https://a.good.example/a.gguf") is Reason.NETWORK_ERROR
    assert watch.looked_up == ["a.good.example"]
