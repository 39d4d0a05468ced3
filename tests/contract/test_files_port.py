"""What every implementation of the files port does: the store on disk, and the fake."""

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import pytest

from modelhostd.adapters.blobs import BlobStore, StoreConfig
from modelhostd.adapters.files import FileStore
from modelhostd.adapters.trees import TreeStore
from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.findings import FindingKind
from modelhostd.core.resources import ModelFile, Progress
from modelhostd.ports import Files, Pace, Pruned
from tests.adapters.store_support import publish
from tests.fakes.files import FakeFiles

CONTENT = {"config.json": b"{}", "sub/model.safetensors": b"weights" * 100}


class World(Protocol):
    """A files port, and a way to put artifacts there and harm them."""

    files: Files

    def put(self, model: str, version: int, files: Mapping[str, bytes]) -> Sequence[ModelFile]:
        """Publish an artifact."""

    def lose(self, model: str, version: int) -> None:
        """Remove an artifact behind the registry's back."""

    def flip(self, model: str, version: int, path: str) -> None:
        """Change one bit of a file, not its size."""


class RealWorld:
    def __init__(self, home: Path) -> None:
        self.home = home
        self.store = BlobStore(StoreConfig(home))
        self.trees = TreeStore(self.store)
        self.files: Files = FileStore(self.store, self.trees)

    def put(self, model: str, version: int, files: Mapping[str, bytes]) -> Sequence[ModelFile]:
        published = publish(self.store, self.trees, model, version, files)
        # As after a restart: what this process published itself is never taken for a stray tree.
        self.trees = TreeStore(self.store)
        self.files = FileStore(self.store, self.trees)
        return published

    def lose(self, model: str, version: int) -> None:
        tree = self.home / "models" / model / str(version)
        tree.rename(self.home.parent / f"lost-{model}-{version}")

    def flip(self, model: str, version: int, path: str) -> None:
        file = self.files.model_dir(model, version) / path
        file.chmod(0o600)
        data = bytearray(file.read_bytes())
        data[0] ^= 1
        file.write_bytes(bytes(data))


class FakeWorld:
    def __init__(self) -> None:
        self.fake = FakeFiles()
        self.files: Files = self.fake

    def put(self, model: str, version: int, files: Mapping[str, bytes]) -> Sequence[ModelFile]:
        return self.fake.put(model, version, files)

    def lose(self, model: str, version: int) -> None:
        self.fake.lose(model, version)

    def flip(self, model: str, version: int, path: str) -> None:
        self.fake.flip(model, version, path)


@pytest.fixture(params=["real", "fake"])
async def world(request: pytest.FixtureRequest, tmp_path: Path) -> World:
    """The same promises from both."""
    return FakeWorld() if request.param == "fake" else RealWorld(tmp_path / "home")


def ignore(_: Progress) -> None:
    """Take no notice of progress."""


async def test_files_are_listed_in_the_order_of_their_paths(world: World) -> None:
    """As the manifest says, sizes and digests included."""
    published = world.put("tiny", 1, CONTENT)
    assert list(await world.files.list_files("tiny", 1)) == list(published)
    assert [file.path for file in published] == sorted(CONTENT)


async def test_a_config_is_read_or_is_empty(world: World) -> None:
    """What ``config.json`` says, where it is an object; nothing where it is not, or where there is none."""
    world.put("one", 1, {"config.json": b'{"n_layer": 2}'})
    world.put("two", 1, {"config.json": b"[1"})
    world.put("three", 1, {"config.json": b"[1]"})
    world.put("four", 1, {"model.safetensors": b"x"})
    assert await world.files.read_config("one", 1) == {"n_layer": 2}
    for model in ("two", "three", "four", "five"):
        assert await world.files.read_config(model, 1) == {}


async def test_a_missing_artifact_is_a_storage_error(world: World) -> None:
    """With the next step in the message."""
    with pytest.raises(ModelhostError, match="download") as caught:
        await world.files.list_files("tiny", 1)
    assert caught.value.reason is Reason.STORAGE_ERROR


async def test_the_directory_of_an_artifact_is_named_by_model_and_version(world: World) -> None:
    """Different artifacts, different directories; the same one, always the same."""
    names = {world.files.model_dir("tiny", 1), world.files.model_dir("tiny", 2)}
    assert len({*names, world.files.model_dir("tiny", 1)}) == 2


async def test_what_lies_on_disk_is_told_by_model(world: World) -> None:
    """Every version of the models asked for, in order; those without any, or not asked for, are not there."""
    for model, version in (("tiny", 2), ("tiny", 10), ("tiny", 1), ("other", 1)):
        world.put(model, version, CONTENT)
    found = await world.files.on_disk({"tiny", "nothing"})
    assert {model: list(versions) for model, versions in found.items()} == {"tiny": [1, 2, 10]}


