"""What every uploads port promises, held by the real one and by the fake that stands in for it."""

import hashlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from modelhostd.adapters.blobs import BlobStore, StoreConfig
from modelhostd.adapters.files import FileStore
from modelhostd.adapters.trees import TreeStore
from modelhostd.adapters.uploads import UploadStore
from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.resources import ModelFile, Progress
from modelhostd.core.uploads import UPLOAD, UploadFile
from modelhostd.ports import DownloadJob, Files
from modelhostd.ports.uploads import Incoming, Uploads
from tests.fakes.files import FakeFiles
from tests.fakes.uploads import FakeUploads

FREE = 1_000_000
DATA = bytes(range(256)) * 40
SHA256 = hashlib.sha256(DATA).hexdigest()


class Desk:
    """An uploads port and the files that it publishes into."""

    def __init__(self, uploads: Uploads, files: Files) -> None:
        self.uploads = uploads
        self.files = files

    def open(self, version: int = 1, total: int = 0, reports: list[Progress] | None = None) -> Any:
        """Begin an upload of the model ``mine``."""
        job = DownloadJob(f"op-{version}", "mine", version, UPLOAD, {})
        return self.uploads.open(job, total, (reports if reports is not None else []).append)

    async def broken(self, file: UploadFile, data: bytes) -> None:
        """Bring some bytes of a file and go away."""
        with suppress(ConnectionError):
            async with self.open() as incoming:
                await incoming.begin(file)
                await incoming.write(data)
                # What the real one collects goes to disk with the next file at the latest.
                await flush(incoming)
                raise ConnectionError


async def flush(incoming: Incoming) -> None:
    """Bring what was collected to disk, where that is done in batches."""
    flushing = getattr(incoming, "_flush", None)
    if flushing is not None:
        await flushing()


@pytest.fixture(params=["fake", "real"])
def desk(request: pytest.FixtureRequest, tmp_path: Path) -> Desk:
    """Return a port with room for a megabyte."""
    if request.param == "fake":
        files = FakeFiles()
        files.disk_bytes = FREE
        return Desk(FakeUploads(files), files)
    config = StoreConfig(tmp_path, reserve_bytes=0, free_bytes=lambda: (FREE, FREE))
    store = BlobStore(config)
    trees = TreeStore(store)
    return Desk(UploadStore(store, trees), FileStore(store, trees))


async def bring(
    incoming: Incoming, files: Sequence[tuple[UploadFile, bytes]]
) -> Sequence[ModelFile]:
    """Bring whole files in pieces."""
    for file, data in files:
        await incoming.begin(file)
        for at in range(0, len(data), 1000):
            await incoming.write(data[at : at + 1000])
    return await incoming.end()


async def test_files_become_an_artifact(desk: Desk) -> None:
    """With and without a digest, an empty one and one in a folder: listed with sizes and digests."""
    reports: list[Progress] = []
    async with desk.open(total=len(DATA) + 2, reports=reports) as incoming:
        files = await bring(
            incoming,
            [
                (UploadFile("config.json", 2), b"{}"),
                (UploadFile("nested/data.txt", len(DATA), SHA256), DATA),
                (UploadFile("empty.txt", 0), b""),
            ],
        )
        fetched = await incoming.publish("r1")
    assert [f.path for f in files] == ["config.json", "empty.txt", "nested/data.txt"]
    assert list(await desk.files.list_files("mine", 1)) == list(files) == list(fetched.files)
    assert fetched.facts.revision == "r1"
    done = [p.done_bytes for p in reports]
    assert done == sorted(done)
    assert all(p.done_bytes <= p.total_bytes for p in reports if p.total_bytes)


async def test_a_broken_upload_is_gone_on_with(desk: Desk) -> None:
    """What came of a file with a digest is there, and the rest of it makes it whole."""
    file = UploadFile("data.txt", len(DATA), SHA256)
    assert list(await desk.uploads.have([file])) == [0]
    await desk.broken(file, DATA[:3000])
    assert list(await desk.uploads.have([file])) == [3000]
    rest = UploadFile("data.txt", len(DATA), SHA256, offset=3000)
    async with desk.open() as incoming:
        await bring(incoming, [(rest, DATA[3000:])])
        fetched = await incoming.publish("r1")
    assert fetched.reused_bytes == 3000
    assert list(await desk.uploads.have([file])) == [len(DATA)]


