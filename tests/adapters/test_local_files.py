"""``file:///`` sources: what is reachable, what is not, and what happens to a file that changes."""

import asyncio
import errno
import os
from pathlib import Path

import pytest

from modelhostd.adapters import local_files, progress, streams
from modelhostd.adapters.blobs import BlobStore, StoreConfig
from modelhostd.adapters.downloads import SourceDownloads
from modelhostd.adapters.files import FileStore
from modelhostd.adapters.local_files import LocalConfig, LocalFiles
from modelhostd.adapters.trees import TreeStore
from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.resources import Phase, Progress, Source
from modelhostd.core.sources import parse_source
from modelhostd.ports import DownloadJob, Fetched
from tests.adapters.downloads_support import safetensors, tiny

SECRET = b"the operator's, not the model's"


class Desk:
    """A home that takes files from beneath ``root``; ``outside`` is beside it."""

    def __init__(self, base: Path) -> None:
        self.root, self.outside = base / "models", base / "models-private"
        self.root.mkdir()
        self.outside.mkdir()
        (self.outside / "model.safetensors").write_bytes(SECRET)
        self.home = base / "home"
        store = BlobStore(StoreConfig(self.home, reserve_bytes=0))
        trees = TreeStore(store)
        self.files = FileStore(store, trees)
        self.adapter = LocalFiles(LocalConfig((self.root,)))
        self.downloads = SourceDownloads({"file": self.adapter}, store, trees)

    def put(self, name: str = "tiny", files: dict[str, bytes] | None = None) -> Path:
        folder = self.root / name
        for path, data in (tiny(400_000) if files is None else files).items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(data)
        return folder

    async def fetch(self, path: Path | str, report: object = None) -> Fetched:
        uri = path if isinstance(path, str) else f"file://{path}"
        job = DownloadJob("op", "tiny", 1, parse_source(uri), {})

        def told(progress: Progress) -> None:
            if callable(report):
                report(progress)

        return await self.downloads.fetch(job, told)

    async def refused(self, path: Path | str) -> ModelhostError:
        """Return how a fetch fails; nothing of the outside may be anywhere below home."""
        with pytest.raises(ModelhostError) as caught:
            await self.fetch(path)
        kept = [p for p in self.home.rglob("*") if p.is_file()]
        assert not [p for p in kept if SECRET in p.read_bytes()]
        return caught.value

    def content(self) -> dict[str, bytes]:
        root = self.files.model_dir("tiny", 1)
        found = sorted(path for path in root.rglob("*") if path.is_file())
        return {str(path.relative_to(root)): path.read_bytes() for path in found}


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    """Return a home with one root."""
    return Desk(tmp_path)


async def test_without_roots_nothing_is_taken(desk: Desk) -> None:
    """The default: SOURCE_NOT_ALLOWED, and the message names the key."""
    desk.put()
    desk.adapter.config = LocalConfig()
    error = await desk.refused(desk.root / "tiny")
    assert error.reason is Reason.SOURCE_NOT_ALLOWED
    assert error.metadata["setting"] == "downloads.file_roots"
    assert "downloads.file_roots" in error.message


@pytest.mark.parametrize(
    "uri",
    [
        "file:///etc/passwd",
        "file:///",
        "file:///proc/self/environ",
        "file://{root}-private/model.safetensors",
        "file://{root}-private",
        "file://{root}/%2e%2e/models-private/model.safetensors",
        "file://{root}/..",
        "file://{root}/x/../../models-private",
        "file://localhost{root}/tiny",
        "file://{root}%00/tiny",
        "file://{root}/tiny?x=1",
    ],
)
async def test_nothing_outside_the_roots_is_reached(desk: Desk, uri: str) -> None:
    """By no spelling: refused when the URI is read, or before anything is opened."""
    desk.put()
    error = await desk.refused(uri.format(root=desk.root))
    assert error.reason in {Reason.SOURCE_NOT_ALLOWED, Reason.INVALID_ARGUMENT}


