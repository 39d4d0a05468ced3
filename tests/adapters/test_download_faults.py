"""What goes wrong while bytes come: cut, stalled, dripped, changed, of another length."""

import asyncio
import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from bench.loopback_hub import Fault, LoopbackHub, Repo
from modelhostd.adapters import failpoints
from modelhostd.adapters.wire import Limits
from modelhostd.core.errors import Reason
from tests.adapters.downloads_support import (
    CDN_PATH,
    FILES,
    PATIENT,
    SHA256,
    SIZE,
    WEIGHTS,
    Site,
    cdn_ranges,
    failure,
)
from tests.support import wait_until

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


@pytest.mark.parametrize(
    "cut", [0, 1, 4096, 300_000, SIZE - 1, len(WEIGHTS) - 1], ids=lambda cut: f"at-{cut}"
)
@pytest.mark.parametrize("reset", [False, True], ids=["fin", "rst"])
async def test_a_cut_is_gone_on_from_where_it_was(
    site: Site, hub: LoopbackHub, cut: int, reset: bool
) -> None:
    """By FIN or RST at any byte: only what is missing is asked for again, and the bytes are right."""
    hub.fault(Fault(CDN_PATH, cut_after=cut, reset=reset))
    await site.fetch()
    assert site.content() == FILES
    # After a reset the kernel may drop what was sent; a FIN delivers everything.
    assert hub.sent_bytes("cdn") <= len(WEIGHTS) + cut
    if not reset and cut:
        assert cdn_ranges(hub) == ["", f"bytes={cut}-"]
        assert hub.sent_bytes("cdn") == len(WEIGHTS)


async def test_many_cuts_with_progress_are_survived(site: Site, hub: LoopbackHub) -> None:
    """The count of tries starts anew whenever an attempt brought enough."""
    hub.fault(Fault(CDN_PATH, cut_after=200_000, times=9))
    await site.fetch()
    assert site.content() == FILES
    assert len(cdn_ranges(hub)) == 10


async def test_cuts_without_progress_end(site: Site, hub: LoopbackHub) -> None:
    """A drip must end: as many tries as the policy says, and what came is kept."""
    hub.fault(Fault(CDN_PATH, cut_after=1000, times=1000))
    error = await failure(site)
    assert error.reason is Reason.NETWORK_ERROR
    assert "kept" in error.message
    assert len(cdn_ranges(hub)) == PATIENT.tries
    hub.clear_faults()
    fetched = await site.fetch()
    assert fetched.reused_bytes >= 1000 * PATIENT.tries
    assert site.content() == FILES


async def test_a_stalled_server_is_given_up_on(tmp_path: Path, hub: LoopbackHub) -> None:
    """No byte for the stall limit is a failure, and the next try goes on."""
    site = Site(tmp_path / "home", hub, limits=Limits(stall_s=1.5))
    hub.fault(Fault(CDN_PATH, stall_after=500_000))
    await site.fetch()
    assert site.content() == FILES
    assert cdn_ranges(hub)[1] == "bytes=500000-"


async def test_a_dripping_server_is_given_up_on(tmp_path: Path, hub: LoopbackHub) -> None:
    """A few bytes now and then keep a socket alive, not a download."""
    site = Site(tmp_path / "home", hub, limits=Limits(stall_s=0.3), retry=replace(PATIENT, tries=2))
    hub.fault(Fault(CDN_PATH, rate=400, times=1000))
    assert (await failure(site)).reason is Reason.NETWORK_ERROR


async def test_a_server_that_ignores_ranges_gives_one_stream(site: Site, hub: LoopbackHub) -> None:
    """200 to a range is the whole file, taken from the first byte, never at an offset."""
    hub.fault(Fault(CDN_PATH, cut_after=700_000))
    hub.fault(Fault(CDN_PATH, ignore_range=True))
    await site.fetch()
    assert site.content() == FILES
    assert cdn_ranges(hub) == ["", "bytes=700000-"]
    done = [report.done_bytes for report in site.reports]
    assert done == sorted(done)


@pytest.mark.parametrize(
    "answer",
    [
        "bytes 0-99/100",
        "bytes 699999-2000063/2000064",
        f"bytes 700000-{len(WEIGHTS) - 1}/{len(WEIGHTS) + 1}",
        f"bytes 700000-{len(WEIGHTS) - 2}/{len(WEIGHTS)}",
        "bytes */5",
        "nonsense",
        "bytes 700000-/x",
    ],
)
async def test_a_range_that_was_not_asked_for_is_not_taken(
    site: Site, hub: LoopbackHub, answer: str
) -> None:
    """A wrong Content-Range is detected, and the file fetched without ranges."""
    hub.fault(Fault(CDN_PATH, cut_after=700_000))
    hub.fault(Fault(CDN_PATH, content_range=answer))
    await site.fetch()
    assert site.content() == FILES
    # A request that we gave up is logged when its server notices.
    await asyncio.to_thread(wait_until, lambda: len(cdn_ranges(hub)) == 3)
    assert sorted(cdn_ranges(hub)) == ["", "", "bytes=700000-"]


