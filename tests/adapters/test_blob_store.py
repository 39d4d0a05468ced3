"""The store on disk: links, modes, order of renames, symlinks in the way."""

import gc
import hashlib
import os
import stat
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from modelhostd.adapters.blobs import BlobStore, Stopped, StoreConfig
from modelhostd.adapters.files import FileStore
from modelhostd.adapters.layout import Home, blob_at, tree_at
from modelhostd.adapters.trees import TreeStore
from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.resources import ModelFile
from tests.adapters.store_support import manifest_of, publish, verified
from tests.core.attempt import attempt

CONTENT = {"config.json": b"{}", "sub/deep/model.safetensors": b"weights" * 100, "copy.json": b"{}"}


class Store:
    """A store in a temporary home."""

    def __init__(self, home: Path, **config: object) -> None:
        self.home = home
        self.blobs = BlobStore(replace(StoreConfig(home, reserve_bytes=0), **config))  # type: ignore[arg-type]
        self.reopen()

    def reopen(self) -> None:
        """As after a restart: this process published nothing."""
        self.trees = TreeStore(self.blobs)
        self.files = FileStore(self.blobs, self.trees, now=lambda: self.now)

    now = 1e12

    def put(self, model: str = "tiny", version: int = 1) -> tuple[ModelFile, ...]:
        return publish(self.blobs, self.trees, model, version, CONTENT)


@pytest.fixture
async def store(tmp_path: Path) -> Store:
    """An empty store."""
    return Store(tmp_path / "home")


def modes(root: Path) -> dict[str, str]:
    """Return path -> type and mode of everything below a directory."""
    return {
        str(path.relative_to(root)): stat.filemode(path.lstat().st_mode)
        for path in sorted(root.rglob("*"))
    }


async def test_files_are_read_only_links_and_directories_are_private(store: Store) -> None:
    """Blobs 0444 and shared by digest, directories 0700, two paths of one digest are one blob."""
    store.put()
    found = modes(store.home)
    assert {mode for mode in found.values() if mode.startswith("d")} == {"drwx------"}
    root = store.files.model_dir("tiny", 1)
    assert os.stat(root / "config.json").st_ino == os.stat(root / "copy.json").st_ino
    assert found["models/tiny/1/files/sub/deep/model.safetensors"] == "-r--r--r--"
    assert (
        sum(path.startswith("blobs/sha256/") and mode[0] == "-" for path, mode in found.items())
        == 2
    )
    assert not [path for path in found if path.startswith("staging/") and path.count("/") > 1]


@pytest.mark.parametrize(
    "digest",
    [
        "",
        "..",
        "../../etc/passwd",
        "a" * 63,
        "a" * 65,
        "A" * 64,
        "a" * 64 + "\n",
        "g" * 64,
        "/" * 64,
    ],
    ids=ascii,
)
def test_only_a_digest_makes_a_blobs_path(digest: str) -> None:
    """Nothing else, also not with a newline behind it."""
    with pytest.raises(ModelhostError) as caught:
        blob_at(digest)
    assert caught.value.reason is Reason.UNSAFE_FILE


@pytest.mark.parametrize("model", ["", "..", "a/b", "A", "a\n", ".hidden", "\u0430"], ids=ascii)
def test_only_an_id_and_a_version_make_a_trees_path(model: str) -> None:
    """As the registry checks them, once more where the path is made."""
    with pytest.raises(ModelhostError):
        tree_at(model, 1)
    with pytest.raises(ModelhostError):
        tree_at("fine", 0)


@pytest.mark.parametrize(
    "where", ["models", "models/tiny", "staging/trees", "blobs/sha256", "staging/verified"]
)
async def test_a_symlink_in_the_way_is_not_followed(
    store: Store, tmp_path: Path, where: str
) -> None:
    """Whoever can write into the home cannot make the daemon write outside of it."""
    outside = tmp_path / "outside"
    outside.mkdir()
    place = store.home / where
    if place.exists():
        place.rename(tmp_path / "moved")
    place.symlink_to(outside)
    with pytest.raises(ModelhostError) as caught:
        store.put()
    assert caught.value.reason is Reason.STORAGE_ERROR
    assert list(outside.iterdir()) == []


async def test_a_symlink_for_a_file_is_not_followed(store: Store, tmp_path: Path) -> None:
    """A part that is a link to elsewhere is refused, and elsewhere is untouched."""
    secret = tmp_path / "secret"
    secret.write_bytes(b"precious")
    digest = hashlib.sha256(b"x").hexdigest()
    (store.home / "staging" / "parts" / f"{digest}.part").symlink_to(secret)
    with pytest.raises((ModelhostError, OSError)):
        verified(store.blobs, b"x")
    assert secret.read_bytes() == b"precious"


