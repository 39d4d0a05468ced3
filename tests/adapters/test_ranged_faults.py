"""Several connections to one file, and a server that misbehaves in every way: whole or refused, never half."""

import asyncio
import re
import signal
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from bench.loopback_hub import Fault, LoopbackHub, Repo
from modelhostd.adapters import failpoints
from modelhostd.adapters.connections import Connections
from modelhostd.adapters.hub import Hub, HubConfig
from modelhostd.adapters.parts import kept_spans
from modelhostd.adapters.wire import Limits
from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.resources import Source
from modelhostd.core.spans import Spans
from modelhostd.ports import SourceFacts
from tests.adapters.downloads_support import (
    CDN_PATH,
    FILES,
    PATIENT,
    RANGED,
    SHA256,
    WEIGHTS,
    Site,
    cdn_ranges,
    failure,
    start_child,
)
from tests.support import wait_until

PATIENCE, LITTLE_PATIENCE = Limits(stall_s=20), Limits(stall_s=0.5)
"""Where a server stands still for ever, the second: elsewhere a slow machine would be given up on, too."""
PIECE = RANGED.piece_bytes_max
TOTAL = len(WEIGHTS)


@pytest.fixture
def hub() -> Iterator[LoopbackHub]:
    """A hub with one repository of two megabytes."""
    with LoopbackHub({"org/tiny": Repo(FILES)}) as hub:
        yield hub


@pytest.fixture
def site(tmp_path: Path, hub: LoopbackHub) -> Iterator[Site]:
    """A home that fetches by four connections; failpoints are disarmed afterwards."""
    yield Site(tmp_path / "home", hub, limits=PATIENCE, streams=RANGED, sync_bytes=400_000)
    failpoints.configure("")


def asked(hub: LoopbackHub, since: int = 0) -> list[tuple[int, int]]:
    """Return the ranges that the CDN was asked for."""
    spans = []
    for text in cdn_ranges(hub)[since:]:
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", text)
        assert match, text
        spans.append((int(match[1]), int(match[2]) + 1 if match[2] else TOTAL))
    return spans


async def test_pieces_are_fetched_once_each_on_kept_connections(
    site: Site, hub: LoopbackHub
) -> None:
    """Together they are the file; nothing comes twice, and the digest is that of the whole."""
    await site.fetch()
    assert site.content() == FILES
    pieces = asked(hub)
    assert sorted(pieces) == [(at, min(at + PIECE, TOTAL)) for at in range(0, TOTAL, PIECE)]
    assert hub.sent_bytes("cdn") == TOTAL
    done = [report.done_bytes for report in site.reports]
    assert done == sorted(done)
    assert done[-1] == site.reports[-1].total_bytes


WHOLE = {
    **{
        f"{'reset' if reset else 'cut'}-{cut}-{times}": [
            Fault(CDN_PATH, cut_after=cut, reset=reset, times=times)
        ]
        for cut in (0, 1, 4096, PIECE - 1)
        for reset in (False, True)
        for times in (1, 6)
    },
    "cut-once-everywhere": [Fault(CDN_PATH, cut_after=100_000, times=20)],
    "dropped": [Fault(CDN_PATH, drop=True, times=5)],
    "reset-at-once": [Fault(CDN_PATH, drop=True, reset=True, times=5)],
    "one-stalls": [Fault(CDN_PATH, stall_after=70_000)],
    "all-stall": [Fault(CDN_PATH, stall_after=70_000, times=4)],
    "one-stalls-before-headers": [Fault(CDN_PATH, delay_s=5.0)],
    "one-drips": [Fault(CDN_PATH, rate=400)],
    "no-ranges": [Fault(CDN_PATH, ignore_range=True, times=1000)],
    "no-range-once": [Fault(CDN_PATH, ignore_range=True)],
    "no-range-later": [
        Fault(CDN_PATH, times=3, headers={"X-Fine": "1"}),
        Fault(CDN_PATH, ignore_range=True, times=1000),
    ],
    "range-of-another-place": [Fault(CDN_PATH, content_range=f"bytes 7-{PIECE + 6}/{TOTAL}")],
    "range-of-another-file": [Fault(CDN_PATH, content_range=f"bytes 0-{PIECE - 1}/{TOTAL + 1}")],
    "range-without-total": [Fault(CDN_PATH, content_range=f"bytes 0-{PIECE - 1}/*")],
    "range-of-nonsense": [Fault(CDN_PATH, content_range="items 1-2/3", times=3)],
    "longer-than-its-range": [
        Fault(
            CDN_PATH,
            status=206,
            body=b"x" * (PIECE + 1),
            headers={"Content-Range": f"bytes 0-{PIECE - 1}/{TOTAL}"},
        )
    ],
    "shorter-than-its-range": [
        Fault(
            CDN_PATH,
            status=206,
            body=b"x" * 10,
            headers={"Content-Range": f"bytes 0-{PIECE - 1}/{TOTAL}"},
        )
    ],
    "chunked": [Fault(CDN_PATH, chunked=True, times=1000)],
    "unsatisfiable": [Fault(CDN_PATH, status=416)],
    "version-changes-once": [Fault(CDN_PATH, headers={"ETag": '"another"'})],
    "version-changes-later": [
        Fault(CDN_PATH, times=5, headers={"X-Fine": "1"}),
        Fault(CDN_PATH, headers={"ETag": '"another"'}),
    ],
    "version-without-a-name": [Fault(CDN_PATH, headers={"ETag": ""}, times=4)],
    "weak-names": [Fault(CDN_PATH, headers={"ETag": 'W/"x"'}, times=4)],
    **{f"status-{status}": [Fault(CDN_PATH, status=status, times=3)] for status in (408, 500, 502)},
    "unavailable-for-a-moment": [
        Fault(CDN_PATH, status=503, headers={"Retry-After": "0"}, times=3)
    ],
    "too-many-connections": [Fault(CDN_PATH, status=429, headers={"Retry-After": "0"}, times=3)],
    **{f"location-run-out-{code}": [Fault(CDN_PATH, status=code, times=3)] for code in (401, 403)},
    "flood-of-headers-is-a-cut": [Fault(CDN_PATH, headers={f"X-{n}": "y" for n in range(150)})],
}


