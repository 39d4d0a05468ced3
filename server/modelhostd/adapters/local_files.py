"""``file:///...``: files and folders of this machine, beneath the roots that the operator listed.

Copied, never linked: what others may still write must not become a blob. A file counts only as it was
when the plan was made (size and time of change); its digest is learned while it is copied.
"""

import errno
import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import field
from glob import escape
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

from modelhostd.adapters.beneath import (
    LeadsOut,
    NotRegular,
    open_beneath,
    open_regular_beneath,
)
from modelhostd.adapters.cancel import Canceller
from modelhostd.adapters.connections import Connections
from modelhostd.adapters.source import LISTED_FILES_MAX, Body, TransferConfig
from modelhostd.adapters.wire import bad_reply
from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.origins import OriginPolicy
from modelhostd.core.paths import SEGMENTS_MAX, printable
from modelhostd.core.resources import Source
from modelhostd.core.selection import printable_or_plain, select
from modelhostd.core.transfer import RetryPolicy
from modelhostd.core.values import dataclass
from modelhostd.ports import RemoteFile, SourceFacts

SETTING = "downloads.file_roots"


@dataclass(frozen=True, slots=True)
class LocalConfig:
    """What of this machine may be taken."""

    roots: tuple[Path, ...] = ()
    """Absolute; nothing outside them is looked at. A root itself may be a link: the operator chose it."""
    transfer: TransferConfig = field(default_factory=TransferConfig)


@dataclass
class _Listing:
    files: dict[str, RemoteFile] = field(default_factory=dict)
    skipped: list[tuple[str, str]] = field(default_factory=list)


class LocalFiles:
    """Sources of the ``file`` scheme; satisfies ``source.SourceAdapter``."""

    def __init__(self, config: LocalConfig) -> None:
        self.config = config

    @property
    def retry(self) -> RetryPolicy:
        """How often; a file that cannot be read is not tried again."""
        return self.config.transfer.retry

    @property
    def files_at_once(self) -> int:
        """One: two copies of one disk get in each other's way."""
        return 1

    def connections(self, canceller: Canceller, source: Source) -> Connections:
        """Return connections that nothing opens. Raises SOURCE_NOT_ALLOWED outside the roots."""
        self._place(source)
        return Connections(OriginPolicy(), self.config.transfer.limits, canceller, source.uri)

    def plan(
        self, connections: Connections, source: Source, *, allow_unsafe: bool = False
    ) -> SourceFacts:
        """List the file, or every regular file of the folder; the revision is the listing's digest."""
        root, segments = self._place(source)
        listing = _Listing()
        named: tuple[str, ...] = ()
        with _opened(root, segments, source) as (base, fd):
            facts = os.fstat(fd)
            if stat.S_ISREG(facts.st_mode):
                listing.files[segments[-1]] = _file(segments[-1], facts)
                # Who names one file means that file, of whatever kind.
                named = (escape(segments[-1]),)
            else:
                _walk(base, segments, fd, listing, connections)
        chosen = select(
            tuple(listing.files),
            source.allow_patterns or named,
            source.ignore_patterns,
            allow_unsafe=allow_unsafe,
            source=source.uri,
        )
        files = tuple(listing.files[path] for path in chosen.chosen)
        told = sorted((file.path, file.validator) for file in files)
        return SourceFacts(
            source=source,
            revision=hashlib.sha256(repr(told).encode("utf-8", "surrogateescape")).hexdigest(),
            files=files,
            skipped=(*chosen.skipped, *listing.skipped),
        )

    def reader(
        self, connections: Connections, source: Source, revision: str, file: RemoteFile
    ) -> "LocalReader":
        """Return the reader of one file."""
        root, segments = self._place(source)
        return LocalReader(root, segments, source, file)

    def _place(self, source: Source) -> tuple[Path, tuple[str, ...]]:
        """Return the root that a source is beneath, and the way from there."""
        path = PurePosixPath(unquote(source.uri.removeprefix("file://"), errors="surrogateescape"))
        beneath = [root for root in self.config.roots if path.is_relative_to(root)]
        if ".." in path.parts or not beneath:
            roots = ", ".join(map(str, self.config.roots)) or "none"
            raise ModelhostError(
                Reason.SOURCE_NOT_ALLOWED,
                f"{source.uri}: files are taken only from beneath the folders that the operator lists "
                f"in {SETTING} (now: {roots})",
                {"source": source.uri, "setting": SETTING},
            )
        root = max(beneath, key=lambda root: len(root.parts))
        return root, path.relative_to(root).parts


class LocalReader:
    """One file, read from any offset while it is as it was planned; satisfies ``source.Reader``."""

    def __init__(
        self, root: Path, segments: tuple[str, ...], source: Source, file: RemoteFile
    ) -> None:
        self._root = root
        self._segments = segments
        self._source = source
        self._file = file

    def open(self, start: int, end: int) -> Body:
        """Open the file at an offset."""
        with _opened(self._root, self._segments, self._source) as (base, fd):
            if stat.S_ISREG(os.fstat(fd).st_mode):
                return LocalBody(os.dup(fd), start, end, self._file, self._source)
            with _source_errors(self._source, self._file.path):
                inside = (*self._segments, *self._file.path.split("/"))
                opened = open_regular_beneath(base, inside)
                return LocalBody(opened, start, end, self._file, self._source)


