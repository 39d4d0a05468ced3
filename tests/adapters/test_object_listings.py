"""Listings of ``s3://`` and ``gs://`` that no store would send: refused with a reason, nothing anywhere."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from modelhostd.core.errors import Reason
from tests.adapters.loopback_objects import Answer, LoopbackObjects
from tests.adapters.object_desk import desk_for


@pytest.fixture
def store() -> Iterator[LoopbackObjects]:
    """Return a store that says what it is told to say."""
    with LoopbackObjects() as store:
        yield store


WAY_OUT = b"""<ListBucketResult><Contents><Key>tiny/../../x.safetensors</Key><Size>1</Size>
<ETag>"x"</ETag></Contents></ListBucketResult>"""
ENDLESS = b"""<ListBucketResult><IsTruncated>true</IsTruncated>
<NextContinuationToken>x</NextContinuationToken></ListBucketResult>"""
# Each entity is ten of the one before it.
ENTITIES = (
    b"<!DOCTYPE a [<!ENTITY e0 'aaaaaaaaaa'>%s]><ListBucketResult>&e9;</ListBucketResult>"
    % (b"".join(b"<!ENTITY e%d '%s'>" % (n, b"&e%d;" % (n - 1) * 10) for n in range(1, 10)))
)
HOSTILE = {
    "no-xml": (b"{}", Reason.BAD_SOURCE_REPLY),
    "cut-off": (b"<ListBucketResult><Contents><Key>a", Reason.BAD_SOURCE_REPLY),
    "no-size": (
        b"<ListBucketResult><Contents><Key>tiny/a.txt</Key></Contents></ListBucketResult>",
        Reason.BAD_SOURCE_REPLY,
    ),
    "way-out": (WAY_OUT, Reason.UNSAFE_FILE),
    "entities": (ENTITIES, Reason.BAD_SOURCE_REPLY),
    "endless": (ENDLESS, Reason.BAD_SOURCE_REPLY),
    "too-long": (b" " * (17 << 20), Reason.BAD_SOURCE_REPLY),
}


@pytest.mark.parametrize("name", HOSTILE)
async def test_a_hostile_listing_of_s3_is_refused(
    tmp_path: Path, store: LoopbackObjects, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its reason, without a file anywhere."""
    monkeypatch.setattr("modelhostd.adapters.objects.REQUESTS_MAX", 20)
    body, reason = HOSTILE[name]
    store.answer = lambda *_: Answer(200, body, {"Content-Type": "text/xml"})
    error = await desk_for(tmp_path, store, "s3", known=False).refused("s3://models/tiny")
    assert error.reason is reason


def item(**told: object) -> bytes:
    """Return a listing of Google's with one object."""
    one = {"name": "tiny/a.safetensors", "size": "3", "generation": "1", **told}
    return json.dumps({"kind": "storage#objects", "items": [one]}).encode()


HOSTILE_JSON = {
    "no-json": (b"<x>", Reason.BAD_SOURCE_REPLY),
    "a-list": (b"[]", Reason.BAD_SOURCE_REPLY),
    "nested": (b"[" * 100_000, Reason.BAD_SOURCE_REPLY),
    "a-name-of-another-kind": (item(name=7), Reason.SOURCE_NOT_FOUND),
    "no-number": (item(size="many"), Reason.BAD_SOURCE_REPLY),
    "negative": (item(size="-1"), Reason.BAD_SOURCE_REPLY),
    "huge": (item(size="9" * 30), Reason.BAD_SOURCE_REPLY),
    "no-generation": (item(generation="x&alt=json"), Reason.BAD_SOURCE_REPLY),
    "way-out": (item(name="tiny/../a.safetensors"), Reason.UNSAFE_FILE),
    "endless": (
        json.dumps({"kind": "storage#objects", "nextPageToken": "x"}).encode(),
        Reason.BAD_SOURCE_REPLY,
    ),
}


@pytest.mark.parametrize("name", HOSTILE_JSON)
async def test_a_hostile_listing_of_google_is_refused(
    tmp_path: Path, store: LoopbackObjects, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its reason, without a file anywhere."""
    monkeypatch.setattr("modelhostd.adapters.objects.REQUESTS_MAX", 20)
    body, reason = HOSTILE_JSON[name]
    store.answer = lambda *_: Answer(200, body, {"Content-Type": "application/json"})
    error = await desk_for(tmp_path, store, "gs", known=False).refused("gs://models/tiny")
    assert error.reason is reason
