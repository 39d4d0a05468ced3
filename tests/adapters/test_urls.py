"""``https://`` sources against servers of every habit: names, checksums, lists, lengths, tokens."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from modelhostd.adapters import urls
from modelhostd.adapters.credentials import ACCEPTED, REFUSED, Credentials, Place
from modelhostd.adapters.http_source import HttpSourceConfig
from modelhostd.adapters.source import TransferConfig
from modelhostd.adapters.urls import Urls
from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.origins import OriginPolicy, parse_target
from modelhostd.core.sources import parse_source
from tests.adapters.downloads_support import PATIENT, safetensors, tiny
from tests.adapters.loopback_site import LoopbackSite, Page
from tests.adapters.source_desk import SourceDesk

WEIGHTS = safetensors(50_000)
TOKEN = "url_canary_0123456789"


def hexed(kind: str, data: bytes) -> str:
    """Return a checksum as a URL's fragment has it."""
    return f"#{kind}={hashlib.new(kind, data).hexdigest()}"


@pytest.fixture
def site() -> Iterator[LoopbackSite]:
    """A web server with one file."""
    with LoopbackSite() as site:
        site.pages["/m/tiny.safetensors"] = Page(WEIGHTS)
        yield site


@pytest.fixture
def credentials(tmp_path: Path, site: LoopbackSite) -> Credentials:
    """A token for the home of the site, from a file."""
    file = tmp_path / "credentials"
    file.write_text(f"{site.url} {TOKEN}\n")
    file.chmod(0o600)
    return Credentials([Place(file)])


@pytest.fixture
def desk(tmp_path: Path, site: LoopbackSite, credentials: Credentials) -> SourceDesk:
    """A home that may ask it."""
    policy = OriginPolicy().with_endpoints(site.url)
    config = HttpSourceConfig(policy, credentials, TransferConfig(retry=PATIENT))
    return SourceDesk(tmp_path / "home", Urls(config))


async def test_one_file_is_a_model_of_one_file(desk: SourceDesk, site: LoopbackSite) -> None:
    """It keeps its name, and a change of it is another revision."""
    fetched = await desk.fetch(f"{site.url}/m/tiny.safetensors")
    assert desk.content() == {"tiny.safetensors": WEIGHTS}
    assert fetched.files[0].sha256 == hashlib.sha256(WEIGHTS).hexdigest()
    site.pages["/m/tiny.safetensors"].data = safetensors(50_000, seed=1)
    assert (await desk.inspect(f"{site.url}/m/tiny.safetensors")).revision != fetched.facts.revision


@pytest.mark.parametrize("kind", ["sha256", "sha1", "md5"])
async def test_a_checksum_in_the_url_is_held_against_what_comes(
    desk: SourceDesk, site: LoopbackSite, kind: str
) -> None:
    """The right one passes; another ends in quarantine with both named."""
    url = f"{site.url}/m/tiny.safetensors"
    error = await desk.refused(url + hexed(kind, b"other"))
    assert error.reason is Reason.CHECKSUM_MISMATCH
    assert error.metadata["expected"] == hashlib.new(kind, b"other").hexdigest()
    assert error.metadata["actual"] == hashlib.new(kind, WEIGHTS).hexdigest()
    await desk.fetch(url + hexed(kind, WEIGHTS))
    assert desk.content() == {"tiny.safetensors": WEIGHTS}


@pytest.mark.parametrize(("name", "kind"), [("SHA1SUMS", "sha1"), ("md5sum.txt", "md5")])
async def test_lists_of_other_digests_are_held_too(
    desk: SourceDesk, site: LoopbackSite, name: str, kind: str
) -> None:
    """Every file of the list, and the list itself where the URL names its checksum."""
    files = tiny()
    lines = "".join(f"{hashlib.new(kind, d).hexdigest()}  {p}\n" for p, d in files.items())
    site.pages[f"/l/{name}"] = Page(lines.encode())
    site.pages |= {f"/l/{path}": Page(data) for path, data in files.items()}
    await desk.fetch(f"{site.url}/l/{name}{hexed('sha256', lines.encode())}")
    assert desk.content() == files
    error = await desk.refused(f"{site.url}/l/{name}{hexed('sha256', b'other')}", version=2)
    assert error.reason is Reason.BAD_SOURCE_REPLY
    site.pages["/l/config.json"].data = b"{ }"
    error = await desk.refused(f"{site.url}/l/{name}", version=2)
    assert error.reason is Reason.CHECKSUM_MISMATCH


