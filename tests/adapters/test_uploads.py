"""Uploads onto a real disk: checked like downloads, shared with them, and bounded in memory."""

import asyncio
import errno
import hashlib
import os
import pickle
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from modelhostd.adapters import parts
from modelhostd.adapters.blobs import BlobStore, StoreConfig
from modelhostd.adapters.files import FileStore
from modelhostd.adapters.trees import TreeStore
from modelhostd.adapters.uploads import BATCH_BYTES, UploadStore
from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.uploads import UPLOAD, UploadFile
from modelhostd.ports import DownloadJob
from tests.adapters.downloads_support import safetensors
from tests.support import DEADLINE_S, wait_until_async

WEIGHTS = safetensors(3 * BATCH_BYTES)
SHA256 = hashlib.sha256(WEIGHTS).hexdigest()
FILE = UploadFile("model.safetensors", len(WEIGHTS), SHA256)


class Desk:
    """A home directory and uploads into it."""

    def __init__(self, home: Path, free: int = 1 << 40) -> None:
        self.home = home
        config = StoreConfig(
            home, sync_bytes=1 << 20, reserve_bytes=0, free_bytes=lambda: (free, free)
        )
        self.store = BlobStore(config)
        self.trees = TreeStore(self.store)
        self.files = FileStore(self.store, self.trees)
        self.uploads = UploadStore(self.store, self.trees)

    def open(self, model: str = "mine") -> Any:
        """Begin an upload."""
        return self.uploads.open(
            DownloadJob(f"op-{model}", model, 1, UPLOAD, {}), 0, lambda _: None
        )

    async def bring(
        self, files: Sequence[tuple[UploadFile, bytes]], model: str = "mine", piece: int = 192 << 10
    ) -> None:
        """Make a whole upload."""
        async with self.open(model) as incoming:
            for file, data in files:
                await incoming.begin(file)
                for at in range(0, len(data), piece):
                    await incoming.write(data[at : at + piece])
            await incoming.end()
            await incoming.publish("r1")

    def names(self, pattern: str) -> list[str]:
        """Return what is below the home."""
        return sorted(path.name for path in self.home.glob(pattern))


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    """Return an empty home."""
    return Desk(tmp_path)


async def test_an_upload_is_visible_as_a_whole(desk: Desk) -> None:
    """Its bytes are those that were sent, and the disk is as the registry would have it."""
    await desk.bring([(UploadFile("config.json", 2), b"{}"), (FILE, WEIGHTS)])
    root = desk.files.model_dir("mine", 1)
    assert (root / "model.safetensors").read_bytes() == WEIGHTS
    assert desk.names("staging/*/*") == []
    assert await desk.files.check({"mine": [1]}, deep=True, repair=False) == ()


@pytest.mark.parametrize(
    ("path", "data", "reason"),
    [
        ("weights.safetensors", b"\x10" + b"\0" * 40, Reason.MALFORMED_FILE),
        ("renamed.safetensors", pickle.dumps({"a": 1}, protocol=4), Reason.UNSAFE_FILE),
        ("renamed.json", pickle.dumps({"a": 1}, protocol=4), Reason.UNSAFE_FILE),
        ("tool.txt", b"\x7fELF" + b"\0" * 60, Reason.UNSAFE_FILE),
    ],
)
async def test_what_a_file_holds_is_checked(
    desk: Desk, path: str, data: bytes, reason: Reason
) -> None:
    """A broken header, pickles and programs under harmless names: refused, and nothing of them stays."""
    file = UploadFile(path, len(data), hashlib.sha256(data).hexdigest())
    with pytest.raises(ModelhostError) as caught:
        await desk.bring([(file, data)])
    assert caught.value.reason is reason
    assert desk.names("staging/*/*") == desk.names("models/*/*") == []


async def test_wrong_bytes_are_in_quarantine(desk: Desk) -> None:
    """With model, file and both digests beside them."""
    with pytest.raises(ModelhostError):
        await desk.bring([(FILE, WEIGHTS[:-1] + b"\xff")])
    (entry,) = await desk.files.quarantined()
    assert (entry.model, entry.path, entry.expected) == ("mine", FILE.path, SHA256)
    assert entry.source == "upload://"


async def test_two_uploads_of_one_file_share_it(desk: Desk) -> None:
    """The second waits for the first, writes nothing of what it is sent, and both are whole."""
    first, second = desk.open("one"), desk.open("two")
    async with first as one, second as two:
        await one.begin(FILE)
        waiting = asyncio.create_task(two.begin(FILE))
        await one.write(WEIGHTS)
        await one.end()
        await asyncio.wait_for(waiting, DEADLINE_S)
        await two.write(WEIGHTS)
        await two.end()
        await one.publish("r1")
        await two.publish("r1")
    found = [(desk.files.model_dir(m, 1) / FILE.path).stat().st_ino for m in ("one", "two")]
    assert found[0] == found[1]
    assert desk.names("staging/*/*") == []


