"""What a hostile object store answers: listings and heads, changed and damaged; refused in type, or safe."""

import base64
import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from modelhostd.adapters.cancel import Canceller
from modelhostd.adapters.gs import GoogleStorage
from modelhostd.adapters.http_source import HttpSourceConfig
from modelhostd.adapters.s3 import S3
from modelhostd.adapters.wire import Transient
from modelhostd.core.errors import ModelhostError
from modelhostd.core.object_facts import gs_digest, s3_digest
from modelhostd.core.paths import path_fault
from modelhostd.core.resources import Source
from tests.adapters.loopback_objects import Answer, LoopbackObjects
from tests.hostile.json_values import changed, encoded, values
from tests.hostile.messages import mutated
from tests.hostile.profile import examples

MD5 = base64.b64encode(b"m" * 16).decode()
ITEM = {"name": "tiny/a.safetensors", "size": "3", "generation": "1", "md5Hash": MD5}
PAGE = {"kind": "storage#objects", "items": [ITEM, {**ITEM, "name": "tiny/config.json"}]}
HEAD = {
    "ETag": '"' + "a" * 32 + '"',
    "ChecksumSHA256": base64.b64encode(b"s" * 32).decode(),
    "ChecksumType": "FULL_OBJECT",
    "ServerSideEncryption": "AES256",
}
XML = b"""<ListBucketResult><Name>b</Name><IsTruncated>false</IsTruncated><KeyCount>1</KeyCount>
<Contents><Key>tiny/a.safetensors</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>
<ETag>"x"</ETag><Size>3</Size><StorageClass>STANDARD</StorageClass></Contents></ListBucketResult>"""
NAMES = st.sampled_from(["x-amz-checksum-sha256", "x-amz-checksum-type", "ETag", "Content-Range"])


@pytest.fixture(scope="module")
def store() -> Iterator[LoopbackObjects]:
    """Return a store that says what it is told to say."""
    with LoopbackObjects() as running:
        yield running


@pytest.fixture(scope="module")
def s3(store: LoopbackObjects) -> S3:
    """Return one adapter for all examples: its first question takes as long as thirty others."""
    return S3(HttpSourceConfig(), store.url)


def quiet(count: int) -> settings:
    """Return settings for examples that share a server."""
    return settings(
        max_examples=examples(count), database=None, suppress_health_check=list(HealthCheck)
    )


def plan(adapter: S3 | GoogleStorage, uri: str) -> Any:
    """Return the plan of a source if it is safe; None where it is refused in type."""
    source, canceller = Source(uri), Canceller()
    connections = adapter.connections(canceller, source)
    try:
        made = adapter.plan(connections, source)
    except (ModelhostError, Transient):
        return None
    finally:
        connections.close()
        canceller.cancel()
    for file in made.files:
        assert not path_fault(file.path)
        assert 0 <= file.size_bytes < 1 << 50
        assert len(file.sha256) in (0, 64)
        assert file.validator.isprintable()
    return made


@quiet(150)
@given(encoded(PAGE, mutated))
@example(json.dumps(PAGE).encode())
@example(b"[" * 50_000)
def test_any_listing_of_google_is_safe_or_refused(store: LoopbackObjects, page: bytes) -> None:
    """Names, sizes, generations and digests of any kind."""
    ends = [page]
    # A listing that says that there is more is given more once.
    store.answer = lambda *_: Answer(200, ends.pop() if ends else b'{"kind": "storage#objects"}')
    plan(GoogleStorage(HttpSourceConfig(), store.url), "gs://bucket/tiny")


@quiet(40)
@given(
    st.just(XML).flatmap(mutated) | st.binary(max_size=300),
    st.dictionaries(NAMES, st.text('abcxyz0123456789=/+-"', max_size=60), max_size=3),
    st.sampled_from([200, 200, 206, 204, 301, 400, 403, 404, 416, 503]),
)
@example(XML, {}, 200)
def test_any_listing_and_head_of_s3_is_safe_or_refused(
    store: LoopbackObjects, s3: S3, page: bytes, head: dict[str, str], status: int
) -> None:
    """Keys, sizes, ETags and checksums of any kind."""
    pages = [page]

    def answer(method: str, path: str) -> Answer:
        if method == "GET" and "list-type" in path:
            return Answer(200, pages.pop() if pages else b"<ListBucketResult/>")
        return Answer(status, b"abc", head)

    store.answer = answer
    plan(s3, "s3://bucket/tiny")


@given(changed(HEAD), changed(ITEM), values)
def test_what_a_store_tells_is_a_digest_or_nothing(head: Any, item: Any, other: Any) -> None:
    """Whatever stands where a checksum should."""
    for told in (head, {**HEAD, "ChecksumSHA256": other}):
        if isinstance(told, dict):
            kind, _, digits = s3_digest(told, "bucket").partition(":")
            assert (kind, len(digits)) in {("sha256", 64), ("sha1", 40), ("md5", 32), ("", 0)}
    for told in (item, {"md5Hash": other}):
        if isinstance(told, dict):
            assert len(gs_digest(told)) in {0, len("md5:") + 32, len("crc32c:") + 8}


def test_the_good_answers_are_good(store: LoopbackObjects, s3: S3) -> None:
    """The fuzzing begins from what works."""
    store.answer = lambda *_: Answer(200, json.dumps(PAGE).encode())
    made = plan(GoogleStorage(HttpSourceConfig(), store.url), "gs://bucket/tiny")
    assert {file.checksum for file in made.files} == {"md5:" + b"m".hex() * 16}
    store.answer = lambda method, _: (
        Answer(200, XML) if method == "GET" else Answer(200, b"abc", {"ETag": '"x"'})
    )
    made = plan(s3, "s3://bucket/tiny")
    assert [file.validator for file in made.files] == ['"x"']
