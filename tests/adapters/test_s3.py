"""``s3://`` alone: signatures, keys, regions, digests of heads, who may not list."""

import asyncio
import base64
import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from modelhostd.adapters import s3
from modelhostd.adapters.credentials import Credentials, Place
from modelhostd.adapters.http_source import HttpSourceConfig
from modelhostd.adapters.s3 import S3
from modelhostd.core.errors import Reason
from modelhostd.core.origins import parse_target
from modelhostd.core.resources import Source
from modelhostd.ports import RemoteFile
from tests.adapters.downloads_support import safetensors
from tests.adapters.loopback_objects import Answer, LoopbackObjects
from tests.adapters.object_desk import FILES, KEY, SECRET, close, desk_for, put
from tests.adapters.source_desk import SourceDesk


@pytest.fixture
def store() -> Iterator[LoopbackObjects]:
    """Buckets that everybody may read."""
    with LoopbackObjects() as store:
        yield store


async def test_the_secret_signs_and_is_never_sent(tmp_path: Path, store: LoopbackObjects) -> None:
    """Each request carries a signature that the store can compute, too."""
    close(store)
    put(store)
    desk = desk_for(tmp_path, store, "s3")
    await desk.fetch("s3://models/tiny")
    assert desk.content() == FILES
    assert {r.status for r in store.requests} <= {200, 206}
    assert SECRET not in str(store.requests)


async def test_a_key_without_its_secret_is_named(tmp_path: Path, store: LoopbackObjects) -> None:
    """A line with one word behind the origin, where two are needed."""
    put(store)
    desk = desk_for(tmp_path, store, "s3", key="")
    error = await desk.refused("s3://models/tiny")
    assert error.reason is Reason.AUTHENTICATION_REQUIRED
    assert "ACCESS_KEY SECRET_KEY" in error.message


async def test_an_exchanged_key_signs_from_then_on(tmp_path: Path, store: LoopbackObjects) -> None:
    """The file of credentials is looked at again, for plans and for URLs."""
    put(store)
    close(store)
    path = tmp_path / "credentials"
    path.touch(mode=0o600)
    path.write_text(f"{store.url} {KEY} {SECRET}\n")
    adapter = S3(HttpSourceConfig(credentials=Credentials([Place(path)])), store.url)
    desk = SourceDesk(tmp_path / "home", adapter)
    await desk.fetch("s3://models/tiny")
    store.secret = "a secret of another length".replace(" ", "-")
    path.write_text(f"{store.url} {KEY} {store.secret}\n")
    await desk.fetch("s3://models/tiny", 2)
    store.put("models/new/model.safetensors", safetensors(10, seed=9))
    await desk.fetch("s3://models/new", 3)
    assert desk.content(2) == FILES


async def test_who_may_not_list_may_still_read_an_object(
    tmp_path: Path, store: LoopbackObjects
) -> None:
    """The head of the one object is asked for instead."""
    weights = safetensors(100)
    store.put("models/m.safetensors", weights)
    store.may_list = False
    desk = desk_for(tmp_path, store, "s3", known=False)
    await desk.fetch("s3://models/m.safetensors")
    assert desk.content() == {"m.safetensors": weights}


async def test_a_bucket_of_another_region_is_asked_there(
    tmp_path: Path, store: LoopbackObjects
) -> None:
    """Once: what was found out is remembered, and signed for."""
    put(store)
    close(store)
    store.region = "eu-central-1"

    def elsewhere(method: str, path: str) -> Answer | None:
        if "list-type" in path and not store.requests:
            return Answer(301, b"<Error/>", {"x-amz-bucket-region": "eu-central-1"})
        return None

    store.answer = elsewhere
    desk = desk_for(tmp_path, store, "s3")
    await desk.fetch("s3://models/tiny")
    assert desk.content() == FILES
    assert [r.status for r in store.requests].count(301) == 1


async def test_two_regions_that_point_at_each_other_end(
    tmp_path: Path, store: LoopbackObjects
) -> None:
    """BAD_SOURCE_REPLY after the second."""
    store.answer = lambda *_: Answer(400, b"", {"x-amz-bucket-region": "mars-1"})
    error = await desk_for(tmp_path, store, "s3").refused("s3://models/tiny")
    assert error.reason is Reason.BAD_SOURCE_REPLY
    assert len(store.requests) == 2


async def test_a_key_that_was_lent_takes_its_session_along(
    tmp_path: Path, store: LoopbackObjects
) -> None:
    """Its token is in every request that is signed with that key, and in none of another."""
    put(store)
    close(store)
    origin = parse_target(store.url, "x").origin
    config = HttpSourceConfig(credentials=Credentials((), {origin: ("KEY", SECRET, KEY)}))
    for user in (KEY, "another"):
        store.requests.clear()
        adapter = S3(config, store.url, lent=(user, "good-for-an-hour"))
        desk = SourceDesk(tmp_path / f"home-{user}", adapter)
        await desk.fetch("s3://models/tiny")
        assert desk.content() == FILES
        told = {"good-for-an-hour" in f"{seen.path} {seen.headers}" for seen in store.requests}
        assert told == {user == KEY}