STANDING_STILL = {"one-stalls", "all-stall", "one-stalls-before-headers", "one-drips"}


@pytest.mark.parametrize("name", WHOLE)
async def test_what_may_pass_is_got_over(site: Site, hub: LoopbackHub, name: str) -> None:
    """The file is bit-equal, progress never goes back nor too far, nothing is left behind."""
    if name in STANDING_STILL:
        site = replace(site, limits=LITTLE_PATIENCE)
    for fault in WHOLE[name]:
        fault.used = 0
        hub.fault(fault)
    await site.fetch()
    assert site.content() == FILES
    done = [report.done_bytes for report in site.reports]
    assert done == sorted(done)
    assert done[-1] == site.reports[-1].total_bytes
    assert await site.files.check({"tiny": [1]}, deep=True, repair=False) == ()
    assert (await site.files.use()).staging_bytes == 0


REFUSED = {
    "cut-for-ever": (Fault(CDN_PATH, cut_after=100), Reason.NETWORK_ERROR),
    "dropped-for-ever": (Fault(CDN_PATH, drop=True), Reason.NETWORK_ERROR),
    "server-errors": (Fault(CDN_PATH, status=503), Reason.NETWORK_ERROR),
    "limited": (Fault(CDN_PATH, status=429), Reason.RATE_LIMITED),
    "limited-for-a-year": (
        Fault(CDN_PATH, status=429, headers={"Retry-After": "31536000"}),
        Reason.RATE_LIMITED,
    ),
    "gone": (Fault(CDN_PATH, status=404), Reason.SOURCE_NOT_FOUND),
    "forbidden": (Fault(CDN_PATH, status=403), Reason.ACCESS_DENIED),
    "unauthorised": (Fault(CDN_PATH, status=401), Reason.AUTHENTICATION_REQUIRED),
    "a-flipped-byte": (Fault(CDN_PATH, corrupt_at=700_000), Reason.CHECKSUM_MISMATCH),
    "the-first-byte": (Fault(CDN_PATH, corrupt_at=0), Reason.CHECKSUM_MISMATCH),
    "the-last-byte": (Fault(CDN_PATH, corrupt_at=TOTAL - 1), Reason.CHECKSUM_MISMATCH),
    "a-login-page": (Fault(CDN_PATH, status=200, body=b"<html>"), Reason.CHECKSUM_MISMATCH),
    "a-circle": (
        Fault(CDN_PATH, status=302, headers={"Location": f"{CDN_PATH}?again"}),
        Reason.BAD_SOURCE_REPLY,
    ),
    "gzip": (Fault(CDN_PATH, content_encoding="gzip"), Reason.BAD_SOURCE_REPLY),
    "brotli": (Fault(CDN_PATH, content_encoding="br"), Reason.BAD_SOURCE_REPLY),
    "teapot": (Fault(CDN_PATH, status=418), Reason.BAD_SOURCE_REPLY),
}