async def test_a_file_that_is_there_need_not_be_sent(desk: Desk) -> None:
    """Its offset is its size, and the new artifact shares it."""
    for version in (1, 2):
        offset = len(DATA) if version == 2 else 0
        async with desk.open(version) as incoming:
            file = UploadFile("data.txt", len(DATA), SHA256, offset=offset)
            await bring(incoming, [(file, DATA[offset:])])
            await incoming.publish(f"r{version}")
    assert (await desk.files.list_files("mine", 2))[0].sha256 == SHA256


async def test_nothing_is_kept_of_a_broken_file_without_digest(desk: Desk) -> None:
    """Nobody could say whether the next one is the same."""
    await desk.broken(UploadFile("data.txt", len(DATA)), DATA[:3000])
    assert list(await desk.uploads.have([UploadFile("data.txt", len(DATA))])) == [0]
    assert (await desk.files.use()).staging_bytes == 0


async def test_wrong_bytes_are_a_mismatch_and_not_gone_on_with(desk: Desk) -> None:
    """CHECKSUM_MISMATCH with both digests; the next upload begins at the first byte."""
    wrong = b"x" + DATA[1:]
    file = UploadFile("data.txt", len(DATA), SHA256)
    with pytest.raises(ModelhostError) as caught:
        async with desk.open() as incoming:
            await bring(incoming, [(file, wrong)])
    assert caught.value.reason is Reason.CHECKSUM_MISMATCH
    assert caught.value.metadata["expected"] == SHA256
    assert caught.value.metadata["actual"] == hashlib.sha256(wrong).hexdigest()
    assert list(await desk.uploads.have([file])) == [0]
    assert not (await desk.files.on_disk(["mine"])).get("mine")


async def test_an_offset_beyond_what_is_there_is_refused(desk: Desk) -> None:
    """INVALID_ARGUMENT with the bytes that are there."""
    file = UploadFile("data.txt", len(DATA), SHA256, offset=10)
    with pytest.raises(ModelhostError) as caught:
        async with desk.open() as incoming:
            await incoming.begin(file)
    assert caught.value.reason is Reason.INVALID_ARGUMENT
    assert "at most 0" in caught.value.message


@pytest.mark.parametrize("ask", [True, False])
async def test_more_than_there_is_room_for_is_refused_before_the_first_byte(
    desk: Desk, ask: bool
) -> None:
    """INSUFFICIENT_DISK_SPACE with the numbers, from the question and from the upload."""
    big = UploadFile("data.txt", FREE + 1, SHA256)

    async def uploaded() -> None:
        async with desk.open(total=big.size_bytes):
            raise AssertionError("it was let in")

    work: Callable[[], Any] = (lambda: desk.uploads.check_room(big.size_bytes)) if ask else uploaded
    with pytest.raises(ModelhostError) as caught:
        await work()
    assert caught.value.reason is Reason.INSUFFICIENT_DISK_SPACE
    assert caught.value.metadata["neededBytes"] == str(FREE + 1)


async def test_a_file_that_found_no_room_may_be_begun_again(desk: Desk) -> None:
    """Once there is room: what was refused has left nothing behind, the files before it stay."""
    reports: list[Progress] = []
    async with desk.open(reports=reports) as incoming:
        await incoming.begin(UploadFile("config.json", 2))
        await incoming.write(b"{}")
        with pytest.raises(ModelhostError) as caught:
            await incoming.begin(UploadFile("big.txt", FREE + 1))
        assert caught.value.reason is Reason.INSUFFICIENT_DISK_SPACE
        await incoming.begin(UploadFile("big.txt", len(DATA)))
        await incoming.write(DATA)
        assert [file.path for file in await incoming.end()] == ["big.txt", "config.json"]
        await incoming.publish("r1")
    assert max(report.total_bytes for report in reports) == len(DATA) + 2
