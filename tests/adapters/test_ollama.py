"""``ollama://`` sources against a registry on loopback: manifests, layers, logins and whom they tell."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from modelhostd.adapters.credentials import Credentials
from modelhostd.adapters.http_source import HttpSourceConfig
from modelhostd.adapters.ollama import Ollama
from modelhostd.adapters.source import TransferConfig
from modelhostd.core.errors import Reason
from modelhostd.core.origins import parse_target
from tests import gguf
from tests.adapters.downloads_support import PATIENT
from tests.adapters.loopback_site import LoopbackSite, Page
from tests.adapters.source_desk import SourceDesk

WEIGHTS = gguf.model(bytes(range(256)) * 300)
OTHER = gguf.model(bytes(range(256)) * 301)
MANIFEST = "/v2/library/tiny/manifests/latest"
TOKEN = "ollama_canary_0123456789"


class Registry:
    """A registry on a site."""

    def __init__(self, site: LoopbackSite) -> None:
        self.site = site

    def put(
        self, layers: dict[str, bytes], name: str = "library/tiny", tag: str = "latest"
    ) -> None:
        """Put a model there: kind of layer -> its bytes; blobs are at the CDN."""
        listed = []
        for kind, data in layers.items():
            digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
            media = f"application/vnd.ollama.image.{kind}"
            listed.append({"mediaType": media, "digest": digest, "size": len(data)})
            self.site.pages[f"/v2/{name}/blobs/{digest}"] = Page(
                b"", 307, {"Location": f"{self.site.cdn}/{digest}"}, etag=""
            )
            self.site.cdn_pages[f"/{digest}"] = Page(data)
        answer = json.dumps({"schemaVersion": 2, "layers": listed}).encode()
        self.site.pages[f"/v2/{name}/manifests/{tag}"] = Page(answer)

    def protect(self, token: str, challenge: str) -> None:
        """Want a token for everything."""
        for path, page in self.site.pages.items():
            if path.startswith("/v2/"):
                page.token, page.challenge = f"Bearer {token}", challenge


@pytest.fixture
def site() -> Iterator[LoopbackSite]:
    """A registry, and a CDN on another port."""
    with LoopbackSite() as site:
        yield site


@pytest.fixture
def registry(site: LoopbackSite) -> Registry:
    """A registry with one model."""
    registry = Registry(site)
    registry.put({"model": WEIGHTS, "template": b"{{ .Prompt }}"})
    return registry


def desk_for(tmp_path: Path, site: LoopbackSite, token: str = "") -> SourceDesk:
    """Return a home that asks the registry, with a credential or without."""
    origin = parse_target(site.url, "x").origin
    credentials = Credentials((), {origin: ("a file", token)} if token else {})
    config = HttpSourceConfig(credentials=credentials, transfer=TransferConfig(retry=PATIENT))
    return SourceDesk(tmp_path / "home", Ollama(config, site.url))


@pytest.fixture
def desk(tmp_path: Path, site: LoopbackSite) -> SourceDesk:
    """A home without a credential."""
    return desk_for(tmp_path, site)


async def test_a_model_by_name_namespace_and_tag(desk: SourceDesk, registry: Registry) -> None:
    """Layers become files; without a tag it is the latest."""
    registry.put({"model": OTHER}, "someone/tiny", "8b")
    await desk.fetch("ollama://tiny", 1)
    await desk.fetch("ollama://someone/tiny:8b", 2)
    assert desk.content(1) == {"tiny.gguf": WEIGHTS, "template.txt": b"{{ .Prompt }}"}
    assert desk.content(2) == {"tiny.gguf": OTHER}


async def test_layers_that_are_no_gguf_are_refused_by_name(
    desk: SourceDesk, registry: Registry
) -> None:
    """Before any of them comes."""
    registry.put({"tensor": b"x"})
    assert (await desk.refused("ollama://tiny")).reason is Reason.UNSUPPORTED_MODEL
    assert registry.site.seen("cdn") == []


async def test_a_layer_of_other_bytes_is_refused(desk: SourceDesk, registry: Registry) -> None:
    """The digest is its name."""
    digest = hashlib.sha256(WEIGHTS).hexdigest()
    registry.site.cdn_pages[f"/sha256:{digest}"].data = bytes(reversed(WEIGHTS))
    assert (await desk.refused("ollama://tiny")).reason is Reason.CHECKSUM_MISMATCH


@pytest.mark.parametrize("answer", [b"<html>", b"{}", b"0" * 2_000_000])
async def test_an_answer_that_is_no_manifest_is_refused(
    desk: SourceDesk, registry: Registry, answer: bytes
) -> None:
    """A login page, half an answer, one of many megabytes."""
    registry.site.pages[MANIFEST] = Page(answer)
    assert (await desk.refused("ollama://tiny")).reason is Reason.BAD_SOURCE_REPLY


async def test_strangers_get_their_token_at_the_realm(desk: SourceDesk, registry: Registry) -> None:
    """It is shown to the registry, and not to the CDN; service and scope are passed on."""
    site = registry.site
    scope = "repository:library/tiny:pull"
    registry.protect(TOKEN, f'Bearer realm="{site.cdn}/token",service="reg",scope="{scope}"')
    path = "/token?service=reg&scope=repository%3Alibrary%2Ftiny%3Apull"
    site.cdn_pages[path] = Page(json.dumps({"token": TOKEN}).encode())
    await desk.fetch("ollama://tiny")
    assert len(site.seen("cdn", "/token")) == 1
    assert {one.headers.get("authorization") for one in site.seen("cdn")} == {None}
    assert site.seen("home", "/blobs/")[0].headers["authorization"] == f"Bearer {TOKEN}"


async def test_a_token_that_runs_out_is_renewed(desk: SourceDesk, registry: Registry) -> None:
    """In the middle of a download; a realm whose tokens never do is not asked for ever."""
    site = registry.site
    registry.protect("first", f'Bearer realm="{site.url}/token"')
    site.pages["/token"] = Page(b'{"token": "first"}')
    facts = await desk.inspect("ollama://tiny")
    assert facts.files
    registry.protect("second", f'Bearer realm="{site.url}/token"')
    site.pages["/token"] = Page(b'{"token": "second"}')
    await desk.fetch("ollama://tiny")
    site.requests.clear()
    registry.protect("third", f'Bearer realm="{site.url}/token"')
    assert (await desk.refused("ollama://tiny", 2)).reason is Reason.AUTHENTICATION_REQUIRED
    assert len(site.seen("home", "/token")) == 1


async def test_a_credential_of_ours_never_goes_to_a_realm(
    tmp_path: Path, registry: Registry
) -> None:
    """The registry sees it, and is believed when it refuses: no realm is asked at all."""
    site = registry.site
    desk = desk_for(tmp_path, site, TOKEN)
    registry.protect("another", f'Bearer realm="{site.cdn}/token"')
    assert (await desk.refused("ollama://tiny")).reason is Reason.AUTHENTICATION_REQUIRED
    assert site.seen("cdn") == []
    registry.protect(TOKEN, f'Bearer realm="{site.cdn}/token"')
    await desk.fetch("ollama://tiny")
    assert {one.headers.get("authorization") for one in site.seen("cdn")} == {None}


@pytest.mark.parametrize(
    "realm",
    [
        "http://127.0.0.2:9/token", "https://127.0.0.2:9/token", "https://169.254.169.254/token",
        "https://[::1]/token", "http://example.com/token", "https://user:pass@example.com/token",
    ],
)  # fmt: skip
async def test_a_realm_at_a_forbidden_place_is_not_asked(
    desk: SourceDesk, registry: Registry, realm: str
) -> None:
    """It is a URL from outside like any other."""
    registry.protect(TOKEN, f'Bearer realm="{realm}"')
    assert (await desk.refused("ollama://tiny")).reason is Reason.SOURCE_NOT_ALLOWED


@pytest.mark.parametrize("answer", [b"", b"{}", b'{"token": "a\\r\\nX: y"}', b"0" * 100_000])
async def test_a_realm_that_gives_no_token_is_refused(
    desk: SourceDesk, registry: Registry, answer: bytes
) -> None:
    """Nothing that comes from it reaches a header unseen."""
    site = registry.site
    registry.protect(TOKEN, f'Bearer realm="{site.url}/token"')
    site.pages["/token"] = Page(answer)
    assert (await desk.refused("ollama://tiny")).reason is Reason.BAD_SOURCE_REPLY