async def test_the_first_file_of_a_list_that_is_missing_ends_it(
    desk: SourceDesk, site: LoopbackSite
) -> None:
    """The others are not asked for one by one."""
    names = [f"{number}.json" for number in range(500)]
    lines = "".join(f"{'0' * 64}  {name}\n" for name in ["a.safetensors", *names])
    site.pages["/l/SHA256SUMS"] = Page(lines.encode())
    error = await desk.refused(f"{site.url}/l/SHA256SUMS")
    assert error.reason is Reason.SOURCE_NOT_FOUND
    assert len(site.requests) < 50


@pytest.mark.parametrize(
    "lines",
    [
        b"<html>please log in</html>", b"\xff\xfe", b"", f"{'0' * 64}  ../../etc/passwd".encode(),
        f"{'0' * 64}  /etc/passwd".encode(), f"{'0' * 64}  a\\b".encode(),
        f"{'0' * 64}  A.json\n{'0' * 64}  a.json\n{'0' * 64}  m.safetensors".encode(),
        b"0" * 2_000_000,
    ],
    ids=[str(number) for number in range(8)],
)  # fmt: skip
async def test_a_hostile_list_is_refused(
    desk: SourceDesk, site: LoopbackSite, lines: bytes
) -> None:
    """Before any of its files is asked for."""
    site.pages["/l/SHA256SUMS"] = Page(lines)
    error = await desk.refused(f"{site.url}/l/SHA256SUMS")
    assert error.reason in {Reason.BAD_SOURCE_REPLY, Reason.UNSAFE_FILE}
    assert site.url in error.message
    assert {seen.path for seen in site.requests} == {"/l/SHA256SUMS"}


async def test_a_name_may_come_from_the_server(desk: SourceDesk, site: LoopbackSite) -> None:
    """Where the URL's own names nothing that loads; never more than a name."""
    disposition = 'attachment; filename="../../tiny.safetensors"'
    site.pages["/api/7?v=1"] = Page(WEIGHTS, headers={"Content-Disposition": disposition})
    await desk.fetch(f"{site.url}/api/7?v=1")
    assert desk.content() == {"tiny.safetensors": WEIGHTS}


@pytest.mark.parametrize("name", ["..", "a\\..", "\u202egpj.bin", "CON", "x" * 300])
async def test_an_unsafe_name_from_the_server_is_refused(
    desk: SourceDesk, site: LoopbackSite, name: str
) -> None:
    """Like any other."""
    encoded = "".join(f"%{byte:02X}" for byte in name.encode())
    disposition = f"attachment; filename*=UTF-8''{encoded}"
    site.pages["/api"] = Page(WEIGHTS, headers={"Content-Disposition": disposition})
    assert (await desk.refused(f"{site.url}/api")).reason in {
        Reason.UNSAFE_FILE,
        Reason.SOURCE_NOT_FOUND,
    }


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("length", [True, False])
@pytest.mark.parametrize("etag", [None, "", 'W/"weak"'])
async def test_servers_of_every_habit(
    desk: SourceDesk, site: LoopbackSite, ranges: bool, length: bool, etag: str | None
) -> None:
    """With and without ranges, lengths and strong validators: the file comes whole."""
    site.pages["/a.safetensors"] = Page(
        WEIGHTS, ranges=ranges, length=length, etag=etag, modified=True
    )
    await desk.fetch(f"{site.url}/a.safetensors")
    assert desk.content() == {"a.safetensors": WEIGHTS}
    assert desk.reports[-1].total_bytes == len(WEIGHTS)


async def test_an_empty_file_is_one(desk: SourceDesk, site: LoopbackSite) -> None:
    """A server refuses its first byte, and says that there is none."""
    digest = hashlib.sha256(b"").hexdigest()
    site.pages["/l/SHA256SUMS"] = Page(
        f"{digest}  empty.txt\n{hashlib.sha256(WEIGHTS).hexdigest()}  a.safetensors".encode()
    )
    site.pages |= {"/l/empty.txt": Page(b""), "/l/a.safetensors": Page(WEIGHTS)}
    await desk.fetch(f"{site.url}/l/SHA256SUMS")
    assert desk.content() == {"a.safetensors": WEIGHTS, "empty.txt": b""}


