"""The order of an upload: which step may follow which, and what its files may be called and weigh.

    start, (file, chunk*)*, commit        only the last step makes an artifact of what came

A stream that ends before ``commit`` was broken, however whole its files look.
"""

import re
from collections.abc import Sequence

from modelhostd.core.errors import ModelhostError, Reason, invalid
from modelhostd.core.manifest import FILES_MAX
from modelhostd.core.paths import check_tree, path_fault, path_key, printable
from modelhostd.core.resources import Source
from modelhostd.core.selection import unsafe_suffix
from modelhostd.core.values import dataclass

UPLOAD = Source("upload://")
"""Where the files of an artifact came from that a client brought."""
CHUNK_BYTES_MAX = 192 * 1024
SIZE_MAX = 1 << 50
REVISION_CHARS_MAX = 200

_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class UploadStart:
    """What holds for a whole upload; see UploadModelFilesRequest.Start."""

    revision: str = ""
    total_bytes: int = 0


@dataclass(frozen=True, slots=True)
class UploadFile:
    """One file that a client brings, but for the first ``offset`` bytes of it, which are there."""

    path: str
    size_bytes: int
    sha256: str = ""
    offset: int = 0


@dataclass(frozen=True, slots=True)
class UploadChunk:
    """The next bytes of a file."""

    data: bytes


@dataclass(frozen=True, slots=True)
class UploadCommit:
    """All files came."""


UploadStep = UploadFile | UploadChunk | UploadCommit


def check_start(start: UploadStart) -> None:
    """Raise INVALID_ARGUMENT for a start out of bounds."""
    if not 0 <= start.total_bytes <= SIZE_MAX:
        raise invalid("start.total_bytes", f"0 to {SIZE_MAX}", start.total_bytes)
    if len(start.revision) > REVISION_CHARS_MAX or not start.revision.isprintable():
        expected = f"at most {REVISION_CHARS_MAX} printable characters"
        raise invalid("start.revision", expected, start.revision)


def check_files(files: Sequence[UploadFile]) -> None:
    """Raise what a stream of these files would be refused with: INVALID_ARGUMENT or UNSAFE_FILE."""
    steps = Steps()
    for file in files:
        steps.file(file)
        steps.chunk(file.size_bytes - file.offset)
    if files:
        steps.commit()


class Steps:
    """Judges the steps of one upload in their order."""

    def __init__(self, total_bytes: int = 0) -> None:
        self.total_bytes = total_bytes
        self._paths: dict[str, str] = {}
        self._file: UploadFile | None = None
        self._came = 0
        """Bytes of the file under way that are there."""
        self._brought = 0
        """Bytes of the whole stream."""
        self.committed = False

    def file(self, file: UploadFile) -> None:
        """Judge the begin of a file. Raises INVALID_ARGUMENT or UNSAFE_FILE."""
        self._file_is_whole()
        if fault := path_fault(file.path):
            raise invalid("file.path", f"a relative path that may be used ({fault})", file.path)
        if self._paths.get(path_key(file.path)) == file.path:
            raise invalid("file.path", "each path once", file.path)
        if len(self._paths) >= FILES_MAX:
            raise invalid("file", f"at most {FILES_MAX} files", len(self._paths) + 1)
        if fault := unsafe_suffix(file.path):
            raise _unsafe(file.path, fault)
        if not 0 <= file.size_bytes <= SIZE_MAX:
            raise invalid("file.size_bytes", f"0 to {SIZE_MAX}", file.size_bytes)
        if file.sha256 and _SHA256.fullmatch(file.sha256) is None:
            expected = "64 hexadecimal digits in lower case, or nothing"
            raise invalid("file.sha256", expected, file.sha256)
        if not 0 <= file.offset <= file.size_bytes:
            raise invalid("file.offset_bytes", f"0 to size_bytes ({file.size_bytes})", file.offset)
        if file.offset and not file.sha256:
            raise invalid("file.offset_bytes", "0 for a file without sha256", file.offset)
        known = self._paths.get(path_key(file.path))
        if known is not None:
            raise _unsafe(file.path, f"it collides with {printable(known)}")
        self._paths[path_key(file.path)] = file.path
        self._file, self._came = file, file.offset

    def chunk(self, count: int) -> None:
        """Judge so many bytes of the file under way. Raises INVALID_ARGUMENT."""
        file = self._file
        if file is None:
            raise invalid("chunk", "bytes behind a step with a file", f"{count} bytes")
        self._came += count
        self._brought += count
        if self._came > file.size_bytes:
            expected = f"{file.size_bytes} bytes of {printable(file.path)}, its size_bytes"
            raise invalid("chunk", expected, "more")
        if self.total_bytes and self._brought > self.total_bytes:
            raise invalid("chunk", f"{self.total_bytes} bytes in all (start.total_bytes)", "more")

    def commit(self) -> None:
        """Judge the end. Raises INVALID_ARGUMENT or UNSAFE_FILE."""
        self._file_is_whole()
        if not self._paths:
            raise invalid("commit", "at least one file before it", "none")
        check_tree(self._paths.values(), UPLOAD.uri)
        self.committed = True

    def unfinished(self) -> ModelhostError:
        """Return the error of a stream that ended before ``commit``."""
        return invalid("step", "commit as the last message", "the end of the stream")

    def _file_is_whole(self) -> None:
        if self.committed:
            raise invalid("step", "nothing behind commit", "another step")
        if self._file is not None and self._came < self._file.size_bytes:
            expected = f"{self._file.size_bytes} bytes of {printable(self._file.path)}"
            raise invalid("chunk", f"{expected}, its size_bytes", f"{self._came} bytes")


def _unsafe(path: str, fault: str) -> ModelhostError:
    shown = printable(path)
    return ModelhostError(
        Reason.UNSAFE_FILE,
        f"{shown} is refused: {fault}; leave the file out, safetensors can hold the same weights",
        {"source": UPLOAD.uri, "file": shown, "cause": fault},
    )
