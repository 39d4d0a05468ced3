"""What holds a download up on purpose: limits of bytes a second, no network, a deadline."""

import asyncio
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.loopback_hub import Fault, LoopbackHub, Repo
from modelhostd.adapters.downloads import HubDownloads
from modelhostd.adapters.hub import HubConfig
from modelhostd.adapters.transfer import StreamConfig
from modelhostd.adapters.wire import Limits
from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.resources import Phase, Source
from modelhostd.core.transfer import RetryPolicy
from modelhostd.ports import DownloadJob
from tests.adapters.downloads_support import (
    CDN_PATH,
    FILES,
    RANGED,
    WEIGHTS,
    Site,
    failure,
    tiny,
)
from tests.support import wait_until

ONE = StreamConfig(connections=1)
OPERATION = "op-tiny-1"


@pytest.fixture
def hub() -> Iterator[LoopbackHub]:
    """A hub with one repository of two megabytes."""
    with LoopbackHub({"org/tiny": Repo(FILES)}) as hub:
        yield hub


@pytest.fixture(params=[ONE, RANGED], ids=["one", "ranged"])
def site(request: pytest.FixtureRequest, tmp_path: Path, hub: LoopbackHub) -> Site:
    """A home that gives up soon on a server that stands still."""
    return Site(tmp_path / "home", hub, streams=request.param, limits=Limits(stall_s=1.0))


async def until(condition: Callable[[], object]) -> None:
    """Wait for what the loop and threads do."""
    await asyncio.to_thread(wait_until, condition)


async def test_a_slow_download_is_no_stalled_one_and_can_be_let_go(
    site: Site, hub: LoopbackHub
) -> None:
    """At a rate below what a server must bring no try fails; without it the rest comes at once."""
    site.downloads.limit(20_000)
    task = asyncio.create_task(site.fetch())
    await until(lambda: site.reports and site.reports[-1].done_bytes > 40_000)
    assert not task.done()
    site.downloads.limit(0)
    await task
    assert site.content() == FILES
    assert all(report.retry is None for report in site.reports)


async def test_one_download_has_a_limit_of_its_own(site: Site, hub: LoopbackHub) -> None:
    """Another one beside it has none, and its own can be changed while it runs."""
    hub.repos["org/other"] = Repo(tiny(2_000_000, seed=9))
    site.downloads.limit_one(OPERATION, 5)  # not running: nobody to limit
    first = asyncio.create_task(site.fetch())
    await until(lambda: site.reports)
    site.downloads.limit_one(OPERATION, 1000)
    job = DownloadJob("other", "other", 1, Source("hf://org/other"), {})
    await site.downloads.fetch(job, lambda _: None)
    site.downloads.limit_one(OPERATION, 0)
    await first
    assert site.content() == FILES


async def test_a_limit_that_comes_with_the_job(site: Site) -> None:
    """It holds from the first byte, and a cancel does not wait for it."""
    job = DownloadJob(OPERATION, "tiny", 1, Source("hf://org/tiny"), {}, rate_limit=1)
    reports: list[Any] = []
    task = asyncio.create_task(site.downloads.fetch(job, reports.append))
    await until(lambda: reports and reports[-1].phase is Phase.DOWNLOADING)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert reports[-1].done_bytes < 100_000
    await site.fetch()
    assert site.content() == FILES


async def test_each_file_shows_how_far_it_is(site: Site, hub: LoopbackHub) -> None:
    """By path, with bytes and size, while it runs and not afterwards."""
    fault = hub.fault(Fault(CDN_PATH, stall_after=100_000))
    site = Site(site.home, hub, streams=ONE)
    task = asyncio.create_task(site.fetch())
    await asyncio.to_thread(fault.reached.wait, 20)
    await until(
        lambda: sum(f.done_bytes for f in site.downloads.file_progress(OPERATION)) > 100_000
    )
    files = {file.path: file for file in site.downloads.file_progress(OPERATION)}
    assert list(files) == sorted(FILES)
    assert {path: file.size_bytes for path, file in files.items()} == {
        path: len(data) for path, data in FILES.items()
    }
    assert files["model.safetensors"].done_bytes <= 100_000
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert site.downloads.file_progress(OPERATION) == ()


class Network:
    """The machine's network, which can be pulled out."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.there = True
        self.looks = 0
        find = socket.getaddrinfo

        def getaddrinfo(*args: Any, **named: Any) -> Any:
            if not self.there:
                self.looks += 1
                raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
            return find(*args, **named)

        monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)


@pytest.mark.parametrize("moment", ["before", "in mid-file"])
async def test_without_a_network_a_download_waits_and_goes_on(
    tmp_path: Path, hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """WAITING with reason OFFLINE, however long, without spending its only try; then to the end."""
    network = Network(monkeypatch)
    impatient = RetryPolicy(tries=2, base_s=0.01, cap_s=0.02)
    site = Site(tmp_path / "home", hub, retry=impatient)
    fault = Fault(CDN_PATH, cut_after=700_000)
    if moment == "before":
        network.there = False
    else:
        fault.reached.clear()
        hub.fault(fault)
        hub.rate = 500_000
    task = asyncio.create_task(site.fetch())
    if moment != "before":
        await asyncio.to_thread(fault.reached.wait, 20)
        network.there = False
    await until(lambda: network.looks > 10)
    await until(lambda: (retry := site.reports[-1].retry) and retry.reason == "OFFLINE")
    last = site.reports[-1]
    assert last.phase is Phase.WAITING
    assert last.retry is not None
    assert last.retry.attempt == (0 if moment == "before" else 1)  # the cut's
    assert site.downloads.contact.state == "OFFLINE"
    hub.rate = 0
    network.there = True
    await task
    assert site.content() == FILES
    assert site.downloads.contact.state == "REACHABLE"
    assert site.reports[-1].retry is None


async def test_whoever_asks_is_told_that_there_is_no_network(
    tmp_path: Path, hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inspecting a source does not wait for one."""
    network = Network(monkeypatch)
    network.there = False
    site = Site(tmp_path / "home", hub)
    with pytest.raises(ModelhostError) as caught:
        await site.downloads.inspect(Source("hf://org/tiny"))
    assert caught.value.reason is Reason.OFFLINE


async def test_a_server_that_refuses_is_no_missing_network(tmp_path: Path) -> None:
    """A closed port spends attempts and ends: others may well be there."""
    with LoopbackHub({"org/tiny": Repo(FILES)}) as gone:
        endpoint = gone.endpoint
    site = Site(tmp_path / "home", gone, endpoint=endpoint)
    assert (await failure(site)).reason is Reason.NETWORK_ERROR
    retries = [report.retry for report in site.reports if report.retry]
    assert all(retry.reason == "NETWORK_ERROR" for retry in retries)


async def test_a_download_ends_at_its_deadline(tmp_path: Path, hub: LoopbackHub) -> None:
    """However well it goes on; what came is kept."""
    hub.fault(Fault(CDN_PATH, stall_after=500_000, times=1))
    site = Site(tmp_path / "home", hub)
    config = HubConfig(endpoint=hub.endpoint)
    site.downloads = HubDownloads(config, site.store, site.trees, deadline_s=4.0)
    error = await failure(site)
    assert error.reason is Reason.NETWORK_ERROR
    assert error.metadata["cause"] == "deadline"
    fetched = await site.fetch()
    assert fetched.reused_bytes >= 500_000
    assert site.content()["model.safetensors"] == WEIGHTS
