"""The Uploads port: bytes that a client brings go the way of downloads, from part to blob.

A file with a SHA-256 is a part of that name: any upload or download goes on with it. Nothing waits in
memory but one batch of a megabyte; the client's next message is read when that is on disk.
"""

import asyncio
import os
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack, asynccontextmanager
from functools import partial

from modelhostd.adapters.blobs import BlobStore
from modelhostd.adapters.cancel import Canceller
from modelhostd.adapters.formats import check_file
from modelhostd.adapters.hashing import Digests, Hasher
from modelhostd.adapters.layout import VERIFIED, disk_errors
from modelhostd.adapters.parts import Part, kept_spans
from modelhostd.adapters.progress import Meter
from modelhostd.adapters.publishing import publish
from modelhostd.adapters.sampling import TICK_S, enter
from modelhostd.adapters.threads import cancellable, in_thread, to_the_end
from modelhostd.adapters.trees import TreeStore
from modelhostd.core.errors import ModelhostError, Reason, invalid
from modelhostd.core.manifest import Manifest
from modelhostd.core.paths import printable
from modelhostd.core.resources import ModelFile, Phase, Progress
from modelhostd.core.safetensors_header import Header, predicted_bytes
from modelhostd.core.uploads import UPLOAD, UploadFile
from modelhostd.ports import DownloadJob, Fetched, RemoteFile, SourceFacts

BATCH_BYTES = 1 << 20
"""What is collected before a thread writes it: a hop a message would cost more than the write."""


class UploadStore:
    """Uploads into one home; satisfies ``ports.Uploads``."""

    def __init__(
        self, store: BlobStore, trees: TreeStore, now: Callable[[], float] = time.time
    ) -> None:
        self._store = store
        self._trees = trees
        self._now = now

    async def have(self, files: Sequence[UploadFile]) -> Sequence[int]:
        """Return how many first bytes of each file are there."""
        return await cancellable(Canceller(), partial(self._have, files))

    def _have(self, files: Sequence[UploadFile]) -> Sequence[int]:
        with disk_errors(self._store.home.path):
            return [_there(self._store, file) for file in files]

    def hold(self, digests: Iterable[str]) -> AbstractContextManager[None]:
        """Keep blobs within the block."""
        return self._store.hold(digests)

    async def check_room(self, needed_bytes: int) -> None:
        """Promise it for a moment."""
        await cancellable(Canceller(), partial(self._check_room, needed_bytes))

    def _check_room(self, needed_bytes: int) -> None:
        with self._store.reserve(f"question-{uuid.uuid4()}", needed_bytes):
            pass

    @asynccontextmanager
    async def open(
        self, job: DownloadJob, total_bytes: int, report: Callable[[Progress], None]
    ) -> AsyncIterator["IncomingFiles"]:
        """Begin one upload."""
        incoming = IncomingFiles(self._store, self._trees, job, total_bytes, report, self._now)
        ticker = asyncio.create_task(incoming.tick())
        try:
            await incoming.reserve()
            yield incoming
        finally:
            ticker.cancel()
            await asyncio.gather(ticker, return_exceptions=True)
            await incoming.close()