async def test_a_directory_swapped_with_a_symlink_while_publishing(
    store: Store, tmp_path: Path
) -> None:
    """A thread swaps directory and link all the time: nothing appears outside."""
    outside = tmp_path / "outside"
    outside.mkdir()
    place, aside = store.home / "models" / "tiny", tmp_path / "aside"
    stop = threading.Event()

    def swap() -> None:
        while not stop.is_set():
            for before, after in ((place, aside), (aside, place)):
                attempt_rename(before, after)
            attempt_symlink(place, outside)
            attempt_unlink(place)

    thread = threading.Thread(target=swap)
    thread.start()
    try:
        for version in range(1, 120):
            attempt(lambda version=version: store.put(version=version))
    finally:
        stop.set()
        thread.join()
    assert list(outside.iterdir()) == []


def attempt_rename(before: Path, after: Path) -> None:
    """Rename if that works now."""
    try:
        before.rename(after)
    except OSError:
        return


def attempt_symlink(place: Path, target: Path) -> None:
    """Put a symbolic link there if nothing is."""
    try:
        place.symlink_to(target)
    except OSError:
        return


def attempt_unlink(place: Path) -> None:
    """Remove it if it is a link."""
    try:
        place.unlink()
    except OSError:
        return


async def test_a_home_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    """A file where the home should be; a home below one."""
    (tmp_path / "file").write_text("x")
    for home in (tmp_path / "file", tmp_path / "file" / "home"):
        with pytest.raises(ModelhostError) as caught:
            Home(home)
        assert caught.value.reason is Reason.STORAGE_ERROR
        assert str(tmp_path / "file") in caught.value.message


async def test_publishing_again_replaces_what_a_crash_left(store: Store) -> None:
    """The same version anew: the new files, the old blobs gone."""
    store.put()
    data = {"new.json": b"[]"}
    publish(store.blobs, store.trees, "tiny", 1, data)
    assert [file.path for file in await store.files.list_files("tiny", 1)] == ["new.json"]
    assert (await store.files.use()).blob_bytes == 2


async def test_a_blob_of_the_wrong_size_is_replaced(store: Store) -> None:
    """Truncated behind our back: not believed, and the fresh bytes take its place."""
    files = store.put()
    blob = store.home.joinpath(*blob_at(files[0].sha256))
    blob.unlink()
    blob.write_bytes(b"")
    assert not store.blobs.has_blob(files[0].sha256, files[0].size_bytes)
    store.put()
    assert await store.files.check({"tiny": [1]}, deep=True, repair=False) == ()


async def test_a_blob_missing_at_publication_fails_whole(store: Store) -> None:
    """Nothing becomes visible without all of it."""
    with pytest.raises(ModelhostError) as caught:
        store.trees.publish(manifest_of("tiny", 1, CONTENT), lambda: False)
    assert caught.value.reason is Reason.STORAGE_ERROR
    assert not (store.home / "models" / "tiny" / "1").exists()
    assert list((store.home / "staging" / "trees").iterdir()) == []


async def test_publishing_stops_when_cancelled_in_time(store: Store) -> None:
    """Before the rename."""
    for data in CONTENT.values():
        verified(store.blobs, data)
    with pytest.raises(Stopped):
        store.trees.publish(manifest_of("tiny", 1, CONTENT), lambda: True)
    assert not (store.home / "models" / "tiny").exists()


async def test_a_claim_is_waited_for_and_can_be_given_up(store: Store) -> None:
    """One writer per part; a cancelled waiter leaves."""
    with (
        store.blobs.claim("key", lambda: False),
        pytest.raises(Stopped),
        store.blobs.claim("key", lambda: True),
    ):
        pass
    with store.blobs.claim("key", lambda: True):
        assert store.blobs.claimed("key")
    assert not store.blobs.claimed("key")


async def test_reservations_add_up(store: Store) -> None:
    """What is written comes off, what ends is given back."""
    blobs = Store(store.home, free_bytes=lambda: (100, 1000)).blobs
    with blobs.reserve("one", 60) as written:
        with pytest.raises(ModelhostError) as caught, blobs.reserve("two", 60):
            pass
        assert caught.value.metadata["freeBytes"] == "40"
        written(30)
        with blobs.reserve("two", 60):
            pass
    with blobs.reserve("three", 100):
        pass


async def test_many_versions_share_what_is_equal(store: Store) -> None:
    """Ten versions, one set of blobs, freed with the last."""
    for version in range(1, 11):
        store.put(version=version)
    total = 700 + 2
    assert (await store.files.use()).blob_bytes == total
    freed = [await store.files.delete_artifact("tiny", version) for version in range(1, 11)]
    assert freed == [0] * 9 + [total]


def test_a_store_that_nobody_closes_keeps_no_descriptor(tmp_path: Path) -> None:
    """The home's descriptor goes with its object, and closing it twice is harmless."""
    before = set(os.listdir("/proc/self/fd"))
    store = BlobStore(StoreConfig(tmp_path / "dropped"))
    closed = BlobStore(StoreConfig(tmp_path / "closed"))
    closed.close()
    closed.close()
    del store, closed
    gc.collect()
    assert set(os.listdir("/proc/self/fd")) <= before
