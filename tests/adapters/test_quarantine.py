"""The quarantine on disk: what is told of an entry, what releasing it does, and what names may do."""

import hashlib
import json
import os
from pathlib import Path

import pytest

from modelhostd.adapters.blobs import BlobStore, StoreConfig
from modelhostd.adapters.files import FileStore
from modelhostd.adapters.trees import TreeStore
from modelhostd.core.errors import ModelhostError, Reason
from tests.adapters.store_support import manifest_of, publish, verified

GOOD, BAD = b"what was promised", b"what came instead"


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class Store:
    """A store with one artifact, whose only file has gone bad."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.blobs = BlobStore(StoreConfig(home))
        self.trees = TreeStore(self.blobs)
        self.files = FileStore(self.blobs, self.trees)

    async def go_bad(self) -> None:
        publish(self.blobs, self.trees, "tiny", 1, {"sub/w.bin": GOOD})
        file = self.files.model_dir("tiny", 1) / "sub/w.bin"
        file.chmod(0o600)
        file.write_bytes(BAD)
        await self.files.verify("tiny", 1, lambda progress: None)

    def note(self, name: str, **fields: object) -> None:
        """Put a file and a note of one's own making into quarantine."""
        (self.home / "quarantine" / name).write_bytes(BAD)
        (self.home / "quarantine" / f"{name}.json").write_text(json.dumps(fields))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "home")


async def test_a_bad_file_is_told_with_all_that_is_known(store: Store) -> None:
    """Model, path, size and both digests of a file whose bytes changed on disk."""
    await store.go_bad()
    (entry,) = await store.files.quarantined()
    assert (entry.model, entry.path, entry.size_bytes) == ("tiny", "sub/w.bin", len(BAD))
    assert (entry.expected, entry.actual) == (sha(GOOD), sha(BAD))
    assert sha(GOOD) in entry.message
    assert entry.create_time > 0


async def test_a_released_file_is_what_the_next_download_takes(store: Store) -> None:
    """It stands for the digest that was promised, under the one that it has; its note is gone."""
    await store.go_bad()
    (entry,) = await store.files.quarantined()
    assert await store.files.restore_quarantined(entry.name) == "tiny"
    assert store.blobs.verified() == {sha(GOOD): sha(BAD)}
    assert list(store.home.glob("quarantine/*")) == []
    await store.files.delete_artifact("tiny", 1)
    store.trees.publish(manifest_of("tiny", 2, {"sub/w.bin": BAD}), lambda: False)
    assert (store.files.model_dir("tiny", 2) / "sub/w.bin").read_bytes() == BAD
    with pytest.raises(ModelhostError):
        await store.files.restore_quarantined(entry.name)


async def test_a_deleted_file_is_gone_for_good(store: Store) -> None:
    """File and note go; a directory goes whole; twice is harmless."""
    await store.go_bad()
    publish(store.blobs, store.trees, "stray", 3, {"x": b"y"})
    again = FileStore(store.blobs, TreeStore(store.blobs))
    await again.check({"tiny": [1]}, deep=False, repair=True)
    entries = await again.quarantined()
    assert {entry.path for entry in entries} == {"sub/w.bin", "stray/3"}
    for entry in entries:
        await again.delete_quarantined(entry.name)
        await again.delete_quarantined(entry.name)
    assert list(store.home.glob("quarantine/*")) == []


async def test_a_directory_cannot_be_released(store: Store) -> None:
    """What nobody knew has no place to go back to: that is said, and it stays."""
    publish(store.blobs, store.trees, "stray", 3, {"x": b"y"})
    again = FileStore(store.blobs, TreeStore(store.blobs))
    await again.check({}, deep=False, repair=True)
    (entry,) = await again.quarantined()
    with pytest.raises(ModelhostError) as caught:
        await again.restore_quarantined(entry.name)
    assert caught.value.reason is Reason.INVALID_ARGUMENT
    assert len(await again.quarantined()) == 1


@pytest.mark.parametrize(
    "name",
    ["../blobs", "..", "1-" + "a" * 12 + ".json", "1-" + "A" * 12, "", "1-" + "a" * 11, "x\0"],
)
async def test_only_entries_can_be_named(store: Store, name: str) -> None:
    """A name that is none of ours touches nothing."""
    await store.go_bad()
    before = sorted(os.listdir(store.home / "quarantine"))
    for call in (store.files.restore_quarantined, store.files.delete_quarantined):
        with pytest.raises(ModelhostError) as caught:
            await call(name)
        assert caught.value.reason is Reason.INVALID_ARGUMENT
    assert sorted(os.listdir(store.home / "quarantine")) == before


@pytest.mark.parametrize(
    "note",
    [
        {},
        {"key": "../../x", "model": "../y", "file": 7, "expected": ["a"], "actual": None},
        {"key": "a" * 129},
        {"key": "A/B"},
    ],
)
async def test_a_note_is_not_trusted(store: Store, note: dict[str, object]) -> None:
    """Whatever a note says, nothing leaves the store's directories; it is listed as far as it makes sense."""
    name = f"1700000000-{'b' * 12}"
    store.note(name, **note)
    (entry,) = await store.files.quarantined()
    assert (entry.model, entry.expected, entry.actual) == ("", "", "")
    with pytest.raises(ModelhostError):
        await store.files.restore_quarantined(name)
    assert (store.home / "quarantine" / name).exists()


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 10_000, '"x"'])
async def test_a_broken_note_hides_nothing(store: Store, text: str) -> None:
    """An entry whose note cannot be read is listed and can be deleted."""
    name = f"1700000000-{'c' * 12}"
    store.note(name)
    (store.home / "quarantine" / f"{name}.json").write_text(text)
    assert [entry.name for entry in await store.files.quarantined()] == [name]
    await store.files.delete_quarantined(name)
    assert await store.files.quarantined() == []


async def test_pruning_keeps_what_downloads_go_on_with(tmp_path: Path) -> None:
    """Parts go unless their model is being downloaded; fetched files only when old and nobody's."""
    now = [1e12]
    blobs = BlobStore(StoreConfig(tmp_path))
    files = FileStore(blobs, TreeStore(blobs), now=lambda: now[0])
    for model, key in (("busy", "1" * 64), ("idle", "2" * 64)):
        with blobs.claim(key, lambda: False), blobs.open_part(key, 100, model) as part:
            part.write(0, memoryview(b"x" * 50))
    fetched = verified(blobs, b"fetched")
    (tmp_path / "staging" / "trees" / "half").mkdir()
    await files.prune(["busy"])
    assert {p.name[0] for p in tmp_path.glob("staging/parts/*")} == {"1"}
    assert list(blobs.verified()) == [fetched]
    assert list(tmp_path.glob("staging/trees/*")) == []
    with blobs.hold([fetched]):
        await files.prune(())
        assert list(blobs.verified()) == [fetched]
    assert list(tmp_path.glob("staging/parts/*")) == []
    now[0] = 0.0
    await files.prune(())
    assert list(blobs.verified()) == [fetched], "it is younger than any time"
    now[0] = 1e12
    assert (await files.prune(())).freed_bytes == len(b"fetched")
    assert blobs.verified() == {}
