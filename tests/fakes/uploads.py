"""An uploads port in memory: the same promises as the real one, publishing into the fake files."""

import hashlib
import uuid
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager

from modelhostd.core.errors import ModelhostError, Reason, invalid
from modelhostd.core.resources import ModelFile, Phase, Progress
from modelhostd.core.uploads import UPLOAD, UploadFile
from modelhostd.ports import DownloadJob, Fetched, RemoteFile, SourceFacts
from tests.fakes.files import FakeFiles


class FakeUploads:
    """Satisfies ``modelhostd.ports.uploads.Uploads``."""

    def __init__(self, files: FakeFiles) -> None:
        self.files = files
        self.parts: dict[str, bytes] = {}
        """What came of files with a SHA-256 that no artifact has yet."""
        self.taken = 0
        """Bytes that were taken."""

    def there(self, file: UploadFile) -> int:
        """Return how many first bytes of a file are there."""
        if not file.sha256:
            return 0
        return len(self.files.blobs.get(file.sha256, self.parts.get(file.sha256, b"")))

    async def have(self, files: Sequence[UploadFile]) -> Sequence[int]:
        """Return how many first bytes of each file are there."""
        return [self.there(file) for file in files]

    @contextmanager
    def hold(self, digests: Iterable[str]) -> Iterator[None]:
        """Keep blobs within the block."""
        key = str(uuid.uuid4())
        self.files.held[key] = frozenset(digests)
        try:
            yield
        finally:
            del self.files.held[key]

    async def check_room(self, needed_bytes: int) -> None:
        """Raise where there is none."""
        self.check_space(needed_bytes)

    @asynccontextmanager
    async def open(
        self, job: DownloadJob, total_bytes: int, report: Callable[[Progress], None]
    ) -> AsyncIterator["FakeIncoming"]:
        """Begin one upload."""
        self.check_space(total_bytes)
        incoming = FakeIncoming(self, job, total_bytes, report)
        try:
            yield incoming
        finally:
            incoming.keep()

    def check_space(self, needed: int) -> None:
        """Raise INSUFFICIENT_DISK_SPACE where there is no room for so many bytes."""
        free = self.files.room_now().available_bytes
        if needed > free:
            raise ModelhostError(
                Reason.INSUFFICIENT_DISK_SPACE,
                f"{needed} bytes are needed and {free} are free",
                {"neededBytes": str(needed), "freeBytes": str(free)},
            )


class FakeIncoming:
    """Satisfies ``modelhostd.ports.uploads.Incoming``."""

    def __init__(
        self,
        uploads: FakeUploads,
        job: DownloadJob,
        total_bytes: int,
        report: Callable[[Progress], None],
    ) -> None:
        self._uploads = uploads
        self._job = job
        self._total_bytes = total_bytes
        self._report = report
        self._file: UploadFile | None = None
        self._data = b""
        self._done: dict[str, bytes] = {}
        self._reused = self._begun = 0

    async def begin(self, file: UploadFile) -> None:
        """Begin the next file."""
        self._end_file()
        there = self._uploads.there(file)
        if file.offset > there:
            raise invalid("file.offset_bytes", f"at most {there}", file.offset)
        blobs, parts = self._uploads.files.blobs, self._uploads.parts
        if not self._total_bytes and there < file.size_bytes:
            self._uploads.check_space(file.size_bytes - file.offset)
        self._file = file
        self._data = blobs.get(file.sha256, parts.get(file.sha256, b""))[: file.offset]
        self._reused += file.offset
        self._begun += file.size_bytes

    async def write(self, data: bytes) -> None:
        """Take the next bytes."""
        self._data += data
        self._uploads.taken += len(data)
        done = sum(map(len, self._done.values())) + len(self._data)
        total = max(self._begun, self._total_bytes + self._reused)
        self._report(Progress(Phase.DOWNLOADING, done_bytes=done, total_bytes=total))

    async def end(self) -> Sequence[ModelFile]:
        """End the last file."""
        self._end_file()
        return [
            ModelFile(path, len(data), hashlib.sha256(data).hexdigest())
            for path, data in sorted(self._done.items())
        ]

    async def publish(self, revision: str) -> Fetched:
        """Make the artifact visible."""
        files = self._uploads.files.put(
            self._job.model, self._job.version, self._done, self._job.manifest
        )
        listed = [RemoteFile(f.path, f.size_bytes, f.sha256) for f in files]
        return Fetched(SourceFacts(UPLOAD, revision, listed), files, self._reused, 0)

    def keep(self) -> None:
        """Keep what came of a file that can be gone on with."""
        if self._file is not None and self._file.sha256:
            self._uploads.parts[self._file.sha256] = self._data

    def _end_file(self) -> None:
        file, self._file = self._file, None
        if file is None:
            return
        actual = hashlib.sha256(self._data).hexdigest()
        if file.sha256 and actual != file.sha256:
            self._uploads.parts.pop(file.sha256, None)
            raise ModelhostError(
                Reason.CHECKSUM_MISMATCH,
                f"{file.path}: expected {file.sha256}, got {actual}",
                {"file": file.path, "expected": file.sha256, "actual": actual},
            )
        if file.sha256:
            self._uploads.parts[file.sha256] = self._data
        self._done[file.path] = self._data
