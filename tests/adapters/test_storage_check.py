"""Registry against disk: findings, repairs that are safe, and twice in a row the same."""

import asyncio
import json
import os
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from modelhostd.adapters.blobs import BlobStore, StoreConfig
from modelhostd.adapters.files import FileStore
from modelhostd.adapters.layout import blob_at
from modelhostd.adapters.storage_check import StorageCheck
from modelhostd.adapters.trees import TreeStore
from modelhostd.core.findings import FindingKind
from modelhostd.core.resources import ModelFile
from tests.adapters.store_support import manifest_of, publish, verified
from tests.support import DEADLINE_S

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


async def test_repairs_put_links_back(store: Store) -> None:
    """A lost file whose blob is there, a lost blob whose file is there."""
    files = {file.path: file for file in store.put()}
    tree = store.files.model_dir("tiny", 1)
    (tree / "config.json").unlink()
    weights = files["sub/deep/model.safetensors"]
    store.home.joinpath(*blob_at(weights.sha256)).unlink()
    found = await store.files.check({"tiny": [1]}, deep=False, repair=False)
    assert {(f.kind, f.repairable, f.repaired) for f in found} == {
        (FindingKind.MISSING_FILE, True, False),
        (FindingKind.MISSING_BLOB, True, False),
    }
    repaired = await store.files.check({"tiny": [1]}, deep=False, repair=True)
    assert all(finding.repaired for finding in repaired)
    assert await store.files.check({"tiny": [1]}, deep=True, repair=False) == ()


async def test_what_cannot_be_repaired_is_told(store: Store) -> None:
    """A file without blob, another size, a broken manifest, a file too many."""
    files = {file.path: file for file in store.put()}
    weights = files["sub/deep/model.safetensors"]
    tree = store.files.model_dir("tiny", 1)
    path = tree / weights.path
    store.home.joinpath(*blob_at(weights.sha256)).unlink()
    path.chmod(0o600)
    path.write_bytes(b"short")
    (tree / "extra\n.txt").write_text("x")
    found = await store.files.check({"tiny": [1]}, deep=True, repair=True)
    assert {f.kind for f in found} == {FindingKind.WRONG_SIZE, FindingKind.EXTRA_FILE}
    assert all(f.message.isprintable() and not f.repaired for f in found)
    path.unlink()
    found = await store.files.check({"tiny": [1]}, deep=True, repair=True)
    assert {f.kind for f in found} == {FindingKind.MISSING_FILE, FindingKind.EXTRA_FILE}
    (tree.parent / "manifest.json").write_text("{")
    found = await store.files.check({"tiny": [1]}, deep=True, repair=True)
    assert {f.kind for f in found} == {FindingKind.BROKEN_MANIFEST}


async def test_a_stray_tree_goes_to_quarantine_with_a_note(store: Store) -> None:
    """It could be somebody's only copy: it is moved, not deleted; whatever it is called."""
    store.put("stray", 3)
    store.reopen()
    (store.home / "models" / "odd name\n").mkdir()
    (store.home / "models" / "odd name\n" / "x").write_text("y")
    (store.home / "models" / "file").write_text("z")
    found = await store.files.check({}, deep=False, repair=True)
    assert {f.kind for f in found if "odd" in f.name or "stray" in f.name or f.name == "file/"} == {
        FindingKind.STRAY_TREE
    }
    notes = [json.loads(p.read_text()) for p in (store.home / "quarantine").glob("*.json")]
    assert {note["tree"] for note in notes} >= {"stray/3"}
    assert list((store.home / "models").iterdir()) == []
    assert (await store.files.use()).quarantine_bytes > 0
    assert await store.files.check({}, deep=True, repair=False) == ()


async def test_what_this_process_published_is_no_stray_tree(store: Store) -> None:
    """Its row may still be on the way to the database."""
    store.put()
    assert await store.files.check({}, deep=False, repair=True) == ()
    assert len(await store.files.list_files("tiny", 1)) == 3