@pytest.mark.parametrize(
    ("bucket", "region", "place"),
    [
        ("my-bucket", "us-east-1", "https://my-bucket.s3.us-east-1.amazonaws.com/k"),
        ("my-bucket", "eu-central-1", "https://my-bucket.s3.eu-central-1.amazonaws.com/k"),
        ("my.bucket", "eu-central-1", "https://s3.eu-central-1.amazonaws.com/my.bucket/k"),
    ],
)
@pytest.mark.parametrize("known", [True, False])
def test_amazons_buckets_are_asked_at_their_regions_host(
    bucket: str, region: str, place: str, known: bool
) -> None:
    """The one that a certificate is for, and that redirects nowhere."""
    origin = parse_target(s3.PUBLIC_ENDPOINT, "x").origin
    login = {origin: ("KEY", SECRET, KEY)} if known else {}
    adapter = S3(HttpSourceConfig(credentials=Credentials((), login)), region=region)
    source = Source(f"s3://{bucket}/k")
    url = adapter.locate(source, f"{bucket}/k", RemoteFile("k", 1))
    assert url.partition("?")[0] == place
    assert SECRET not in url
    assert (f"%2F{region}%2Fs3%2Faws4_request" in url) == known


async def test_a_sha256_is_known_before_the_first_byte(
    tmp_path: Path, store: LoopbackObjects
) -> None:
    """So a file that is here already is not fetched again."""
    data = safetensors(1_000)
    digest = hashlib.sha256(data).digest()
    told = {"x-amz-checksum-sha256": base64.b64encode(digest).decode()}
    store.put("models/a.safetensors", data, etag='"parts-2"', headers=told)
    store.put("models/b.safetensors", data, etag='"parts-3"', headers=told)
    desk = desk_for(tmp_path, store, "s3", known=False)
    assert (await desk.inspect("s3://models/a.safetensors")).files[0].sha256 == digest.hex()
    await desk.fetch("s3://models/a.safetensors")
    fetched = await desk.fetch("s3://models/b.safetensors", 2)
    assert fetched.reused_bytes == len(data)
    assert not store.seen("GET", "/b.safetensors")


async def test_a_signed_url_that_has_run_out_is_signed_again(
    tmp_path: Path, store: LoopbackObjects
) -> None:
    """The store says 403; the next URL is a fresh one, and nothing is fetched twice."""
    put(store)
    close(store)
    refusals = [1, 1]

    def run_out(method: str, path: str) -> Answer | None:
        if method == "GET" and "X-Amz-Signature" in path and "model.safe" in path and refusals:
            refusals.pop()
            return Answer(403, b"<Error><Code>AccessDenied</Code></Error>")
        return None

    store.answer = run_out
    desk = desk_for(tmp_path, store, "s3")
    await desk.fetch("s3://models/tiny")
    assert desk.content() == FILES
    assert not refusals


@pytest.mark.parametrize("known", [True, False])
async def test_what_others_configured_for_amazon_is_not_looked_at(
    tmp_path: Path, store: LoopbackObjects, monkeypatch: pytest.MonkeyPatch, known: bool
) -> None:
    """Neither profiles nor keys nor endpoints nor proxies of the environment: the operator names his."""
    put(store)
    if known:
        close(store)
    (tmp_path / ".aws").mkdir()
    for name in ("config", "credentials"):
        (tmp_path / ".aws" / name).write_text(
            "[default]\naws_access_key_id = FILE\naws_secret_access_key = file\nregion = mars-1\n"
            "endpoint_url = http://127.0.0.1:9\ns3 =\n  addressing_style = virtual\n"
        )
    for variable, value in {
        "HOME": str(tmp_path),
        "AWS_PROFILE": "nobody",
        "AWS_ACCESS_KEY_ID": "ENV",
        "AWS_SECRET_ACCESS_KEY": "env",
        "AWS_SESSION_TOKEN": "env",
        "AWS_ENDPOINT_URL": "http://127.0.0.1:9",
        "AWS_ENDPOINT_URL_S3": "http://127.0.0.1:9",
        "AWS_DEFAULT_REGION": "mars-1",
        "HTTP_PROXY": "http://127.0.0.1:9",
    }.items():
        monkeypatch.setenv(variable, value)
    desk = desk_for(tmp_path, store, "s3", known=known)
    await desk.fetch("s3://models/tiny")
    assert desk.content() == FILES
    assert not [
        r for r in store.requests if "mars" in str(r) or "ENV" in str(r) or "FILE" in str(r)
    ]
    amazon = S3(HttpSourceConfig())
    source, file = Source("s3://my-bucket/k"), RemoteFile("k", 1)
    url = await asyncio.to_thread(amazon.locate, source, "my-bucket/k", file)
    assert url == "https://my-bucket.s3.us-east-1.amazonaws.com/k"