@pytest.mark.parametrize("name", REFUSED)
async def test_what_does_not_pass_is_refused(site: Site, hub: LoopbackHub, name: str) -> None:
    """With its reason, nothing visible; and when the server is well again the next try is whole."""
    fault, reason = REFUSED[name]
    fault.used, fault.times = 0, 10_000
    hub.fault(fault)
    assert (await failure(site)).reason is reason
    hub.clear_faults()
    await site.fetch()
    assert site.content() == FILES
    assert await site.files.check({"tiny": [1]}, deep=True, repair=False) == ()


async def test_a_wait_of_all_for_what_one_was_told_is_shown(site: Site, hub: LoopbackHub) -> None:
    """One connection of four is told to come back in a second: the others wait it out as well, and that is seen."""
    hub.fault(Fault(CDN_PATH, status=429, headers={"Retry-After": "1"}))
    await site.fetch()
    assert site.content() == FILES
    assert {report.retry.reason for report in site.reports if report.retry} == {"RATE_LIMITED"}
    assert site.reports[-1].retry is None


async def test_a_wait_that_is_too_long_is_nobodys(site: Site, hub: LoopbackHub) -> None:
    """One connection of four is told to come back in a year: that is refused at once, and the others wait no part of it."""
    hub.fault(Fault(CDN_PATH, status=429, headers={"Retry-After": "31536000"}))
    assert (await failure(site)).reason is Reason.RATE_LIMITED
    await site.fetch()
    assert site.content() == FILES


class Undigested(Hub):
    """A Hub that tells no digests: only ETags say that two answers are of one version."""

    def plan(
        self, connections: Connections, source: Source, *, allow_unsafe: bool = False
    ) -> SourceFacts:
        facts = super().plan(connections, source, allow_unsafe=allow_unsafe)
        files = [replace(file, sha256="", git_sha1="") for file in facts.files]
        return replace(facts, files=files)


@pytest.fixture
def undigested(site: Site, hub: LoopbackHub) -> Site:
    """The home with such a Hub."""
    config = HubConfig(endpoint=hub.endpoint, retry=PATIENT, limits=PATIENCE)
    site.downloads._adapters["hf"] = Undigested(config)
    return site


async def test_servers_may_name_a_version_differently_where_its_digest_is_known(
    site: Site, hub: LoopbackHub
) -> None:
    """Two nodes of a CDN with two ETags for one content: nothing is begun again."""
    for number in range(100):
        hub.fault(Fault(CDN_PATH, headers={"ETag": f'"{number}"'}))
    await site.fetch()
    assert site.content() == FILES
    assert site.reports[-1].restarted_files == 0
    assert hub.sent_bytes("cdn") <= TOTAL + PIECE