async def test_leftovers_are_removed_and_fresh_partial_downloads_kept(store: Store) -> None:
    """Half-built trees and trash at once; parts and verified files when they are a week old."""
    staging = store.home / "staging"
    (staging / "trees" / "half").mkdir()
    (staging / "trash" / "half").write_text("x")
    (staging / "parts" / "key.part").write_text("x")
    digest = verified(store.blobs, b"whole")
    store.now = 0.0
    found = await store.files.check({}, deep=False, repair=True)
    assert {(f.kind, f.name) for f in found} == {
        (FindingKind.LEFTOVER_STAGING, "staging/trees/half"),
        (FindingKind.LEFTOVER_STAGING, "staging/trash/half"),
    }
    store.now = 1e12
    found = await store.files.check({}, deep=False, repair=True)
    assert {f.name for f in found} == {"staging/parts/key.part", f"staging/verified/{digest}"}
    assert await store.files.check({}, deep=False, repair=False) == ()


async def test_recovery_finishes_an_interrupted_deletion(store: Store) -> None:
    """Trash with a manifest: its blobs go with it, shared ones stay."""
    store.put("one")
    store.put("two")
    tree = store.home / "models" / "one" / "1"
    tree.rename(store.home / "staging" / "trash" / "one-1-x")
    await store.files.recover()
    assert len(await store.files.list_files("two", 1)) == 3
    await store.files.delete_artifact("two", 1)
    assert (await store.files.use()).blob_count == 0
    assert list((store.home / "staging" / "trash").iterdir()) == []


async def test_manifests_are_read_back_for_a_lost_registry(store: Store) -> None:
    """Every good one, and the broken ones by name; a manifest in the wrong place is not believed."""
    entry = {"display_name": "Tiny", "labels": {"a": "b"}}
    for data in CONTENT.values():
        verified(store.blobs, data)
    store.trees.publish(manifest_of("tiny", 2, CONTENT, entry), lambda: False)
    store.put("other")
    store.put("moved")
    (store.home / "models" / "moved" / "1").rename(store.home / "models" / "moved" / "7")
    (store.home / "models" / "junk").mkdir()
    (store.home / "models" / "junk" / "1").mkdir()
    good, broken = await store.files.read_manifests()
    assert [(m.model, m.version) for m in good] == [("other", 1), ("tiny", 2)]
    assert good[1].entry == entry
    assert [f.name for f in broken] == ["junk/1", "moved/7"]


async def test_a_corrupt_blob_is_taken_out_of_the_store(store: Store) -> None:
    """So that the next download fetches it; the model's directory stays readable until then."""
    files = {file.path: file for file in store.put()}
    weights = files["sub/deep/model.safetensors"]
    path = store.files.model_dir("tiny", 1) / weights.path
    path.chmod(0o600)
    path.write_bytes(b"W" + path.read_bytes()[1:])
    untouched = await store.files.check({"tiny": [1]}, deep=True, repair=False)
    assert [f.kind for f in untouched] == [FindingKind.CORRUPT_FILE]
    assert store.blobs.has_blob(weights.sha256, weights.size_bytes)
    (finding,) = await store.files.verify("tiny", 1, lambda _: None)
    assert "quarantine" in finding.message
    assert not store.blobs.has_blob(weights.sha256, weights.size_bytes)
    assert path.exists()
    store.put()
    assert await store.files.verify("tiny", 1, lambda _: None) == ()


async def test_a_cancelled_verify_ends(store: Store) -> None:
    """And reports nothing more."""
    store.put()
    task = asyncio.create_task(store.files.verify("tiny", 1, lambda _: None))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_blob_that_is_being_deleted_is_no_stray(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A deletion that is under way while the blobs are listed leaves nothing to tell of."""
    weights = next(file for file in store.put() if "deep" in file.path)
    listed = threading.Event()
    blobs = StorageCheck._blobs

    def listing(check: StorageCheck) -> Iterator[tuple[str, os.stat_result]]:
        yield from blobs(check)
        listed.set()

    monkeypatch.setattr(StorageCheck, "_blobs", listing)
    held = threading.Event()
    done = threading.Event()

    def delete() -> None:
        with store.blobs.commit:
            shutil.rmtree(store.home / "models" / "tiny")
            held.set()
            assert listed.wait(DEADLINE_S)
            store.home.joinpath(*blob_at(weights.sha256)).unlink()
        done.set()

    thread = threading.Thread(target=delete)
    thread.start()
    await asyncio.to_thread(held.wait, DEADLINE_S)
    found = await store.files.check({}, deep=False, repair=False)
    thread.join(DEADLINE_S)
    assert done.is_set()
    assert weights.sha256 not in {f.name for f in found}
