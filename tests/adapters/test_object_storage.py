"""``s3://`` and ``gs://`` against stores on loopback: keys, signatures, digests, regions, hostile answers."""

import base64
import hashlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import google_crc32c
import pytest

from modelhostd.adapters.gs import GoogleStorage
from modelhostd.adapters.http_source import HttpSourceConfig
from modelhostd.adapters.objects import ObjectStore
from modelhostd.adapters.s3 import S3
from modelhostd.adapters.source import TransferConfig
from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.resources import Source
from tests.adapters.downloads_support import PATIENT, safetensors
from tests.adapters.loopback_objects import Answer, LoopbackObjects
from tests.adapters.object_desk import FILES, SECRET, TOKEN, close, desk_for, put
from tests.adapters.source_desk import SourceDesk

Refused = Callable[[str], ModelhostError]


@pytest.fixture
def store() -> Iterator[LoopbackObjects]:
    """Buckets that everybody may read."""
    with LoopbackObjects() as store:
        yield store


SCHEMES = pytest.mark.parametrize("scheme", ["s3", "gs"])


@SCHEMES
async def test_strangers_read_what_is_public(
    tmp_path: Path, store: LoopbackObjects, scheme: str
) -> None:
    """Without a credential nothing is signed, and no other place is looked at for one."""
    put(store)
    desk = desk_for(tmp_path, store, scheme, known=False)
    await desk.fetch(f"{scheme}://models/tiny")
    assert desk.content() == FILES
    assert not [r for r in store.requests if "authorization" in r.headers or "X-Amz" in r.path]


@SCHEMES
async def test_one_object_is_a_model_of_one_file(
    tmp_path: Path, store: LoopbackObjects, scheme: str
) -> None:
    """Also where a folder in it has a file of the folder's own name."""
    close(store)
    desk = desk_for(tmp_path, store, scheme)
    weights = safetensors(5_000)
    store.put("models/m.safetensors", weights)
    store.put("models/x/x/x.safetensors", weights)
    store.put("models/x/x.safetensors", weights + b"")
    await desk.fetch(f"{scheme}://models/m.safetensors")
    assert desk.content() == {"m.safetensors": weights}
    await desk.fetch(f"{scheme}://models/x", 2)
    assert desk.content(2) == {"x/x.safetensors": weights, "x.safetensors": weights}


@SCHEMES
async def test_names_of_every_kind_are_asked_for_as_they_are(
    tmp_path: Path, store: LoopbackObjects, scheme: str
) -> None:
    """Spaces, plus signs, per cent signs and other scripts: in listings, heads and signed URLs."""
    close(store)
    names = ["a b.txt", "a+b.txt", "50%25.txt", "ä/ö.txt", "q?x=1&y=#z.txt", "~tilde(1)'.txt"]
    files = {name: name.encode() for name in names} | {"model.safetensors": safetensors(10)}
    for name, data in files.items():
        store.put(f"models/odd {name[:1]}/{name}", data)
        store.put(f"models/odd names/{name}", data)
    desk = desk_for(tmp_path, store, scheme)
    await desk.fetch(Source(f"{scheme}://models/odd%20names", "", ("*",)))
    assert desk.content() == files


@pytest.mark.parametrize(("scheme", "state"), [("s3", "REFUSED"), ("gs", "REFUSED")])
async def test_a_refused_credential_is_said_and_not_shown(
    tmp_path: Path, store: LoopbackObjects, scheme: str, state: str
) -> None:
    """AUTHENTICATION_REQUIRED, for a wrong key and for a token that has run out."""
    put(store)
    store.secret, store.token = "another", "another"
    desk = desk_for(tmp_path, store, scheme)
    error = await desk.refused(f"{scheme}://models/tiny")
    assert error.reason is Reason.AUTHENTICATION_REQUIRED
    assert SECRET not in repr(vars(error))
    assert TOKEN not in repr(vars(error))
    adapter = desk.downloads._adapters[scheme]
    assert isinstance(adapter, ObjectStore)
    assert [known.state for known in adapter.config.credentials.known()] == [state]


@SCHEMES
async def test_another_content_than_the_store_tells_is_refused(
    tmp_path: Path, store: LoopbackObjects, scheme: str
) -> None:
    """By the MD5 that both tell of what was uploaded in one piece."""
    data = safetensors(1_000)
    wrong = hashlib.md5(b"x").digest()
    facts = {"md5Hash": base64.b64encode(wrong).decode()}
    store.put("models/m.safetensors", data, etag=f'"{wrong.hex()}"', facts=facts)
    error = await desk_for(tmp_path, store, scheme).refused(f"{scheme}://models/m.safetensors")
    assert error.reason is Reason.CHECKSUM_MISMATCH
    assert error.metadata["expected"] == wrong.hex()


@pytest.mark.parametrize("right", [True, False])
async def test_an_object_made_of_parts_is_held_against_its_crc32c(
    tmp_path: Path, store: LoopbackObjects, right: bool
) -> None:
    """Google tells no other digest of it."""
    data = safetensors(300_000)
    crc = google_crc32c.value(data).to_bytes(4, "big") if right else b"\1\2\3\4"
    store.put("models/m.safetensors", data)
    store.objects["models/m.safetensors"].facts = {"crc32c": base64.b64encode(crc).decode()}
    desk = desk_for(tmp_path, store, "gs", known=False)
    if right:
        await desk.fetch("gs://models/m.safetensors")
        assert desk.content() == {"m.safetensors": data}
    else:
        error = await desk.refused("gs://models/m.safetensors")
        assert error.reason is Reason.CHECKSUM_MISMATCH
        assert error.metadata["expected"] == "01020304"