async def test_deleting_frees_what_nobody_else_needs(world: World) -> None:
    """Shared blobs stay until the last one goes; what is not there frees nothing."""
    world.put("one", 1, CONTENT)
    world.put("two", 1, {**CONTENT, "own.txt": b"own"})
    assert await world.files.delete_artifact("one", 1) == 0
    assert await world.files.delete_artifact("one", 1) == 0
    assert len(await world.files.list_files("two", 1)) == 3
    assert await world.files.delete_artifact("two", 1) == sum(map(len, CONTENT.values())) + 3
    assert (await world.files.use()).blob_count == 0
    assert await world.files.check({}, deep=True, repair=False) == ()


async def test_bytes_that_are_kept_are_nobodys_finding(world: World) -> None:
    """An artifact taken out of sight with its bytes kept is gone for readers and for checks."""
    world.put("one", 1, CONTENT)
    await world.files.delete_artifact("one", 1, keep_bytes=True)
    with pytest.raises(ModelhostError):
        await world.files.list_files("one", 1)
    assert await world.files.check({}, deep=True, repair=False) == ()


async def test_deleting_one_version_leaves_the_others(world: World) -> None:
    """Versions are artifacts of their own."""
    world.put("tiny", 1, {"a": b"1"})
    world.put("tiny", 2, {"a": b"2"})
    assert await world.files.delete_artifact("tiny", 1) == 1
    assert len(await world.files.list_files("tiny", 2)) == 1


async def test_verify_finds_a_flipped_bit_and_nothing_else(world: World) -> None:
    """The finding names model, version and file; progress ends at the whole."""
    world.put("tiny", 1, CONTENT)
    reports: list[Progress] = []
    assert await world.files.verify("tiny", 1, reports.append) == ()
    total = sum(map(len, CONTENT.values()))
    assert reports[-1].done_bytes == reports[-1].total_bytes == total
    world.flip("tiny", 1, "sub/model.safetensors")
    findings = await world.files.verify("tiny", 1, ignore)
    assert [(f.kind, f.name) for f in findings] == [
        (FindingKind.CORRUPT_FILE, "tiny/1/sub/model.safetensors")
    ]
    assert "expected SHA-256" in findings[0].message
    digest = hashlib.sha256(CONTENT["sub/model.safetensors"]).hexdigest()
    assert findings[0].expected == digest != findings[0].actual


async def test_a_check_of_what_is_as_expected_finds_nothing(world: World) -> None:
    """Shallow or deep."""
    world.put("tiny", 1, CONTENT)
    assert await world.files.check({"tiny": [1]}, deep=False, repair=False) == ()
    assert await world.files.check({"tiny": [1]}, deep=True, repair=True) == ()


async def test_a_lost_artifact_is_found_and_not_repaired(world: World) -> None:
    """Only a download brings it back; the blobs it left belong to nobody."""
    world.put("tiny", 1, CONTENT)
    world.lose("tiny", 1)
    findings = await world.files.check({"tiny": [1]}, deep=False, repair=False)
    missing = [f for f in findings if f.kind == FindingKind.MISSING_TREE]
    assert [(f.name, f.repairable, f.repaired) for f in missing] == [("tiny/1", False, False)]


async def test_an_artifact_nobody_knows_is_repaired_once(world: World) -> None:
    """Found without repair, removed from sight with it, not found again."""
    world.put("tiny", 1, CONTENT)
    world.put("stray", 4, {"x": b"only here"})
    found = await world.files.check({"tiny": [1]}, deep=False, repair=False)
    assert [(f.kind, f.name, f.repairable, f.repaired) for f in found] == [
        (FindingKind.STRAY_TREE, "stray/4", True, False)
    ]
    repaired = await world.files.check({"tiny": [1]}, deep=False, repair=True)
    assert (FindingKind.STRAY_TREE, True) in [(f.kind, f.repaired) for f in repaired]
    await world.files.check({"tiny": [1]}, deep=False, repair=True)
    assert await world.files.check({"tiny": [1]}, deep=True, repair=False) == ()
    assert len(await world.files.list_files("tiny", 1)) == 2


async def test_a_deep_check_hashes_and_a_shallow_one_does_not(world: World) -> None:
    """A flipped bit keeps its size."""
    world.put("tiny", 1, CONTENT)
    world.flip("tiny", 1, "config.json")
    assert await world.files.check({"tiny": [1]}, deep=False, repair=False) == ()
    findings = await world.files.check({"tiny": [1]}, deep=True, repair=False)
    assert [f.kind for f in findings] == [FindingKind.CORRUPT_FILE]