async def test_a_source_that_was_not_parsed_does_not_escape_either(desk: Desk) -> None:
    """Should a dot-dot ever come this far, it ends here."""
    source = Source(f"file://{desk.root}/../models-private/model.safetensors")
    with pytest.raises(ModelhostError) as caught:
        await desk.downloads.inspect(source)
    assert caught.value.reason is Reason.SOURCE_NOT_ALLOWED


@pytest.mark.parametrize("target", ["absolute", "relative", "chain", "folder", "circle"])
async def test_links_do_not_lead_out(desk: Desk, target: str) -> None:
    """A source that is a link out of the root is refused, however it is made."""
    link, secret = desk.root / "model.safetensors", "models-private/model.safetensors"
    if target == "absolute":
        link.symlink_to(desk.outside / "model.safetensors")
    elif target == "relative":
        link.symlink_to(f"../{secret}")
    elif target == "chain":
        (desk.root / "inner").symlink_to(f"../{secret}")
        link.symlink_to("inner")
    elif target == "folder":
        (desk.root / "folder").symlink_to("../models-private")
        link.symlink_to("folder/model.safetensors")
    else:
        link.symlink_to("model.safetensors")
    assert (await desk.refused(link)).reason is Reason.SOURCE_NOT_ALLOWED


async def test_links_out_of_a_folder_are_left_out_with_a_reason(desk: Desk) -> None:
    """The rest of the folder is taken; what was left out, and why, is told."""
    folder = desk.put()
    (folder / "more.safetensors").symlink_to(desk.outside / "model.safetensors")
    (folder / "private").symlink_to("../../models-private")
    (folder / "gone.json").symlink_to("nothing")
    fetched = await desk.fetch(folder)
    assert desk.content() == tiny(400_000)
    why = dict(fetched.facts.skipped)
    assert "leads out" in why["more.safetensors"]
    assert set(why) == {"more.safetensors", "private", "gone.json"}


async def test_links_within_the_root_are_followed(desk: Desk) -> None:
    """A snapshot of Hugging Face's cache is links into its blobs: it can be taken as it is."""
    blob = desk.root / "models--org--tiny" / "blobs" / ("ab" * 32)
    blob.parent.mkdir(parents=True)
    blob.write_bytes(safetensors(5000))
    snapshot = desk.root / "models--org--tiny" / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").symlink_to(f"../../blobs/{blob.name}")
    await desk.fetch(snapshot)
    assert desk.content() == {"model.safetensors": safetensors(5000)}


async def test_what_is_no_file_is_never_opened(desk: Desk) -> None:
    """A pipe would hold the thread for ever, a device may do anything."""
    folder = desk.put()
    os.mkfifo(folder / "pipe.json")
    fetched = await desk.fetch(folder)
    assert dict(fetched.facts.skipped) == {"pipe.json": "it is no regular file"}
    os.mkfifo(desk.root / "model.safetensors")
    error = await desk.refused(desk.root / "model.safetensors")
    assert error.reason is Reason.SOURCE_NOT_ALLOWED


async def test_a_single_file_is_a_model_of_one_file(desk: Desk) -> None:
    """It keeps its name, escapes in the URI or not."""
    folder = desk.put(files={"my model.safetensors": safetensors(3000)})
    await desk.fetch(f"file://{folder}/my%20model.safetensors")
    assert desk.content() == {"my model.safetensors": safetensors(3000)}


async def test_a_file_that_is_named_is_taken_whatever_its_kind(desk: Desk) -> None:
    """A folder's choice would leave it out; what can run code stays out."""
    folder = desk.put(files={"a[1].onnx": b"onnx", "b.bin": b"\x80\x04N."})
    await desk.fetch(f"file://{folder}/a%5B1%5D.onnx")
    assert desk.content() == {"a[1].onnx": b"onnx"}
    with pytest.raises(ModelhostError) as caught:
        await desk.downloads.inspect(parse_source(f"file://{folder}/b.bin"))
    assert caught.value.reason is Reason.UNSAFE_FILE


async def test_the_copy_is_independent(desk: Desk) -> None:
    """Writing to the original afterwards changes nothing of ours, and ours is read-only."""
    folder = desk.put()
    await desk.fetch(folder)
    with (folder / "model.safetensors").open("r+b") as file:
        file.write(b"x" * 100)
    assert desk.content() == tiny(400_000)
    assert await desk.files.check({"tiny": [1]}, deep=True, repair=False) == ()


