"""Disks that are full or broken: at every write by failpoints, and a real one of eight megabytes."""

import os
import subprocess
from collections.abc import Awaitable, Iterator
from pathlib import Path

import pytest

from bench.loopback_hub import LoopbackHub, Repo
from modelhostd.adapters import failpoints
from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.findings import FindingKind
from modelhostd.core.registry import ModelSpec
from modelhostd.core.resources import ArtifactState, OperationState, Settings, Source
from tests.adapters.downloads_support import FILES, RANGED, Site, tiny
from tests.host.support import Running, World
from tests.support import wait_until_async

POINTS = [name for name in failpoints.NAMES if not name.startswith("database.")]
DISK_BYTES = 8 << 20
MODEL_BYTES = 5 << 20
REASONS = {
    "enospc": Reason.INSUFFICIENT_DISK_SPACE,
    "edquot": Reason.INSUFFICIENT_DISK_SPACE,
    "eio": Reason.STORAGE_ERROR,
}


@pytest.fixture
def hub() -> Iterator[LoopbackHub]:
    """A hub with a small repository and two that fill a disk together."""
    repos = {
        "org/tiny": Repo(FILES),
        "org/one": Repo(tiny(MODEL_BYTES, seed=1)),
        "org/two": Repo(tiny(MODEL_BYTES, seed=2)),
    }
    with LoopbackHub(repos) as hub:
        yield hub


@pytest.fixture
def site(tmp_path: Path, hub: LoopbackHub) -> Iterator[Site]:
    """A home that talks to it; failpoints are disarmed afterwards."""
    yield Site(tmp_path / "home", hub, sync_bytes=256 << 10)
    failpoints.configure("")


async def failed_with(work: Awaitable[object], point: str, fault: str) -> Reason | None:
    """Return what a piece of work fails with on a disk that fails at a point, None if with nothing."""
    failpoints.configure(f"{point}={fault}")
    try:
        await work
    except ModelhostError as error:
        return error.reason
    finally:
        failpoints.configure("")
    return None


async def clean(site: Site, *, visible: bool) -> None:
    """What is there is whole, and nothing is left lying about that is nobody's."""
    expected = {"tiny": [1]} if visible else {}
    found = await site.files.check(expected, deep=True, repair=False)
    assert found == ()
    assert site.visible() == (["tiny/1"] if visible else [])


@pytest.mark.parametrize("fault", list(REASONS))
@pytest.mark.parametrize("how", ["whole", "ranged"])
@pytest.mark.parametrize("point", [point for point in POINTS if not point.startswith("delete.")])
async def test_each_write_of_a_download_may_fail(
    site: Site, hub: LoopbackHub, point: str, how: str, fault: str
) -> None:
    """A typed error and nothing half, or, after the last rename, the whole; the next try ends right."""
    if how == "ranged":
        site = Site(site.home, hub, sync_bytes=256 << 10, streams=RANGED)
    assert await failed_with(site.fetch(), point, fault) is REASONS[fault]
    if site.visible():
        assert site.content() == FILES
    await site.fetch()
    assert site.content() == FILES
    await clean(site, visible=True)
    await site.files.recover()
    assert (await site.files.use()).staging_bytes == 0


@pytest.mark.parametrize("fault", list(REASONS))
@pytest.mark.parametrize("point", [point for point in POINTS if point.startswith("delete.")])
async def test_each_step_of_a_deletion_may_fail(site: Site, point: str, fault: str) -> None:
    """The error is typed; what is left is out of sight, and the next start takes it away."""
    await site.fetch()
    deletion = site.files.delete_artifact("tiny", 1)
    assert await failed_with(deletion, point, fault) is REASONS[fault]
    if site.visible():
        assert site.content() == FILES
        await site.files.delete_artifact("tiny", 1)
    await site.files.recover()
    await clean(site, visible=False)
    assert (await site.files.use()).blob_count == 0
    await site.fetch()
    assert site.content() == FILES