@SCHEMES
async def test_what_is_uploaded_again_is_no_new_revision(
    tmp_path: Path, store: LoopbackObjects, scheme: str
) -> None:
    """The same bytes under another generation; other bytes are one."""
    desk, uri = desk_for(tmp_path, store, scheme, known=False), f"{scheme}://models/tiny"
    put(store)
    first = (await desk.inspect(uri)).revision
    put(store)
    assert (await desk.inspect(uri)).revision == first
    store.put("models/tiny/config.json", b"{ }")
    assert (await desk.inspect(uri)).revision != first


@SCHEMES
async def test_an_object_that_is_overwritten_meanwhile_is_not_mixed(
    tmp_path: Path, store: LoopbackObjects, scheme: str
) -> None:
    """By the ETag where there is no digest; by the generation, which is gone then."""
    name = "models/m.safetensors"
    store.put(name, safetensors(1_000), etag='"one-1"')
    store.objects[name].facts.clear()

    def overwrite() -> None:
        if store.seen("HEAD") or scheme == "gs":
            store.put(name, safetensors(1_000, seed=2), etag='"two-1"')

    store.answer = lambda method, path: (
        overwrite() if method == "GET" and "list" not in path and "alt=media" in path else None
    )
    if scheme == "s3":
        store.answer = lambda method, path: (
            overwrite() if method == "GET" and "m.safetensors" in path else None
        )
    error = await desk_for(tmp_path, store, scheme, known=False).refused(f"{scheme}://{name}")
    assert error.reason in {Reason.BAD_SOURCE_REPLY, Reason.SOURCE_NOT_FOUND}


@SCHEMES
async def test_a_listing_is_not_looked_for_elsewhere(
    tmp_path: Path, store: LoopbackObjects, scheme: str
) -> None:
    """A redirect is no answer: neither signature nor token goes along."""
    close(store)
    with LoopbackObjects() as other:
        store.answer = lambda _, path: Answer(307, b"", {"Location": f"{other.url}{path}"})
        error = await desk_for(tmp_path, store, scheme).refused(f"{scheme}://models/tiny")
        assert error.reason is Reason.BAD_SOURCE_REPLY
        assert other.requests == []


@SCHEMES
async def test_a_token_does_not_follow_a_redirect_of_the_bytes(
    tmp_path: Path, store: LoopbackObjects, scheme: str
) -> None:
    """The bytes may come from elsewhere, without the credential, and are held against the plan."""
    close(store)
    put(store)
    with LoopbackObjects() as other:
        put(other)
        wanted = "alt=media" if scheme == "gs" else "X-Amz-Signature"

        def moved(_: str, path: str) -> Answer | None:
            there = path if scheme == "gs" else path.partition("?")[0]
            return Answer(302, b"", {"Location": other.url + there}) if wanted in path else None

        store.answer = moved
        desk = desk_for(tmp_path, store, scheme)
        await desk.fetch(f"{scheme}://models/tiny")
        assert desk.content() == FILES
        assert other.requests
        assert not [r for r in other.requests if "authorization" in r.headers]


@SCHEMES
@pytest.mark.parametrize("endpoint", ["https://127.0.0.1:9", "https://169.254.169.254"])
async def test_the_policy_of_hosts_holds_for_the_library(
    tmp_path: Path, scheme: str, endpoint: str
) -> None:
    """What the library asks goes through the same judgement as every other request."""
    kind: type[S3 | GoogleStorage] = S3 if scheme == "s3" else GoogleStorage
    adapter = kind(HttpSourceConfig(transfer=TransferConfig(retry=PATIENT)), endpoint)
    adapter._policy = adapter.config.policy
    error = await SourceDesk(tmp_path, adapter).refused(f"{scheme}://models/tiny")
    assert error.reason is Reason.SOURCE_NOT_ALLOWED
    assert error.metadata["setting"] == "downloads.private_hosts"


MISSING = """
import sys
sys.modules["{library}"] = None
from modelhostd.adapters.cancel import Canceller
from modelhostd.adapters.http_source import HttpSourceConfig
from modelhostd.adapters.{module} import {kind}
from modelhostd.core.errors import ModelhostError
from modelhostd.core.resources import Source
adapter, source = {kind}(HttpSourceConfig()), Source("{module}://models/x")
try:
    adapter.plan(adapter.connections(Canceller(), source), source)
except ModelhostError as error:
    print(error.reason, error.message, error.metadata["method"])
"""


@pytest.mark.parametrize(
    ("library", "module", "kind"), [("s3fs", "s3", "S3"), ("gcsfs", "gs", "GoogleStorage")]
)
def test_a_missing_extra_is_named_with_what_installs_it(
    library: str, module: str, kind: str
) -> None:
    """UNIMPLEMENTED by this installation, and one command that changes that."""
    code = MISSING.format(library=library, module=module, kind=kind)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("UNIMPLEMENTED ")
    assert f"pip install 'modelhost[server,{module}]'" in done.stdout


@SCHEMES
async def test_a_cut_object_is_gone_on_with(
    tmp_path: Path, store: LoopbackObjects, scheme: str
) -> None:
    """By a range from where it broke off; every request asks for bytes as they are."""
    close(store)
    data = safetensors(2_000_000)
    store.put("models/m.safetensors", data)
    store.cuts = [600_000, 600_000]
    desk = desk_for(tmp_path, store, scheme)
    await desk.fetch(f"{scheme}://models/m.safetensors")
    assert desk.content() == {"m.safetensors": data}
    asked = [
        r.headers["range"] for r in store.requests if "if-range" in r.headers or r.status == 206
    ]
    assert [text for text in asked if text.startswith("bytes=600000-")]
    assert [text for text in asked if text.startswith("bytes=1200000-")]
    assert {r.headers.get("accept-encoding") for r in store.requests} == {"identity"}