class IncomingFiles:
    """One upload under way; satisfies ``ports.Incoming``."""

    def __init__(
        self,
        store: BlobStore,
        trees: TreeStore,
        job: DownloadJob,
        total_bytes: int,
        report: Callable[[Progress], None],
        now: Callable[[], float],
    ) -> None:
        self._store = store
        self._trees = trees
        self._job = job
        self._total_bytes = total_bytes
        self._report = report
        self._now = now
        self._canceller = Canceller()
        self._meter = Meter()
        self._begun_bytes = self._offset_bytes = 0
        self._held = ExitStack()
        self._written: Callable[[int], None] | None = None
        self._receiver: _Receiver | None = None
        self._batch: list[bytes] = []
        self._batch_bytes = 0
        self._files: list[ModelFile] = []
        self._headers: list[Header] = []

    async def reserve(self) -> None:
        """Promise the space of all files to this upload, where it is known."""
        enter(self._meter, Phase.DOWNLOADING, self._report)
        if self._total_bytes:
            space, owner, cancelled = self._store.space, self._job.operation, self._canceller
            self._held.callback(space.release, owner)
            promise = partial(space.promise, owner, self._total_bytes, cancelled.is_cancelled)
            self._written = await cancellable(self._canceller, promise)

    async def tick(self) -> None:
        """Sample progress until cancelled."""
        last: Progress | None = None
        while True:
            if (new := self._meter.snapshot(time.monotonic())) != last:
                self._report(new)
            last = new
            await asyncio.sleep(TICK_S)

    async def begin(self, file: UploadFile) -> None:
        """End the file before, begin the next."""
        await self._end_file()
        receiver = _Receiver(self._store, self._job, file, self._canceller, self._written)
        self._receiver = receiver
        try:
            await cancellable(self._canceller, receiver.open)
        except ModelhostError:
            self._receiver = None
            raise
        self._begun_bytes += file.size_bytes
        self._offset_bytes += file.offset
        known = max(self._begun_bytes, self._total_bytes + self._offset_bytes)
        self._meter.add(file.path, file.size_bytes, known)
        self._held.enter_context(self._store.hold([file.sha256] if file.sha256 else []))
        self._meter.reuse(file.path, file.offset)
        self._meter.start(file.path)

    async def write(self, data: bytes) -> None:
        """Take the next bytes."""
        self._batch.append(data)
        self._batch_bytes += len(data)
        if self._batch_bytes >= BATCH_BYTES:
            await self._flush()

    async def end(self) -> Sequence[ModelFile]:
        """End the last file and return all of them."""
        await self._end_file()
        enter(self._meter, Phase.COMMITTING, self._report)
        return sorted(self._files, key=lambda file: file.path)

    async def publish(self, revision: str) -> Fetched:
        """Make the artifact visible."""
        files = tuple(sorted(self._files, key=lambda file: file.path))
        predicted = predicted_bytes(self._headers)
        manifest = Manifest(
            model=self._job.model,
            version=self._job.version,
            source=UPLOAD,
            revision=revision,
            files=files,
            predicted_bytes=predicted,
            create_time=self._now(),
            entry=self._job.manifest,
        )
        await publish(self._trees, manifest, self._canceller)
        listed = [RemoteFile(file.path, file.size_bytes, file.sha256) for file in files]
        facts = SourceFacts(UPLOAD, revision, listed)
        return Fetched(facts, files, self._meter.reused_bytes, predicted)

    async def close(self) -> None:
        """Let go of everything; parts stay."""
        self._canceller.cancel()
        self._report(self._meter.snapshot(time.monotonic()))
        try:
            if self._receiver is not None:
                await to_the_end(in_thread(self._receiver.close))
        finally:
            self._held.close()

    async def _flush(self) -> None:
        receiver = self._receiver
        data, count = b"".join(self._batch), self._batch_bytes
        self._batch, self._batch_bytes = [], 0
        if receiver is not None and count:
            await cancellable(self._canceller, partial(receiver.write, data))
            self._meter.advance(receiver.file.path, receiver.position)

    async def _end_file(self) -> None:
        await self._flush()
        receiver, self._receiver = self._receiver, None
        if receiver is None:
            return
        try:
            sha256, header = await cancellable(self._canceller, receiver.finish)
        finally:
            await to_the_end(in_thread(receiver.close))
        if header is not None:
            self._headers.append(header)
        self._files.append(ModelFile(receiver.file.path, receiver.file.size_bytes, sha256))
        self._held.enter_context(self._store.hold([sha256]))
        self._meter.finish(receiver.file.path)