class LocalBody:
    """An open file of somebody else's; satisfies ``source.Body``."""

    def __init__(self, fd: int, start: int, end: int, file: RemoteFile, source: Source) -> None:
        self.start = start
        self.end = end
        self._fd = fd
        self._position = start
        self._file = file
        self._source = source
        try:
            self._check()
        except BaseException:
            self.close()
            raise

    def read_into(self, buffer: memoryview) -> int:
        """Read the next bytes; 0 at the end, where it must still be the file that was planned."""
        wanted = buffer[: self.end - self._position]
        with _source_errors(self._source, self._file.path):
            count = os.preadv(self._fd, [wanted], self._position) if wanted else 0
        self._position += count
        if count == 0:
            self._check()
            self.close()
        return count

    def close(self) -> None:
        """Close the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _check(self) -> None:
        if self._fd >= 0 and _validator(os.fstat(self._fd)) != self._file.validator:
            cause = f"{printable(self._file.path)} changed while it was copied"
            raise bad_reply(self._source.uri, cause)


def _validator(facts: os.stat_result) -> str:
    return f"{facts.st_size}-{facts.st_mtime_ns}"


def _file(path: str, facts: os.stat_result) -> RemoteFile:
    return RemoteFile(path, facts.st_size, validator=_validator(facts))


def _walk(
    base: int, segments: tuple[str, ...], folder: int, listing: _Listing, connections: Connections
) -> None:
    """List what is below a folder; links to folders are left out, so that nothing goes in circles."""
    source = Source(connections.source)
    below: list[tuple[str, ...]] = [()]
    while below:
        inside = below.pop()
        connections.canceller.check()
        with _source_errors(source, "/".join(inside)):
            fd = open_beneath(base, (*segments, *inside)) if inside else os.dup(folder)
            try:
                names = sorted(os.listdir(fd), reverse=True)
                kinds = {n: os.stat(n, dir_fd=fd, follow_symlinks=False) for n in names}
            finally:
                os.close(fd)
        for name in reversed(names):
            way = (*inside, name)
            if stat.S_ISDIR(kinds[name].st_mode) and len(way) < SEGMENTS_MAX:
                below.append(way)
            else:
                _list(base, segments, way, kinds[name], listing)
        if len(listing.files) + len(listing.skipped) + len(below) > LISTED_FILES_MAX:
            raise bad_reply(source.uri, f"more than {LISTED_FILES_MAX} files")


def _list(
    base: int,
    segments: tuple[str, ...],
    way: tuple[str, ...],
    facts: os.stat_result,
    listing: _Listing,
) -> None:
    path = "/".join(way)
    why = "it is no regular file"
    if stat.S_ISLNK(facts.st_mode):
        try:
            fd = open_regular_beneath(base, (*segments, *way))
        except LeadsOut:
            why = "a link that leads out of the folder that the operator listed"
        except (NotRegular, OSError):
            why = "a link to no regular file"
        else:
            facts = os.fstat(fd)
            os.close(fd)
    if stat.S_ISREG(facts.st_mode):
        listing.files[path] = _file(path, facts)
    else:
        listing.skipped.append((printable_or_plain(path), why))


@contextmanager
def _opened(root: Path, segments: tuple[str, ...], source: Source) -> Iterator[tuple[int, int]]:
    """Open a root and what a source names beneath it; yields both descriptors."""
    opened: list[int] = []
    try:
        with _source_errors(source, "/".join(segments)):
            opened.append(os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
            opened.append(open_beneath(opened[0], segments))
        yield opened[0], opened[1]
    finally:
        for fd in opened:
            os.close(fd)


@contextmanager
def _source_errors(source: Source, path: str) -> Iterator[None]:
    """Turn what goes wrong with somebody else's file into a reason; it is not our disk that fails."""
    shown = printable(path)
    try:
        yield
    except LeadsOut:
        raise ModelhostError(
            Reason.SOURCE_NOT_ALLOWED,
            f"{source.uri}: {shown} is a link that leads out of the folder listed in {SETTING}; list "
            "where it leads to, or copy the file",
            {"source": source.uri, "setting": SETTING},
        ) from None
    except NotRegular:
        raise ModelhostError(
            Reason.SOURCE_NOT_ALLOWED,
            f"{source.uri}: {shown} is no regular file; only those are taken",
            {"source": source.uri, "setting": SETTING},
        ) from None
    except OSError as error:
        raise _reason(error, source, shown) from error


def _reason(error: OSError, source: Source, shown: str) -> ModelhostError:
    if error.errno in {errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG}:
        return ModelhostError(
            Reason.SOURCE_NOT_FOUND,
            f"{source.uri}: {shown} is not there; check the spelling",
            {"source": source.uri, "missing": "file"},
        )
    if error.errno in {errno.EACCES, errno.EPERM}:
        return ModelhostError(
            Reason.ACCESS_DENIED,
            f"{source.uri}: the daemon's user may not read {shown}; change its mode or its group",
            {"source": source.uri},
        )
    cause = f"{errno.errorcode.get(error.errno or 0, 'error')}: {error.strerror or error}"
    return ModelhostError(
        Reason.STORAGE_ERROR,
        f"{source.uri}: {shown} cannot be read ({cause}); check the disk it is on",
        {"path": source.uri, "cause": cause},
    )
