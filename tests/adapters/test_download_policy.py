"""Where a download goes and what it takes: tokens, redirects, signed locations, content."""

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.loopback_hub import Fault, LoopbackHub, Repo
from modelhostd.adapters import failpoints
from modelhostd.adapters.wire import Limits
from modelhostd.core.errors import Reason
from tests.adapters.downloads_support import (
    CDN_PATH,
    FILES,
    WEIGHTS,
    Site,
    failure,
    safetensors,
)

TOKEN = "hf_canary_0123456789"


@pytest.fixture
def hub() -> Iterator[LoopbackHub]:
    """A hub with one repository of two megabytes."""
    with LoopbackHub({"org/tiny": Repo(FILES)}, tokens=(TOKEN,)) as hub:
        yield hub


@pytest.fixture
def site(tmp_path: Path, hub: LoopbackHub) -> Iterator[Site]:
    """A home that talks to it; failpoints are disarmed afterwards."""
    yield Site(tmp_path / "home", hub, limits=Limits(stall_s=10))
    failpoints.configure("")


def holding(root: Path, secret: bytes) -> list[Path]:
    """Return the files below ``root`` that hold ``secret``."""
    return [p for p in root.rglob("*") if p.is_file() and secret in p.read_bytes()]


@pytest.mark.parametrize("where", ["cdn", "hub"])
async def test_a_coded_body_is_refused(site: Site, hub: LoopbackHub, where: str) -> None:
    """identity was asked for: a gzip body could be a bomb, and its bytes are not the file's."""
    match = CDN_PATH if where == "cdn" else "*/config.json"
    hub.fault(Fault(match, where=where, content_encoding="gzip", times=9))
    assert (await failure(site)).reason is Reason.BAD_SOURCE_REPLY


async def test_an_expired_signature_is_renewed(site: Site, hub: LoopbackHub) -> None:
    """403 in mid-file: a fresh location from the Hub, and on from there."""
    hub.fault(Fault(CDN_PATH, cut_after=900_000))
    gate = threading.Event()
    fault = hub.fault(Fault(CDN_PATH, gate=gate))
    task = asyncio.create_task(site.fetch())
    await asyncio.to_thread(fault.reached.wait, 20)
    hub.signature += 1
    gate.set()
    await task
    assert site.content() == FILES
    assert 403 in [request.status for request in hub.requests if request.where == "cdn"]
    assert hub.sent_bytes("cdn") < len(WEIGHTS) + 10_000


async def test_a_refusal_that_stays_is_believed(site: Site, hub: LoopbackHub) -> None:
    """Fresh locations that are refused too end with ACCESS_DENIED."""
    fault = hub.fault(Fault(CDN_PATH, status=403, times=1000))
    assert (await failure(site)).reason is Reason.ACCESS_DENIED
    assert fault.used <= 4


async def test_the_token_goes_to_the_hub_and_nowhere_else(site: Site, hub: LoopbackHub) -> None:
    """Plan, locations and small files carry it; the CDN on another port never sees it."""
    site.token = TOKEN
    await site.fetch()
    seen = {"hub": set[str](), "cdn": set[str]()}
    for request in hub.requests:
        seen[request.where].add(request.headers.get("authorization", ""))
        assert TOKEN not in request.path
    assert seen == {"hub": {f"Bearer {TOKEN}"}, "cdn": {""}}


async def test_the_token_does_not_follow_a_redirect(site: Site, hub: LoopbackHub) -> None:
    """A small file sent elsewhere by the Hub: the request goes, the token stays."""
    site.token = TOKEN
    with LoopbackHub() as other:
        target = other.endpoint
        hub.fault(
            Fault("*/config.json", where="hub", status=302, headers={"Location": f"{target}/x"})
        )
        assert (await failure(site)).reason is Reason.SOURCE_NOT_FOUND
        assert [request.path for request in other.requests] == ["/x"]
        assert "authorization" not in other.requests[0].headers


async def test_the_token_is_written_nowhere(site: Site, hub: LoopbackHub, tmp_path: Path) -> None:
    """Not in the manifest, the journal, quarantine notes or reports, through failures and success."""
    site.token = TOKEN
    hub.fault(Fault(CDN_PATH, corrupt_at=5))
    await failure(site)
    hub.fault(Fault(CDN_PATH, cut_after=5, times=9))
    await failure(site)
    hub.clear_faults()
    await site.fetch()
    assert TOKEN not in repr(site.reports) + repr(vars(site.downloads))
    assert holding(tmp_path, TOKEN.encode()) == []


@pytest.mark.parametrize(
    "location",
    [
        "http://127.0.0.2:9/x",
        "https://127.0.0.2:9/x",
        "http://localhost:9/x",
        "https://169.254.169.254/latest/meta-data",
        "https://[::1]:9/x",
        "https://[::ffff:127.0.0.1]:9/x",
        "file:///etc/passwd",
        "ftp://127.0.0.1/x",
        "http://user:pass@127.0.0.1/x",
        "http://[",
    ],
)
@pytest.mark.parametrize("match", ["*/config.json", "*/model.safetensors"])
async def test_a_redirect_to_a_forbidden_place_is_refused(
    site: Site, hub: LoopbackHub, match: str, location: str
) -> None:
    """No connection is tried; the error names the setting."""
    hub.fault(Fault(match, where="hub", status=302, headers={"Location": location}, times=9))
    error = await failure(site)
    assert error.reason in {Reason.SOURCE_NOT_ALLOWED, Reason.BAD_SOURCE_REPLY}


async def test_a_signed_location_at_a_forbidden_place_is_refused(
    site: Site, hub: LoopbackHub
) -> None:
    """The Hub's own answer, complete, but with a location that is not to be connected to."""
    hub.cdn_base = "http://127.0.0.2:9"
    assert (await failure(site)).reason is Reason.SOURCE_NOT_ALLOWED


async def test_a_redirect_loop_ends(site: Site, hub: LoopbackHub) -> None:
    """At most five hops."""
    path = f"/org/tiny/resolve/{hub.repos['org/tiny'].head}/config.json"
    fault = hub.fault(Fault(path, status=302, headers={"Location": path}, times=1000))
    assert (await failure(site)).reason is Reason.BAD_SOURCE_REPLY
    assert fault.used == 6


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"model.safetensors": b"\x08\x00\x00\x00\x00\x00\x00\x00not json"}, Reason.MALFORMED_FILE),
        ({"model.safetensors": safetensors(100)[:-1]}, Reason.MALFORMED_FILE),
        ({"model.safetensors": safetensors(100) + b"x"}, Reason.MALFORMED_FILE),
        ({"model.safetensors": b"version https://git-lfs"}, Reason.MALFORMED_FILE),
        ({"model.safetensors": b""}, Reason.MALFORMED_FILE),
        ({"model.safetensors": b"\x80\x04\x95pickle"}, Reason.UNSAFE_FILE),
        ({"model.safetensors": b"PK\x03\x04torch zip"}, Reason.UNSAFE_FILE),
        (
            {"model.safetensors": safetensors(10), "tokenizer.json": b"\x80\x02}."},
            Reason.UNSAFE_FILE,
        ),
    ],
    ids=[str(number) for number in range(8)],
)
async def test_files_are_checked_by_content_before_they_are_visible(
    site: Site, hub: LoopbackHub, files: dict[str, bytes], reason: Reason
) -> None:
    """Right by digest, and still not what the name says: refused, and not kept."""
    hub.repos["org/tiny"].commit({"config.json": b"{}", **files})
    assert (await failure(site)).reason is reason
