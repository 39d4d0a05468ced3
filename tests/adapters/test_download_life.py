"""Downloads among others: space, failing disks, cancels, shared files, deletions."""

import asyncio
import hashlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.loopback_hub import Fault, LoopbackHub, Repo
from modelhostd.adapters import downloads, failpoints
from modelhostd.adapters.wire import Limits
from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.resources import Phase
from tests.adapters.downloads_support import (
    CDN_PATH,
    FILES,
    SIZE,
    WEIGHTS,
    Site,
    cdn_ranges,
    failure,
    safetensors,
    tiny,
    weights_at,
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


async def test_a_plan_that_does_not_fit_is_refused_before_the_first_byte(
    tmp_path: Path, hub: LoopbackHub
) -> None:
    """INSUFFICIENT_DISK_SPACE with both numbers; nothing is asked of the CDN."""
    total = sum(map(len, FILES.values()))
    free = [total - 1]
    site = Site(tmp_path / "home", hub, free_bytes=lambda: (free[0], 1 << 40))
    error = await failure(site)
    assert error.reason is Reason.INSUFFICIENT_DISK_SPACE
    assert error.metadata["neededBytes"] == str(total)
    assert error.metadata["freeBytes"] == str(total - 1)
    assert hub.sent_bytes("cdn") == 0
    free[0] = total
    await site.fetch()


async def test_two_downloads_cannot_promise_the_same_space(
    tmp_path: Path, hub: LoopbackHub
) -> None:
    """The second is refused while the first still needs what is free."""
    hub.repos["org/other"] = Repo(tiny(SIZE, seed=5))
    site = Site(tmp_path / "home", hub, free_bytes=lambda: (3_000_000, 1 << 40))
    fault = hub.fault(Fault(CDN_PATH, stall_after=100))
    first = asyncio.create_task(site.fetch())
    await asyncio.to_thread(fault.reached.wait, 20)
    with pytest.raises(ModelhostError) as caught:
        await site.fetch("hf://org/other", "other")
    assert caught.value.reason is Reason.INSUFFICIENT_DISK_SPACE
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    await site.fetch("hf://org/other", "other")


@pytest.mark.parametrize(
    ("point", "reason"),
    [
        ("part.opened=enospc", Reason.INSUFFICIENT_DISK_SPACE),
        ("part.written=enospc@3", Reason.INSUFFICIENT_DISK_SPACE),
        ("part.written=edquot@2", Reason.INSUFFICIENT_DISK_SPACE),
        ("part.synced=eio", Reason.STORAGE_ERROR),
        ("part.complete=eio", Reason.STORAGE_ERROR),
        ("verified.renamed=eio", Reason.STORAGE_ERROR),
        ("publish.begin=enospc", Reason.INSUFFICIENT_DISK_SPACE),
        ("publish.blob_renamed=eio@2", Reason.STORAGE_ERROR),
        ("publish.blobs_synced=eio", Reason.STORAGE_ERROR),
        ("publish.tree_linked=enospc", Reason.INSUFFICIENT_DISK_SPACE),
        ("publish.manifest_synced=eio", Reason.STORAGE_ERROR),
        ("publish.tree_synced=eio", Reason.STORAGE_ERROR),
        ("publish.tree_renamed=eio", Reason.STORAGE_ERROR),
    ],
)
async def test_a_failing_disk_leaves_nothing_half(site: Site, point: str, reason: Reason) -> None:
    """At every step: a typed error, nothing visible, and the next try ends right."""
    failpoints.configure(point)
    with pytest.raises(ModelhostError) as caught:
        await site.fetch()
    failpoints.configure("")
    assert caught.value.reason is reason
    assert site.visible() == []
    await site.fetch()
    assert site.content() == FILES
    assert await site.files.check({"tiny": [1]}, deep=True, repair=False) == ()


def transfers() -> list[threading.Thread]:
    """Return the threads that carry bytes now."""
    return [t for t in threading.enumerate() if t.name == "modelhostd-transfer"]


async def test_cancelling_ends_the_bytes_at_once(site: Site, hub: LoopbackHub) -> None:
    """A stalled transfer ends with its task, its threads with it, and goes on later."""
    fault = hub.fault(Fault(CDN_PATH, stall_after=1_000_000))
    task = asyncio.create_task(site.fetch())
    await asyncio.to_thread(fault.reached.wait, 20)
    await weights_at(site, 1_000_000)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert site.visible() == []
    await asyncio.to_thread(wait_until, lambda: not transfers())
    fetched = await site.fetch()
    assert fetched.reused_bytes >= 1_000_000
    assert cdn_ranges(hub)[-1] == "bytes=1000000-"
    assert site.content() == FILES


@pytest.mark.parametrize(
    "phase", [Phase.PLANNING, Phase.DOWNLOADING, Phase.VERIFYING, Phase.COMMITTING]
)
async def test_a_cancel_in_any_phase_leaves_nothing_visible(site: Site, phase: Phase) -> None:
    """Also in the last millisecond: cancelled means that there is nothing."""
    tasks: list[asyncio.Task[object]] = []

    def cancel(report: object) -> None:
        if getattr(report, "phase", None) is phase:
            tasks[0].cancel()

    tasks.append(asyncio.create_task(site.fetch(report=cancel)))
    with pytest.raises(asyncio.CancelledError):
        await tasks[0]
    assert site.visible() == []
    await site.fetch()
    assert site.content() == FILES
    assert await site.files.check({"tiny": [1]}, deep=True, repair=False) == ()


async def test_two_models_that_share_a_file_fetch_it_once(site: Site, hub: LoopbackHub) -> None:
    """At the same time: one writes, the other waits and finds it there."""
    hub.repos["org/other"] = Repo({"model.safetensors": WEIGHTS, "other.json": b"{}"})
    await asyncio.gather(site.fetch(), site.fetch("hf://org/other", "other"))
    assert site.content() == FILES
    assert site.content("other")["model.safetensors"] == WEIGHTS
    assert hub.sent_bytes("cdn") == len(WEIGHTS)
    assert (await site.files.use()).blob_bytes == sum(map(len, FILES.values())) + 2


async def test_one_of_two_sharing_downloads_is_cancelled(site: Site, hub: LoopbackHub) -> None:
    """The other takes over what was there."""
    hub.repos["org/other"] = Repo({"model.safetensors": WEIGHTS})
    fault = hub.fault(Fault(CDN_PATH, stall_after=1_000_000))
    first = asyncio.create_task(site.fetch())
    await asyncio.to_thread(fault.reached.wait, 20)
    await weights_at(site, 1_000_000)
    second = asyncio.create_task(site.fetch("hf://org/other", "other"))
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    await second
    assert site.visible() == ["other/1"]
    assert hub.sent_bytes("cdn") == len(WEIGHTS)


async def test_a_model_deleted_while_another_download_counts_on_its_blobs(
    site: Site, hub: LoopbackHub
) -> None:
    """What a running download has planned with is not taken away."""
    await site.fetch()
    big = safetensors(500_000, seed=3)
    hub.repos["org/other"] = Repo({"model.safetensors": WEIGHTS, "more.safetensors": big})
    fault = hub.fault(Fault(f"/{hashlib.sha256(big).hexdigest()}", stall_after=1000, times=1))
    task = asyncio.create_task(site.fetch("hf://org/other", "other"))
    await asyncio.to_thread(fault.reached.wait, 20)
    assert await site.files.delete_artifact("tiny", 1) < len(WEIGHTS)
    hub.stopping.set()
    await task
    assert site.content("other")["model.safetensors"] == WEIGHTS


async def test_deleting_a_model_drops_its_partial_downloads(site: Site, hub: LoopbackHub) -> None:
    """What a cancelled download left goes with the model."""
    hub.fault(Fault(CDN_PATH, cut_after=300_000, times=1))
    hub.fault(Fault(CDN_PATH, drop=True, times=1000))
    await failure(site)
    assert site.parts()
    assert (await site.files.use()).staging_bytes > 300_000
    assert await site.files.delete_artifact("tiny", 1) >= 300_000
    assert site.parts() == []


async def test_the_file_being_fetched_and_retries_show(site: Site, hub: LoopbackHub) -> None:
    """Attempt and rate are part of the progress."""
    hub.fault(Fault(CDN_PATH, rate=8_000_000))
    await site.fetch()
    moving = [r for r in site.reports if r.phase is Phase.DOWNLOADING and r.bytes_per_second > 0]
    assert moving
    assert all(r.eta_s is not None for r in moving)
    assert any(r.file == "model.safetensors" for r in moving)


async def test_bytes_that_were_kept_are_not_fetched_again(site: Site, hub: LoopbackHub) -> None:
    """An artifact taken out of sight with its bytes kept comes back without its weights travelling."""
    await site.fetch()
    assert await site.files.delete_artifact("tiny", 1, keep_bytes=True) == 0
    assert site.visible() == []
    before = hub.sent_bytes("cdn")
    fetched = await site.fetch()
    assert hub.sent_bytes("cdn") == before
    assert fetched.reused_bytes >= len(WEIGHTS)
    assert site.content() == FILES
    assert await site.files.check({"tiny": [1]}, deep=True, repair=False) == ()


async def test_a_blob_that_only_a_cancelled_download_counted_on_is_no_stray(
    site: Site, hub: LoopbackHub
) -> None:
    """Its model was deleted meanwhile, then the download that wanted the same bytes was cancelled."""
    await site.fetch()
    big = safetensors(500_000, seed=3)
    hub.repos["org/other"] = Repo({"model.safetensors": WEIGHTS, "more.safetensors": big})
    fault = hub.fault(Fault(f"/{hashlib.sha256(big).hexdigest()}", stall_after=1000, times=1))
    task = asyncio.create_task(site.fetch("hf://org/other", "other"))
    await asyncio.to_thread(fault.reached.wait, 20)
    await site.files.delete_artifact("tiny", 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await site.files.check({}, deep=True, repair=False) == ()


@pytest.mark.parametrize("turns", range(6))
async def test_a_cancel_at_the_end_leaves_all_or_nothing(
    site: Site, monkeypatch: pytest.MonkeyPatch, turns: int
) -> None:
    """So many turns of the loop after publication: the caller has the artifact, or it is not there."""
    loop = asyncio.get_running_loop()
    publish = downloads.publish

    def cancel_in(left: int) -> None:
        if left:
            loop.call_soon(cancel_in, left - 1)
        else:
            task.cancel()

    async def published(*given: Any) -> None:
        await publish(*given)
        loop.call_soon(cancel_in, turns)

    monkeypatch.setattr(downloads, "publish", published)
    task = asyncio.create_task(site.fetch())
    await asyncio.wait({task})
    assert site.visible() == ([] if task.cancelled() else ["tiny/1"])
