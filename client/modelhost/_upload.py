"""What an upload takes from this machine: which files, under which paths, and how far it is."""

import hashlib
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from modelhost._errors import invalid
from modelhost.v1 import model_service_pb2, operations_pb2

CHUNK_BYTES = 192 * 1024
READ_BYTES = 1 << 20
REPORT_S = 0.1

Request = model_service_pb2.UploadModelFilesRequest
Report = Callable[[operations_pb2.Operation], None]


@dataclass(frozen=True, slots=True)
class LocalFile:
    """One file of this machine, and the path that it gets inside the model."""

    path: str
    local: Path
    size_bytes: int


def gather(
    paths: Iterable[str | os.PathLike[str]],
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
) -> list[LocalFile]:
    """Return the files of an upload: files by their names, folders with all that is below them.

    Names that begin with a dot are left out below a folder. Patterns are those of a shell on the whole
    path inside the model. Raises InvalidArgument where nothing is left or two files get one path,
    OSError for what is not there.
    """
    included, excluded = tuple(include), tuple(exclude)
    found: dict[str, LocalFile] = {}
    for given in map(Path, paths):
        for path, local in _below(given) if given.is_dir() else [(given.name, given)]:
            wanted = not included or any(fnmatchcase(path, pattern) for pattern in included)
            if not wanted or any(fnmatchcase(path, pattern) for pattern in excluded):
                continue
            try:
                path.encode()
            except UnicodeEncodeError:
                raise invalid("paths", "files with names in UTF-8", ascii(path)) from None
            if path in found:
                raise invalid("paths", f"one file for {path}", f"{found[path].local} and {local}")
            found[path] = LocalFile(path, local, local.stat().st_size)
    if not found:
        raise invalid("paths", "at least one file", "none")
    return [found[path] for path in sorted(found)]


def _below(folder: Path) -> Iterator[tuple[str, Path]]:
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            local = Path(root, name)
            if not name.startswith(".") and local.is_file():
                yield local.relative_to(folder).as_posix(), local


@dataclass(slots=True)
class Sending:
    """One upload as its sender sees it; progress is told as an operation of the daemon's would be."""

    model: str
    files: Sequence[LocalFile]
    report: Report
    digests: dict[str, str] = field(default_factory=dict)
    have: dict[str, int] = field(default_factory=dict)
    error: Exception | None = None
    """Why the stream ended early: a file that could not be read, or what ``report`` raised."""
    _done: int = 0
    _sent: int = 0
    _started: float = 0.0
    _told: float = 0.0

    @property
    def total_bytes(self) -> int:
        """Bytes of all files."""
        return sum(file.size_bytes for file in self.files)

    def hash(self) -> None:
        """Read every file for its SHA-256. Blocking."""
        phase = operations_pb2.OperationProgress.VERIFYING
        done = 0
        for file in self.files:
            digest = hashlib.sha256()
            with file.local.open("rb", buffering=0) as opened:
                while data := opened.read(READ_BYTES):
                    digest.update(data)
                    done += len(data)
                    self._tell(phase, done)
            self.digests[file.path] = digest.hexdigest()

    def answered(self, answer: model_service_pb2.UploadModelFilesResponse) -> int:
        """Note what is there; return the bytes that are to be sent."""
        self.have = {file.path: file.have_bytes for file in answer.files}
        self._done = sum(self.have.values())
        self._started = time.monotonic()
        return self.total_bytes - self._done

    def step(self, file: LocalFile) -> Request:
        """Return the message that begins a file."""
        return Request(
            file=Request.File(
                path=file.path,
                size_bytes=file.size_bytes,
                sha256=self.digests[file.path],
                offset_bytes=self.have.get(file.path, 0),
            )
        )

    def read(self, file: LocalFile, sent_bytes: int) -> bytes:
        """Return what comes behind the bytes that are there and those that were sent; b"" at a file's end.

        The file is opened for each part: nobody would close it for a stream that is broken off.
        """
        with file.local.open("rb", buffering=0) as opened:
            opened.seek(self.have.get(file.path, 0) + sent_bytes)
            return opened.read(CHUNK_BYTES)

    def sent(self, count: int) -> None:
        """Count bytes that are on their way."""
        self._done += count
        self._sent += count
        self._tell(operations_pb2.OperationProgress.PHASE_UNSPECIFIED, self._done)

    def _tell(self, phase: operations_pb2.OperationProgress.Phase.ValueType, done: int) -> None:
        now = time.monotonic()
        total = self.total_bytes
        if now - self._told < REPORT_S and done < total:
            return
        self._told = now
        spent = now - self._started
        progress = operations_pb2.OperationProgress(
            phase=phase, done_bytes=min(done, total), total_bytes=total, total_files=len(self.files)
        )
        if self._started and spent > 0:
            progress.bytes_per_second = self._sent / spent
        self.report(
            operations_pb2.Operation(
                kind=operations_pb2.Operation.UPLOAD,
                model=self.model,
                state=operations_pb2.Operation.RUNNING,
                progress=progress,
            )
        )