async def test_a_version_that_never_stands_still_ends(undigested: Site, hub: LoopbackHub) -> None:
    """Another ETag each time, and each answer cut: the file is begun again some times, then refused."""
    site = undigested
    for number in range(100):
        headers = {"ETag": f'"{number}"'}
        hub.fault(Fault(CDN_PATH, headers=headers, cut_after=PIECE // 2))
    assert (await failure(site)).reason is Reason.BAD_SOURCE_REPLY
    assert site.reports[-1].restarted_files > 0


async def test_a_change_is_said(undigested: Site, hub: LoopbackHub) -> None:
    """How many files were begun again is part of the progress."""
    site = undigested
    hub.fault(Fault(CDN_PATH, times=5, headers={"X-Fine": "1"}))
    hub.fault(Fault(CDN_PATH, headers={"ETag": '"another"'}))
    await site.fetch()
    assert site.reports[-1].restarted_files == 1


async def test_a_location_that_runs_out_for_all_at_once(site: Site, hub: LoopbackHub) -> None:
    """Every connection is refused, one asks for a fresh location, and what was fetched is kept."""
    site = replace(site, limits=Limits(stall_s=3))
    gates = [hub.fault(Fault(CDN_PATH, stall_after=50_000)) for _ in range(4)]
    task = asyncio.create_task(site.fetch())
    for gate in gates:
        await asyncio.to_thread(gate.reached.wait, 20)
    hub.signature += 1
    await task
    assert site.content() == FILES
    heads = [r for r in hub.requests if r.where == "hub" and "resolve" in r.path]
    assert sum("model.safetensors" in r.path for r in heads) == 2
    assert hub.sent_bytes("cdn") <= TOTAL + 4 * PIECE


async def test_a_retry_is_shown_with_its_reason(site: Site, hub: LoopbackHub) -> None:
    """Attempt, what failed and when it is tried again, while it waits."""
    hub.fault(Fault(CDN_PATH, status=503, headers={"Retry-After": "1"}, times=4))
    await site.fetch()
    retries = [report.retry for report in site.reports if report.retry is not None]
    assert retries
    assert retries[0].reason == "NETWORK_ERROR"
    assert "503" in retries[0].message
    assert retries[0].attempt == 1
    assert site.reports[-1].retry is None


@pytest.mark.parametrize("number", [1, 2, 7, 12])
@pytest.mark.parametrize("action", ["enospc", "eio"])
@pytest.mark.parametrize("point", ["part.journal", "part.written", "part.marked", "part.synced"])
async def test_a_disk_that_fails_at_any_write(
    site: Site, hub: LoopbackHub, point: str, action: str, number: int
) -> None:
    """A typed error at once, nothing visible, and the next try goes on to the whole."""
    hub.rate = 20_000_000  # so that a failure meets the others in mid-body
    failpoints.configure(f"{point}={action}@{number}")
    (ended,) = await asyncio.gather(site.fetch(), return_exceptions=True)
    failpoints.configure("")
    if isinstance(ended, BaseException):
        assert isinstance(ended, ModelhostError)
        full = action == "enospc"
        assert ended.reason is (Reason.INSUFFICIENT_DISK_SPACE if full else Reason.STORAGE_ERROR)
        assert site.visible() == []
    hub.rate = 0
    await site.fetch()
    assert site.content() == FILES
    assert await site.files.check({"tiny": [1]}, deep=True, repair=False) == ()


async def test_a_cancelled_download_asks_for_exactly_what_is_missing(
    site: Site, hub: LoopbackHub
) -> None:
    """Holes and all: the ranges of the second attempt are the gaps that the first one left."""
    gates = [hub.fault(Fault(CDN_PATH, stall_after=n * 10_000, times=1)) for n in (3, 5, 7, 2)]
    site = Site(site.home, hub, streams=RANGED)
    task = asyncio.create_task(site.fetch())
    for gate in gates:
        await asyncio.to_thread(gate.reached.wait, 20)
    await asyncio.to_thread(
        wait_until, lambda: kept_spans(site.store.home, SHA256, TOTAL).total == 170_000
    )
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    kept = kept_spans(site.store.home, SHA256, TOTAL)
    assert kept.total == 170_000
    # A request is logged when its connection is seen to be gone.
    await asyncio.to_thread(wait_until, lambda: len(cdn_ranges(hub)) == 4)
    before = len(cdn_ranges(hub))
    fetched = await site.fetch()
    assert fetched.reused_bytes >= 170_000
    again = asked(hub, before)
    assert sum(end - start for start, end in again) == TOTAL - 170_000
    assert Spans([*kept, *again]) == Spans([(0, TOTAL)])
    assert site.content() == FILES


async def test_a_killed_process_leaves_what_it_wrote(site: Site, hub: LoopbackHub) -> None:
    """SIGKILL with four connections in mid-piece: the next process fetches the gaps, byte for byte."""
    gates = [hub.fault(Fault(CDN_PATH, stall_after=n * 10_000, times=1)) for n in (3, 5, 7, 2)]
    child = start_child(site, 1, "ranged")
    for gate in gates:
        await asyncio.to_thread(gate.reached.wait, 20)
    await asyncio.to_thread(
        wait_until, lambda: kept_spans(site.store.home, SHA256, TOTAL).total == 170_000
    )
    child.kill()
    assert await asyncio.to_thread(child.communicate, None, 20) == (b"", None)
    assert child.returncode == -signal.SIGKILL
    # A request is logged when its connection is seen to be gone.
    await asyncio.to_thread(wait_until, lambda: len(cdn_ranges(hub)) == 4)
    before = len(cdn_ranges(hub))
    site = Site(site.home, hub, streams=RANGED)
    await site.fetch()
    assert sum(end - start for start, end in asked(hub, before)) == TOTAL - 170_000
    assert site.content() == FILES


async def test_cancelling_stops_every_connection(site: Site, hub: LoopbackHub) -> None:
    """Whatever each is doing; no thread is left, and the part is closed."""
    site = Site(site.home, hub, streams=RANGED, retry=PATIENT)
    gates = [hub.fault(Fault(CDN_PATH, stall_after=10_000, times=1)) for _ in range(4)]
    task = asyncio.create_task(site.fetch())
    for gate in gates:
        await asyncio.to_thread(gate.reached.wait, 20)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    def ours() -> list[str]:
        return [t.name for t in threading.enumerate() if t.name.startswith("modelhost-")]

    await asyncio.to_thread(wait_until, lambda: not ours())
