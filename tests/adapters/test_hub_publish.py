"""What was fetched is in the Hugging Face cache, too, where the library itself finds it without a network."""

import asyncio
import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.loopback_hub import LoopbackHub, Repo
from modelhostd.adapters.downloads import SourceDownloads
from modelhostd.adapters.hub import Hub, HubConfig
from modelhostd.adapters.hub_cache import HubCache
from modelhostd.adapters.hub_library import library
from modelhostd.adapters.hub_publish import HubPublisher
from modelhostd.core.resources import Phase, Progress
from tests.adapters.downloads_support import FILES, PATIENT, SHA256, WEIGHTS, Site

NAME = "models--org--tiny"


@pytest.fixture
def hub() -> Iterator[LoopbackHub]:
    """A hub with one repository."""
    with LoopbackHub({"org/tiny": Repo(FILES)}) as made:
        yield made


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A cache that is not there yet."""
    return tmp_path / "cache" / "hub"


@pytest.fixture
def site(tmp_path: Path, hub: LoopbackHub, root: Path) -> Site:
    """A home whose downloads read the cache and are published in it."""
    return made(tmp_path / "home", hub, root)


def made(home: Path, hub: LoopbackHub, root: Path) -> Site:
    """Return such a home."""
    site = Site(home, hub)
    adapter = Hub(HubConfig(endpoint=hub.endpoint, credential=site.credential, retry=PATIENT))
    site.downloads = SourceDownloads(  # type: ignore[assignment]
        {"hf": adapter},
        site.store,
        site.trees,
        cache=HubCache(root),
        publisher=HubPublisher(root, site.store),
    )
    return site


def offline(root: Path, revision: str | None = None) -> dict[str, bytes]:
    """Return what the library finds without asking anybody."""
    folder = Path(
        library().snapshot_download(
            "org/tiny", cache_dir=root, local_files_only=True, revision=revision
        )
    )
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


async def test_the_library_finds_it_offline(site: Site, root: Path) -> None:
    """The snapshot, each file, and by the name of the branch and of the commit."""
    fetched = await site.fetch()
    commit = fetched.facts.revision
    assert offline(root) == offline(root, "main") == offline(root, commit) == FILES
    for path, data in FILES.items():
        found = library().try_to_load_from_cache("org/tiny", path, cache_dir=root)
        assert Path(str(found)).read_bytes() == data
        again = library().hf_hub_download("org/tiny", path, cache_dir=root, local_files_only=True)
        assert Path(again).read_bytes() == data
    scanned = library().scan_cache_dir(root)
    assert scanned.warnings == []
    (repo,) = scanned.repos
    assert repo.repo_id == "org/tiny"
    assert {revision.commit_hash for revision in repo.revisions} == {commit}
    assert not list(root.rglob("*.incomplete"))


async def test_its_files_are_nobody_elses(site: Site, root: Path) -> None:
    """What others do to the cache is done to no blob; links are relative and lead into the cache."""
    await site.fetch()
    blob = root / NAME / "blobs" / SHA256
    own = site.files.model_dir("tiny", 1) / "model.safetensors"
    assert blob.stat().st_ino != own.stat().st_ino
    assert blob.stat().st_nlink == 1
    blob.write_bytes(b"spoiled")
    assert site.content() == FILES
    for link in (root / NAME / "snapshots").rglob("*"):
        if link.is_symlink():
            assert not os.readlink(link).startswith("/")
            assert link.resolve().is_relative_to(root)


async def test_a_new_revision_stands_beside_the_old_one(
    site: Site, root: Path, hub: LoopbackHub
) -> None:
    """Files that are the same are there once; the branch names the new one."""
    first = (await site.fetch()).facts.revision
    inode = (root / NAME / "blobs" / SHA256).stat().st_ino
    hub.repos["org/tiny"].commit({**FILES, "config.json": b'{"new": 1}'})
    second = (await site.fetch(version=2)).facts.revision
    assert offline(root, first) == FILES
    assert offline(root) == offline(root, second) == {**FILES, "config.json": b'{"new": 1}'}
    assert (root / NAME / "blobs" / SHA256).stat().st_ino == inode


async def test_a_snapshot_of_the_librarys_is_added_to(
    site: Site, root: Path, hub: LoopbackHub
) -> None:
    """One that has a file less gets it; what it has is left as it is."""
    commit = hub.repos["org/tiny"].head
    snapshot = root / NAME / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (root / NAME / "blobs").mkdir()
    (root / NAME / "blobs" / "mine").write_bytes(FILES["config.json"])
    (snapshot / "config.json").symlink_to("../../blobs/mine")
    await site.fetch()
    assert os.readlink(snapshot / "config.json") == "../../blobs/mine"
    assert offline(root) == FILES


async def test_what_the_cache_lost_comes_back(site: Site, root: Path, tmp_path: Path) -> None:
    """A blob of another size is replaced by one rename."""
    await site.fetch()
    blob = root / NAME / "blobs" / SHA256
    blob.unlink()
    blob.write_bytes(b"cut")
    await made(tmp_path / "another", site.hub, root).fetch()
    assert blob.read_bytes() == WEIGHTS


@pytest.mark.parametrize("trouble", ["a-file", "a-link", "not-writable"])
async def test_a_cache_that_cannot_be_written_fails_nothing(
    site: Site, root: Path, tmp_path: Path, trouble: str
) -> None:
    """The model is there; where a link leads is left alone."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    if trouble == "a-file":
        root.parent.mkdir()
        root.write_bytes(b"no folder")
    elif trouble == "a-link":
        root.mkdir(parents=True)
        (root / NAME).symlink_to(elsewhere)
    else:
        (root / NAME / "blobs").mkdir(parents=True)
        (root / NAME / "snapshots").write_bytes(b"no folder")
    await site.fetch()
    assert site.content() == FILES
    assert list(elsewhere.iterdir()) == []


async def test_a_cache_on_another_file_system_is_copied_to(
    site: Site, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the kernel does not copy between two, by the other way."""

    def refuse(*_: object) -> int:
        raise OSError(errno.EXDEV, "another file system")

    monkeypatch.setattr(os, "copy_file_range", refuse)
    monkeypatch.setattr("modelhostd.adapters.hub_publish.COPY_BYTES", 300_000)
    await site.fetch()
    assert offline(root) == FILES


async def test_a_cache_without_room_is_left_alone(
    site: Site, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is free belongs to downloads first."""
    monkeypatch.setattr("modelhostd.adapters.hub_publish.FREE_BYTES_MIN", 1 << 60)
    await site.fetch()
    assert site.content() == FILES
    assert not list((root / NAME / "blobs").iterdir())
    assert not (root / NAME / "snapshots").exists()


async def test_a_cancel_leaves_nothing_half(site: Site, root: Path) -> None:
    """Neither in the store nor, under a name that counts, in the cache; the next attempt ends right."""
    tasks: list[asyncio.Task[object]] = []

    def cancel(report: Progress) -> None:
        if report.phase is Phase.COMMITTING:
            tasks[0].cancel()

    tasks.append(asyncio.create_task(site.fetch(report=cancel)))
    with pytest.raises(asyncio.CancelledError):
        await tasks[0]
    for blob in (root / NAME / "blobs").glob("*"):
        assert blob.name.endswith(".incomplete") or blob.stat().st_size in map(len, FILES.values())
    await site.fetch()
    assert offline(root) == FILES