class _Receiver:
    """One file on its way in. Blocking; one thread at a time."""

    def __init__(
        self,
        store: BlobStore,
        job: DownloadJob,
        file: UploadFile,
        canceller: Canceller,
        written: Callable[[int], None] | None,
    ) -> None:
        self.file = file
        self.position = file.offset
        self._store = store
        self._job = job
        self._canceller = canceller
        self._written = written
        self._digests = Digests(RemoteFile(file.path, file.size_bytes, file.sha256))
        self._key = file.sha256 or f"upload-{uuid.uuid4()}"
        self._held = ExitStack()
        self._part: Part | None = None
        # A write that the disk holds up outlives the task that waited for it; closing waits for it.
        self._busy = threading.Lock()

    def open(self) -> None:
        """Claim the file and go on where it stands, or see that it is there."""
        file, store = self.file, self._store
        with self._busy, disk_errors(store.home.path), ExitStack() as held:
            held.enter_context(store.claim(self._key, self._canceller.is_cancelled))
            there = _there(store, file)
            if file.offset > there:
                expected = f"at most {there}, the bytes of {printable(file.path)} that are there"
                raise invalid("file.offset_bytes", expected, file.offset)
            if there < file.size_bytes or not file.sha256:
                if self._written is None:
                    owner = f"{self._job.operation}/{self._key}"
                    reserved = store.reserve(owner, file.size_bytes - file.offset)
                    self._written = held.enter_context(reserved)
                part = store.open_part(self._key, file.size_bytes, self._job.model)
                self._part = held.enter_context(part)
                Hasher(part, self._digests, self._canceller.check).catch_up(file.offset)
            self._held = held.pop_all()

    def write(self, data: bytes) -> None:
        """Write the next bytes; those of a file that came whole meanwhile are not needed."""
        with self._busy, disk_errors(self._store.home.path):
            self._canceller.check()
            if self._part is not None and self._written is not None:
                view = memoryview(data)
                self._part.write(self.position, view)
                self._digests.update(view)
                self._part.sync_if_due()
                self._written(len(data))
            self.position += len(data)

    def finish(self) -> tuple[str, Header | None]:
        """Hold the digest against the promised one, check the format; return both.

        Raises CHECKSUM_MISMATCH (what came is in quarantine), UNSAFE_FILE, MALFORMED_FILE.
        """
        with self._busy, disk_errors(self._store.home.path):
            self._canceller.check()
            sha256 = self._accepted() if self._part is not None else self.file.sha256
            name = sha256 if self.file.sha256 else f"{sha256}+{self._key}"
            fd = self._store.open_content(sha256, {sha256: name})
            try:
                return sha256, check_file(fd, self.file.path, UPLOAD.uri)
            except ModelhostError:
                self._store.drop_verified(sha256)
                raise
            finally:
                os.close(fd)

    def _accepted(self) -> str:
        part, actual = self._part, self._digests.sha256
        assert part is not None
        if self.file.sha256 and actual != self.file.sha256:
            facts = {
                "source": UPLOAD.uri,
                "file": self.file.path,
                "model": self._job.model,
                "expected": self.file.sha256,
                "actual": actual,
            }
            name = self._store.quarantine_part(part, facts)
            shown = printable(self.file.path)
            raise ModelhostError(
                Reason.CHECKSUM_MISMATCH,
                f"{shown}: expected SHA-256 {self.file.sha256}, got {actual}; what came is in "
                f"quarantine as {name}: upload the file again, from its first byte",
                {"file": shown, "expected": self.file.sha256, "actual": actual},
            )
        self._store.accept(part, actual)
        return actual

    def close(self) -> None:
        """Close the part, which stays if an upload can go on with it."""
        with self._busy, self._held, disk_errors(self._store.home.path):
            part, self._part = self._part, None
            if part is not None and (not self.file.sha256 or part.done_bytes == 0):
                self._store.drop_part(self._key)


def _there(store: BlobStore, file: UploadFile) -> int:
    """Return how many first bytes of a file are here."""
    if not file.sha256:
        return 0
    found = store.home.stat((*VERIFIED, file.sha256))
    if (found is not None and found.st_size == file.size_bytes) or store.has_blob(
        file.sha256, file.size_bytes
    ):
        return file.size_bytes
    return kept_spans(store.home, file.sha256, file.size_bytes).prefix