async def test_a_verification_of_a_broken_disk_says_so(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """EIO while a file is read: a finding with what was expected, and the file is not trusted any more."""
    await site.fetch()
    read = site.files.model_dir("tiny", 1) / "model.safetensors"
    inode = read.stat().st_ino
    readv = os.readv

    def broken(fd: int, buffers: list[memoryview]) -> int:
        if os.fstat(fd).st_ino == inode:
            raise OSError(5, "Input/output error")
        return readv(fd, buffers)

    monkeypatch.setattr(os, "readv", broken)
    (finding,) = await site.files.verify("tiny", 1, lambda _: None)
    assert finding.kind is FindingKind.CORRUPT_FILE
    assert "EIO" in finding.actual
    assert len(await site.files.quarantined()) == 1


# --- a disk of eight megabytes ------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own with eight megabytes."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "none", str(place)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True, timeout=120, check=False)
    except FileNotFoundError:
        pytest.skip("mount is not present")
    if done.returncode:
        pytest.skip(f"no mounts here: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], capture_output=True, timeout=120, check=False)


async def test_what_does_not_fit_is_refused_with_the_numbers_of_the_disk(
    small_disk: Path, hub: LoopbackHub
) -> None:
    """Before the first byte; once there is room it comes."""
    site = Site(small_disk / "home", hub)
    await site.fetch("hf://org/one", "one")
    before = hub.sent_bytes("cdn")
    with pytest.raises(ModelhostError) as caught:
        await site.fetch("hf://org/two", "two")
    assert caught.value.reason is Reason.INSUFFICIENT_DISK_SPACE
    assert int(caught.value.metadata["freeBytes"]) < DISK_BYTES - MODEL_BYTES
    assert hub.sent_bytes("cdn") == before
    assert site.visible() == ["one/1"]
    await site.files.delete_artifact("one", 1)
    await site.fetch("hf://org/two", "two")
    assert site.content("two") == tiny(MODEL_BYTES, seed=2)


async def test_a_disk_that_is_full_in_the_middle_keeps_what_came(
    small_disk: Path, hub: LoopbackHub
) -> None:
    """Another program takes the space that was promised: ENOSPC, and the rest alone is fetched later."""
    site = Site(small_disk / "home", hub, free_bytes=lambda: (1 << 40, 1 << 40))
    hog = small_disk / "hog"
    hog.write_bytes(bytes(5 << 20))
    with pytest.raises(ModelhostError) as caught:
        await site.fetch("hf://org/one", "one")
    assert caught.value.reason is Reason.INSUFFICIENT_DISK_SPACE
    assert site.visible() == []
    kept = sum(part.stat().st_size for part in site.parts())
    assert kept > 1 << 20
    hog.unlink()
    fetched = await site.fetch("hf://org/one", "one")
    assert site.content("one") == tiny(MODEL_BYTES, seed=1)
    assert 0 < fetched.reused_bytes <= kept
    assert await site.files.check({"one": [1]}, deep=True, repair=False) == ()


def host_on(world: World, site: Site) -> World:
    """Let the host of a world work on a real disk with real downloads."""
    world.files = site.files  # type: ignore[assignment]
    world.downloads = site.downloads  # type: ignore[assignment]
    return world


async def pulled(run: Running, model: str) -> str:
    """Register a model and begin its download; return the operation's id."""
    await run.host.models.create(ModelSpec(Source(f"hf://org/{model}")), model)
    return (await run.host.transfers.download(model)).id


async def test_a_full_disk_pauses_a_download_until_there_is_room(
    small_disk: Path, tmp_path: Path, hub: LoopbackHub
) -> None:
    """PAUSED with the numbers; a deletion makes room, and it goes on by itself to the end."""
    world = host_on(World(tmp_path), Site(small_disk / "home", hub))
    async with world.host() as run:
        table = run.host.operations
        await run.ended(await pulled(run, "one"))
        key = await pulled(run, "two")
        await wait_until_async(lambda: table.get(key).state is OperationState.PAUSED)
        retry = table.get(key).progress.retry
        assert retry is not None
        assert retry.reason == Reason.INSUFFICIENT_DISK_SPACE.value
        await run.end(await run.host.models.delete("one", force=False))
        await world.clock.advance(6.0)

        async def over() -> bool:
            await world.clock.advance(1.0)
            return table.get(key).state is OperationState.SUCCEEDED

        await wait_until_async(over)


async def test_a_policy_makes_room_on_a_real_disk(
    small_disk: Path, tmp_path: Path, hub: LoopbackHub
) -> None:
    """The one on disk goes for the one that is asked for, whole and verified."""
    site = Site(small_disk / "home", hub)
    world = host_on(World(tmp_path), site)
    async with world.host() as run:
        await run.host.update_settings(Settings(storage_policy="lru"), ["storage_policy"])
        await run.ended(await pulled(run, "one"))
        assert await run.ended(await pulled(run, "two")) is OperationState.SUCCEEDED
        assert run.host.models.get("one").state is ArtifactState.ABSENT
        assert site.visible() == ["two/1"]
        assert site.content("two") == tiny(MODEL_BYTES, seed=2)
        assert await site.files.check({"two": [1]}, deep=True, repair=False) == ()