async def test_a_refused_range_is_asked_for_as_a_whole(site: Site, hub: LoopbackHub) -> None:
    """416 where there should be bytes."""
    hub.fault(Fault(CDN_PATH, cut_after=700_000))
    hub.fault(Fault(CDN_PATH, status=416))
    await site.fetch()
    assert site.content() == FILES


async def test_a_range_nobody_asked_for_is_refused(site: Site, hub: LoopbackHub) -> None:
    """206 to a plain request."""
    hub.fault(Fault(CDN_PATH, status=206, body=b"x", times=9))
    assert (await failure(site)).reason is Reason.BAD_SOURCE_REPLY


async def test_a_flipped_byte_goes_to_quarantine(site: Site, hub: LoopbackHub) -> None:
    """CHECKSUM_MISMATCH with both digests; the evidence lies in quarantine with a note; a retry is
    whole.
    """
    hub.fault(Fault(CDN_PATH, corrupt_at=1_234_567))
    error = await failure(site)
    assert error.reason is Reason.CHECKSUM_MISMATCH
    assert error.metadata["expected"] == SHA256
    (bad,) = site.quarantined()
    assert hashlib.sha256(bad.read_bytes()).hexdigest() == error.metadata["actual"]
    note = json.loads(bad.with_name(bad.name + ".json").read_text())
    assert (note["file"], note["expected"]) == ("model.safetensors", SHA256)
    assert bad.name in error.message
    assert not [part for part in site.parts() if part.name.startswith(SHA256)]
    await site.fetch()
    assert site.content() == FILES


async def test_wrong_content_ends_and_does_not_loop(site: Site, hub: LoopbackHub) -> None:
    """The same bad bytes again and again: one request each time."""
    hub.fault(Fault(CDN_PATH, corrupt_at=5, times=1000))
    for _ in range(2):
        assert (await failure(site)).reason is Reason.CHECKSUM_MISMATCH
    assert len(cdn_ranges(hub)) == 2


async def test_a_bad_prefix_of_an_earlier_attempt_is_fetched_anew(
    site: Site, hub: LoopbackHub
) -> None:
    """What an attempt left is hashed again; if it is what is wrong, the file starts over once."""
    hub.fault(Fault(CDN_PATH, cut_after=1_000_000, times=1))
    hub.fault(Fault(CDN_PATH, drop=True, times=1000))
    await failure(site)
    hub.clear_faults()
    (part,) = [p for p in site.parts() if p.name.startswith(SHA256)]
    data = bytearray(part.read_bytes())
    data[77] ^= 1
    part.write_bytes(bytes(data))
    await site.fetch()
    assert site.content() == FILES
    assert site.quarantined() == []


async def test_a_small_file_is_held_to_its_git_digest(site: Site, hub: LoopbackHub) -> None:
    """Files outside LFS have a SHA-1 of git's, and that is checked."""
    hub.fault(Fault("*/config.json", where="hub", corrupt_at=3))
    error = await failure(site)
    assert error.reason is Reason.CHECKSUM_MISMATCH
    assert len(error.metadata["expected"]) == 40


@pytest.mark.parametrize("length", [10, len(WEIGHTS) + 5])
async def test_a_body_of_another_length_is_refused(
    site: Site, hub: LoopbackHub, length: int
) -> None:
    """A login page or a pointer text with 200: refused by its length, before it is read."""
    hub.fault(Fault(CDN_PATH, status=200, body=b"x" * length, times=9))
    error = await failure(site)
    assert error.reason is Reason.CHECKSUM_MISMATCH
    assert str(length) in error.metadata["actual"]


async def test_a_body_without_length_is_bounded_by_the_plan(site: Site, hub: LoopbackHub) -> None:
    """Chunked and right: taken. Chunked and longer than planned: refused at the first byte too many."""
    hub.fault(Fault(CDN_PATH, chunked=True))
    await site.fetch()
    assert site.content() == FILES
    await site.files.delete_artifact("tiny", 1)
    body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(WEIGHTS) + 1, WEIGHTS + b"!")
    headers = {"Transfer-Encoding": "chunked"}
    hub.fault(Fault(CDN_PATH, status=200, body=body, headers=headers))
    assert (await failure(site)).reason is Reason.CHECKSUM_MISMATCH