async def test_a_body_without_end_is_not_measured_for_ever(
    desk: SourceDesk, site: LoopbackSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that does not say how long a file is may send so much, and no more."""
    monkeypatch.setattr(urls, "MEASURED_BYTES_MAX", 10_000)
    site.pages["/a.safetensors"] = Page(WEIGHTS, ranges=False, length=False)
    error = await desk.refused(f"{site.url}/a.safetensors")
    assert error.reason is Reason.BAD_SOURCE_REPLY
    assert "how long" in error.message


async def test_a_file_that_changes_under_way_is_not_taken(
    desk: SourceDesk, site: LoopbackSite
) -> None:
    """Without a digest the validator tells; the next download takes the new one."""
    pages = iter([site.pages["/m/tiny.safetensors"]])
    other = Page(safetensors(50_000, seed=1))
    site.answer = lambda _where, _path: next(pages, other)
    error = await desk.refused(f"{site.url}/m/tiny.safetensors")
    assert error.reason is Reason.BAD_SOURCE_REPLY
    assert "changed" in error.message
    await desk.fetch(f"{site.url}/m/tiny.safetensors")
    assert desk.content() == {"tiny.safetensors": other.data}


async def test_the_token_is_for_its_origin_alone(
    desk: SourceDesk, site: LoopbackSite, credentials: Credentials
) -> None:
    """The home wants it and sends the request on to a CDN, which never sees it."""
    site.cdn_pages["/signed"] = Page(WEIGHTS)
    moved = {"Location": f"{site.cdn}/signed"}
    site.pages["/p/a.safetensors"] = Page(b"", 302, moved, token=f"Bearer {TOKEN}", etag="")
    await desk.fetch(f"{site.url}/p/a.safetensors")
    assert {one.headers.get("authorization") for one in site.seen("home")} == {f"Bearer {TOKEN}"}
    assert {one.headers.get("authorization") for one in site.seen("cdn")} == {None}
    assert [known.state for known in credentials.known()] == [ACCEPTED]
    site.pages["/p/a.safetensors"].token = "Bearer another"
    error = await desk.refused(f"{site.url}/p/a.safetensors", version=2)
    assert error.reason is Reason.AUTHENTICATION_REQUIRED
    assert [known.state for known in credentials.known()] == [REFUSED]
    assert TOKEN not in error.message + str(error.metadata)


async def test_a_user_with_a_password_may_log_in(tmp_path: Path, site: LoopbackSite) -> None:
    """Basic authentication, as web servers of one's own have it."""
    file = tmp_path / "users"
    file.write_text(f"{site.url} ada secret\n")
    file.chmod(0o600)
    page = site.pages["/m/tiny.safetensors"]
    page.token = "Basic YWRhOnNlY3JldA=="
    policy = OriginPolicy().with_endpoints(site.url)
    desk = SourceDesk(tmp_path / "home", Urls(HttpSourceConfig(policy, Credentials([Place(file)]))))
    await desk.fetch(f"{site.url}/m/tiny.safetensors")
    assert desk.content() == {"tiny.safetensors": WEIGHTS}


async def test_plain_http_is_for_hosts_that_the_operator_named(
    tmp_path: Path, site: LoopbackSite
) -> None:
    """Refused before a name is looked up, with the setting."""
    desk = SourceDesk(tmp_path / "home", Urls(HttpSourceConfig()))
    error = await desk.refused(f"{site.url}/m/tiny.safetensors")
    assert error.reason is Reason.SOURCE_NOT_ALLOWED
    assert error.metadata["setting"] == "downloads.http_hosts"
    assert site.requests == []


async def test_pickles_are_refused_before_the_first_byte(
    desk: SourceDesk, site: LoopbackSite
) -> None:
    """One that is named outright too; by its content under another name."""
    site.pages["/a.bin"] = Page(b"\x80\x04N." * 100)
    assert (await desk.refused(f"{site.url}/a.bin")).reason is Reason.UNSAFE_FILE
    assert [one.headers["range"] for one in site.requests] == ["bytes=0-0"]
    site.pages["/a.gguf"] = Page(b"\x80\x04N." * 100)
    assert (await desk.refused(f"{site.url}/a.gguf")).reason is Reason.UNSAFE_FILE


def test_origins_of_credentials_are_exact(credentials: Credentials, site: LoopbackSite) -> None:
    """Scheme, host and port; the CDN of the same host is another."""
    assert credentials.for_origin(parse_target(site.cdn, "x").origin) is None
    assert credentials.for_origin(parse_target(site.url, "x").origin) is not None


async def test_several_urls_are_one_model(desk: SourceDesk, site: LoopbackSite) -> None:
    """Each file under the last segment of its URL, held against its own checksum, in a revision of all."""
    shard = safetensors(3_000, seed=7)
    site.pages["/p/config.json?v=2"] = Page(b"{}")
    site.cdn_pages["/q/b.safetensors"] = Page(shard)
    site.pages["/p/a.safetensors"] = Page(WEIGHTS)
    digest = hashlib.sha256(shard).hexdigest()
    first = f"{site.url}/p/a.safetensors"
    more = (f"{site.cdn}/q/b.safetensors#sha256={digest}", f"{site.url}/p/config.json?v=2")
    source = parse_source(first, more_uris=more)
    facts = await desk.downloads.inspect(source)
    assert {file.path: file.sha256 for file in facts.files} == {
        "a.safetensors": "",
        "b.safetensors": digest,
        "config.json": "",
    }
    await desk.fetch(source)
    whole = {"a.safetensors": WEIGHTS, "b.safetensors": shard, "config.json": b"{}"}
    assert desk.content() == whole
    site.pages["/p/config.json?v=2"] = Page(b"{ }")
    assert (await desk.fetch(source, 2)).facts.revision != facts.revision
    assert desk.content(2) == whole | {"config.json": b"{ }"}


async def test_a_wrong_checksum_of_one_of_several_urls_refuses_all(
    desk: SourceDesk, site: LoopbackSite
) -> None:
    """Nothing of them is visible."""
    site.pages["/a.safetensors"] = site.pages["/b.safetensors"] = Page(WEIGHTS)
    second = f"{site.url}/b.safetensors#sha256={'0' * 64}"
    source = parse_source(f"{site.url}/a.safetensors", more_uris=[second])
    with pytest.raises(ModelhostError) as caught:
        await desk.fetch(source)
    assert caught.value.reason is Reason.CHECKSUM_MISMATCH
    assert not list(desk.home.glob("models/*/*"))


@pytest.mark.parametrize("second", ["/q/a.safetensors", "/q/A.safetensors", "/q/%61.safetensors"])
async def test_two_urls_of_one_name_are_refused(
    desk: SourceDesk, site: LoopbackSite, second: str
) -> None:
    """Also where they differ by case alone, before a byte is asked for."""
    source = parse_source(f"{site.url}/p/a.safetensors", more_uris=[site.url + second])
    with pytest.raises(ModelhostError) as caught:
        await desk.fetch(source)
    assert caught.value.reason is Reason.UNSAFE_FILE
    assert site.requests == []


@pytest.mark.parametrize(("hops", "reason"), [(5, None), (6, Reason.BAD_SOURCE_REPLY)])
async def test_five_redirects_are_followed_and_no_more(
    desk: SourceDesk, site: LoopbackSite, hops: int, reason: Reason | None
) -> None:
    """One that leads on after the fifth is a loop, or might as well be one."""
    for hop in range(hops):
        name = "a.safetensors" if hop == 0 else f"hop/{hop}"
        there = f"/hop/{hop + 1}" if hop + 1 < hops else "/end"
        site.pages[f"/{name}"] = Page(b"", 302, {"Location": there}, etag="")
    site.pages["/end"] = Page(WEIGHTS)
    if reason is None:
        await desk.fetch(f"{site.url}/a.safetensors")
        assert desk.content() == {"a.safetensors": WEIGHTS}
    else:
        assert (await desk.refused(f"{site.url}/a.safetensors")).reason is reason
        assert site.seen("home", "/end") == []


async def test_every_request_asks_for_bytes_as_they_are(
    desk: SourceDesk, site: LoopbackSite
) -> None:
    """No coding: its size would not be the file's."""
    site.pages["/a.safetensors"] = Page(WEIGHTS)
    await desk.fetch(f"{site.url}/a.safetensors")
    assert {one.headers.get("accept-encoding") for one in site.requests} == {"identity"}


async def test_the_revision_is_of_the_content_where_that_is_known(
    desk: SourceDesk, site: LoopbackSite
) -> None:
    """Another ETag is another revision of a file without a checksum, and none of one with it."""
    known = f"{site.url}/a.safetensors{hexed('sha256', WEIGHTS)}"
    unknown = f"{site.url}/a.safetensors"
    revisions = []
    for etag in ('"one"', '"two"'):
        site.pages["/a.safetensors"] = Page(WEIGHTS, etag=etag)
        revisions.append([(await desk.inspect(uri)).revision for uri in (known, unknown)])
    assert revisions[0][0] == revisions[1][0]
    assert revisions[0][1] != revisions[1][1]