async def test_an_upload_that_waits_for_another_can_be_cancelled(desk: Desk) -> None:
    """It ends at once, and the one it waited for goes on."""
    first, second = desk.open("one"), desk.open("two")
    async with first as one:
        await one.begin(FILE)
        async with second as two:
            waiting = asyncio.create_task(two.begin(FILE))
            await asyncio.sleep(0)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
        await one.write(WEIGHTS)
        assert len(await one.end()) == 1


async def test_what_came_survives_a_cancellation(desk: Desk) -> None:
    """A task that is cancelled in mid-file leaves a part that the next upload goes on with."""

    async def work() -> None:
        async with desk.open() as incoming:
            await incoming.begin(FILE)
            await incoming.write(WEIGHTS[:BATCH_BYTES])
            await asyncio.Event().wait()

    task = asyncio.create_task(work())
    part = desk.home / "staging" / "parts" / f"{SHA256}.part"
    await wait_until_async(lambda: part.exists() and part.stat().st_size == BATCH_BYTES)
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
    assert list(await desk.uploads.have([FILE])) == [BATCH_BYTES]
    rest = UploadFile(FILE.path, FILE.size_bytes, SHA256, offset=BATCH_BYTES)
    await desk.bring([(rest, WEIGHTS[BATCH_BYTES:])])
    assert await desk.files.check({"mine": [1]}, deep=True, repair=False) == ()


async def test_kept_bytes_that_went_bad_are_found(desk: Desk) -> None:
    """They are hashed again: one flipped byte of an earlier upload is a mismatch, never a blob."""
    with suppress(ConnectionError):
        async with desk.open() as incoming:
            await incoming.begin(FILE)
            await incoming.write(WEIGHTS[:BATCH_BYTES])
            raise ConnectionError
    part = desk.home / "staging" / "parts" / f"{SHA256}.part"
    kept = bytearray(part.read_bytes())
    kept[1000] ^= 1
    part.write_bytes(kept)
    rest = UploadFile(FILE.path, FILE.size_bytes, SHA256, offset=BATCH_BYTES)
    with pytest.raises(ModelhostError) as caught:
        await desk.bring([(rest, WEIGHTS[BATCH_BYTES:])])
    assert caught.value.reason is Reason.CHECKSUM_MISMATCH
    assert list(await desk.uploads.have([FILE])) == [0]


async def test_a_full_disk_is_told_and_what_came_is_kept(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ENOSPC in mid-file: INSUFFICIENT_DISK_SPACE, and the upload goes on when there is room."""
    real, calls = os.pwrite, 0

    def full(fd: int, data: Any, offset: int) -> int:
        nonlocal calls
        if len(data) > 10_000:
            calls += 1
            if calls == 2:
                raise OSError(errno.ENOSPC, "no space")
        return real(fd, data, offset)

    monkeypatch.setattr(parts.os, "pwrite", full)
    with pytest.raises(ModelhostError) as caught:
        await desk.bring([(FILE, WEIGHTS)], piece=BATCH_BYTES)
    assert caught.value.reason is Reason.INSUFFICIENT_DISK_SPACE
    monkeypatch.undo()
    assert list(await desk.uploads.have([FILE])) == [BATCH_BYTES]


async def test_space_is_promised_file_by_file_where_the_total_is_not_known(tmp_path: Path) -> None:
    """A file that does not fit is refused at its first byte; the promise ends with the upload."""
    desk = Desk(tmp_path, free=len(WEIGHTS) - 1)
    with pytest.raises(ModelhostError) as caught:
        await desk.bring([(FILE, WEIGHTS)])
    assert caught.value.reason is Reason.INSUFFICIENT_DISK_SPACE
    with desk.store.reserve("other", len(WEIGHTS) - 1):
        assert desk.names("staging/*/*") == []


async def test_no_more_than_a_batch_waits_in_memory(desk: Desk) -> None:
    """Whoever sends is held up until a batch is on disk."""
    part = desk.home / "staging" / "parts" / f"{SHA256}.part"
    async with desk.open() as incoming:
        await incoming.begin(FILE)
        sent = 0
        for at in range(0, len(WEIGHTS), 192 << 10):
            data = WEIGHTS[at : at + (192 << 10)]
            await incoming.write(data)
            sent += len(data)
            assert sent - part.stat().st_size <= BATCH_BYTES
        await incoming.end()
