"""A Hugging Face cache beside the daemon: what is in it is not fetched, and never believed."""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.loopback_hub import LoopbackHub, Repo
from modelhostd.adapters.downloads import SourceDownloads
from modelhostd.adapters.hub import Hub, HubConfig
from modelhostd.adapters.hub_cache import HubCache
from tests.adapters.downloads_support import FILES, PATIENT, SHA256, WEIGHTS, Site, cdn_ranges


@pytest.fixture
def hub() -> Iterator[LoopbackHub]:
    """A hub with one repository."""
    with LoopbackHub({"org/tiny": Repo(FILES)}) as made:
        yield made


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """An empty cache."""
    made = tmp_path / "hub"
    (made / "models--org--tiny" / "blobs").mkdir(parents=True)
    return made


@pytest.fixture
def site(tmp_path: Path, hub: LoopbackHub, root: Path) -> Site:
    """A home whose downloads look into the cache."""
    made = Site(tmp_path / "home", hub)
    adapter = Hub(HubConfig(endpoint=hub.endpoint, credential=made.credential, retry=PATIENT))
    made.downloads = SourceDownloads(  # type: ignore[assignment]
        {"hf": adapter}, made.store, made.trees, cache=HubCache(root)
    )
    return made


def put(root: Path, data: bytes, name: str = SHA256, repository: str = "models--org--tiny") -> Path:
    """Put a file into the cache."""
    path = root / repository / "blobs" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


async def test_a_file_of_the_cache_is_not_fetched(site: Site, root: Path) -> None:
    """It is copied, whichever repository has it; its bytes count as reused, and the cache stays."""
    kept = put(root, WEIGHTS, repository="models--another--name")
    fetched = await site.fetch()
    assert cdn_ranges(site.hub) == []
    assert fetched.reused_bytes == len(WEIGHTS)
    assert site.content() == FILES
    assert kept.read_bytes() == WEIGHTS
    assert (
        kept.stat().st_ino != (site.files.model_dir("tiny", 1) / "model.safetensors").stat().st_ino
    )
    assert await site.files.check({"tiny": [1]}, deep=True, repair=False) == ()


async def test_a_small_file_is_found_by_its_git_digest(site: Site, root: Path) -> None:
    """The Hub names those by SHA-1, and so does its cache."""
    data = FILES["config.json"]
    header = b"blob %d\0" % len(data)
    put(root, data, hashlib.sha1(header + data, usedforsecurity=False).hexdigest())
    assert (await site.fetch()).reused_bytes == len(data)
    assert site.content() == FILES


@pytest.mark.parametrize(
    "data",
    [WEIGHTS[:-1] + bytes([WEIGHTS[-1] ^ 1]), WEIGHTS[:-1], b""],
    ids=["flipped", "short", "empty"],
)
async def test_what_is_not_what_its_name_says_is_fetched(
    site: Site, root: Path, data: bytes
) -> None:
    """Every byte comes from the source, nothing is in quarantine, and the cache stays as it was."""
    kept = put(root, data)
    fetched = await site.fetch()
    assert fetched.reused_bytes == 0
    assert site.content() == FILES
    assert site.parts() == site.quarantined() == []
    assert kept.read_bytes() == data


@pytest.mark.parametrize("kind", ["outside", "inside", "folder", "fifo", "dangling"])
async def test_links_are_followed_inside_the_cache_only(
    site: Site, root: Path, tmp_path: Path, kind: str
) -> None:
    """The cache's own store of shared files is; what leads out, or is no file, is not there."""
    path = root / "models--org--tiny" / "blobs" / SHA256
    if kind == "outside":
        (tmp_path / "secret").write_bytes(WEIGHTS)
        path.symlink_to(tmp_path / "secret")
    elif kind == "inside":
        (root / "blobs" / "ab").mkdir(parents=True)
        (root / "blobs" / "ab" / "x").write_bytes(WEIGHTS)
        path.symlink_to("../../blobs/ab/x")
    elif kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to("nowhere")
    fetched = await site.fetch()
    assert fetched.reused_bytes == (len(WEIGHTS) if kind == "inside" else 0)
    assert site.content() == FILES


async def test_a_cache_that_is_not_there_is_an_empty_one(site: Site, root: Path) -> None:
    """Everything is fetched."""
    os.rmdir(root / "models--org--tiny" / "blobs")
    os.rmdir(root / "models--org--tiny")
    os.rmdir(root)
    assert (await site.fetch()).reused_bytes == 0
    assert site.content() == FILES