@pytest.mark.parametrize("change", ["rewritten", "truncated", "longer", "gone", "link"])
async def test_a_file_that_changes_under_way_is_no_model(desk: Desk, change: str) -> None:
    """Half of one version and half of another must not become a blob; the next attempt takes the new."""
    folder = desk.put()
    weights = folder / "model.safetensors"

    def meddle(progress: Progress) -> None:
        if progress.phase is not Phase.DOWNLOADING or not weights.exists():
            return
        if change == "gone":
            weights.unlink()
        elif change == "link":
            weights.unlink()
            weights.symlink_to(desk.outside / "model.safetensors")
        else:
            data = {"rewritten": tiny(400_000, seed=9)["model.safetensors"], "truncated": b"{}"}
            weights.write_bytes(data.get(change, weights.read_bytes() + b"!"))
            os.utime(weights, ns=(1, 1))

    with pytest.raises(ModelhostError) as caught:
        await desk.fetch(folder, meddle)
    assert caught.value.reason in {
        Reason.BAD_SOURCE_REPLY, Reason.SOURCE_NOT_FOUND, Reason.SOURCE_NOT_ALLOWED,
    }  # fmt: skip
    assert not list(desk.home.glob("models/*/*"))
    weights.unlink(missing_ok=True)
    desk.put(files=tiny(400_000, seed=4))
    await desk.fetch(folder)
    assert desk.content() == tiny(400_000, seed=4)


async def test_an_interrupted_copy_goes_on(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was copied is hashed again and kept."""
    monkeypatch.setattr(streams, "BUFFER_BYTES", 10_000)
    folder = desk.put()
    tasks: list[asyncio.Task[Fetched]] = []
    loop = asyncio.get_running_loop()
    advance = progress.Meter.advance

    def stop_half_way(meter: progress.Meter, path: str, position: int) -> None:
        advance(meter, path, position)
        if position == 200_000:
            loop.call_soon_threadsafe(tasks[0].cancel)
            # The copy is stopped here by the cancel, not by chance later.
            connections[0].canceller.cancel()

    connections = []
    connect = desk.adapter.connections

    def remember(*args: object) -> object:
        connections.append(connect(*args))  # type: ignore[arg-type]
        return connections[-1]

    monkeypatch.setattr(desk.adapter, "connections", remember)
    monkeypatch.setattr(progress.Meter, "advance", stop_half_way)
    tasks.append(asyncio.create_task(desk.fetch(folder)))
    with pytest.raises(asyncio.CancelledError):
        await tasks[0]
    monkeypatch.setattr(progress.Meter, "advance", advance)
    fetched = await desk.fetch(folder)
    assert fetched.reused_bytes == 200_000
    assert desk.content() == tiny(400_000)


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (errno.EACCES, Reason.ACCESS_DENIED),
        (errno.EIO, Reason.STORAGE_ERROR),
        (errno.ENOSPC, Reason.STORAGE_ERROR),
    ],
)
async def test_a_file_that_cannot_be_read_is_the_sources_fault(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, number: int, reason: Reason
) -> None:
    """The message names the source, and never sends the reader to the daemon's own disk."""
    folder = desk.put()

    def fail(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(local_files.os, "preadv", fail)
    error = await desk.refused(folder)
    assert error.reason is reason
    assert str(folder) in error.message
    assert str(desk.home) not in error.message


async def test_names_that_no_model_has_are_refused(desk: Desk) -> None:
    """Control characters and bytes that are no UTF-8, refused with the name escaped."""
    folder = desk.put()
    (folder / "a\nb.json").write_bytes(b"{}")
    assert (await desk.refused(folder)).reason is Reason.UNSAFE_FILE
    (folder / "a\nb.json").unlink()
    (folder / os.fsdecode(b"\xff.json")).write_bytes(b"{}")
    error = await desk.refused(folder)
    assert error.reason is Reason.UNSAFE_FILE
    assert error.message.isascii()