async def test_use_counts_shared_bytes_once_and_per_model(world: World) -> None:
    """Blobs by what is stored, models by what they hold."""
    world.put("one", 1, CONTENT)
    world.put("two", 1, CONTENT)
    use = await world.files.use()
    total = sum(map(len, CONTENT.values()))
    assert (use.blob_bytes, use.blob_count) == (total, 2)
    assert dict(use.model_bytes) == {"one": total, "two": total}
    assert use.reclaimable_bytes == use.staging_bytes == use.quarantine_bytes == 0
    assert 0 < use.free_bytes <= use.total_bytes


async def test_pruning_takes_what_no_model_has(world: World) -> None:
    """The blobs of a lost artifact go and are counted; those that a model has stay."""
    world.put("tiny", 1, CONTENT)
    world.put("gone", 1, {"x": b"only here", "config.json": b"{}"})
    before = await world.files.use()
    await _forget(world, "gone")
    pruned = await world.files.prune(())
    assert (pruned.freed_bytes, pruned.blob_count) == (len(b"only here"), 1)
    after = await world.files.use()
    assert before.blob_bytes - after.blob_bytes == pruned.freed_bytes
    assert after.reclaimable_bytes == 0
    assert await world.files.check({"tiny": [1]}, deep=True, repair=False) == ()
    assert await world.files.prune(()) == Pruned(0, 0)


async def _forget(world: World, model: str) -> None:
    """Leave a model's blobs to nobody, as a crash between two steps of its deletion does."""
    if isinstance(world, RealWorld):
        shutil.rmtree(world.home / "models" / model)
    else:
        world.lose(model, 1)


async def test_an_empty_quarantine_is_empty(world: World) -> None:
    """Nothing is listed, nothing can be released, and what is gone may be deleted again."""
    assert list(await world.files.quarantined()) == []
    name = f"{1_700_000_000}-{'a' * 12}"
    with pytest.raises(ModelhostError) as caught:
        await world.files.restore_quarantined(name)
    assert caught.value.reason is Reason.INVALID_ARGUMENT
    await world.files.delete_quarantined(name)


async def test_pruning_on_trial_takes_nothing(world: World) -> None:
    """It says what would be freed, and that is what is freed then."""
    world.put("tiny", 1, CONTENT)
    world.put("gone", 1, {"x": b"only here", "config.json": b"{}"})
    await _forget(world, "gone")
    told = await world.files.prune((), dry_run=True)
    assert (told.freed_bytes, told.blob_count) == (len(b"only here"), 1)
    assert await world.files.prune((), dry_run=True) == told
    assert await world.files.prune(()) == told
    assert await world.files.prune((), dry_run=True) == Pruned(0, 0)


async def test_a_budget_bounds_what_downloads_may_take(world: World) -> None:
    """What is there counts against it, shared files once; 0 is no budget."""
    total = 1 << 20
    world.put("one", 1, {"w": b"w" * 4096, "config.json": b"{}"})
    world.put("two", 1, {"w": b"w" * 4096})
    without = await world.files.room()
    assert 0 < without.available_bytes <= without.most_bytes
    world.files.limit_bytes(total)
    room = await world.files.room()
    assert (room.available_bytes, room.most_bytes) == (total - 4096 - 2, total)
    world.files.limit_bytes(1000)
    room = await world.files.room()
    assert (room.available_bytes, room.over_bytes) == (0, 4096 + 2 - 1000)
    assert (await world.files.use()).room.most_bytes == 1000
    world.files.limit_bytes(0)
    assert (await world.files.room()).available_bytes > total


async def test_who_has_which_blobs(world: World) -> None:
    """Every artifact on disk with its digests and their bytes; two equal files are one blob."""
    files = world.put("one", 1, {"a": b"same", "b": b"same", "c": b"other"})
    world.put("two", 3, {"x": b"same"})
    digests = {file.path: file.sha256 for file in files}
    found = await world.files.holdings()
    assert found.artifacts == {
        ("one", 1): {digests["a"]: 4, digests["c"]: 5},
        ("two", 3): {digests["a"]: 4},
    }
    assert found.held == frozenset()


async def test_uses_are_read_as_they_were_written(world: World) -> None:
    """The newest writing as a whole; at first there is nothing."""
    assert await world.files.read_uses() == {}
    await world.files.write_uses({"tiny": 12.5, "other": 7.0})
    await world.files.write_uses({"tiny": 13.5})
    assert await world.files.read_uses() == {"tiny": 13.5}


async def test_a_paced_verification_finds_the_same(world: World) -> None:
    """A pace changes how long it takes, nothing else."""
    world.put("tiny", 1, CONTENT)
    pace = Pace(1e9)
    assert await world.files.verify("tiny", 1, ignore, pace) == ()
    world.flip("tiny", 1, "config.json")
    (finding,) = await world.files.verify("tiny", 1, ignore, pace)
    assert finding.kind is FindingKind.CORRUPT_FILE
