"""Hugging Face's own cache as a place where others find what was fetched: opt-in, whole files only.

    <root>/models--org--name/blobs/<digest>           a copy: what others may write is no blob of ours
                             snapshots/<commit>/path  links to the blobs
                             refs/<revision>          the commit

Blobs come first, each by one rename; the snapshot by one rename, or link by link where there is one of
this commit; the ref last. Nothing that is there is changed, and nothing in it is deleted. Where the file
system can share blocks the copy costs none.
"""

import errno
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import structlog

from modelhostd.adapters.blobs import BlobStore
from modelhostd.adapters.cancel import Canceller
from modelhostd.core.sources import hub_repo, scheme_of
from modelhostd.ports import RemoteFile, SourceFacts

log = structlog.get_logger(__name__)

COPY_BYTES = 64 << 20
"""How much is copied before a cancel is looked for."""
FREE_BYTES_MIN = 1 << 30
"""What a copy leaves free: downloads have been promised their space, and it is none of theirs."""
DEFAULT_REVISION = "main"

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class HubPublisher:
    """One cache directory, made where it is missing."""

    def __init__(self, root: Path, store: BlobStore) -> None:
        self._root = root
        self._store = store

    def publish(self, facts: SourceFacts, digests: Mapping[str, str], canceller: Canceller) -> None:
        """Show the verified files of a plan of the Hub's to others; of any other source do nothing.

        ``digests``: path -> SHA-256. What goes wrong with the cache is logged, and fails nothing.
        Raises Stopped.
        """
        if scheme_of(facts.source) != "hf":
            return
        try:
            self._root.mkdir(parents=True, exist_ok=True)
            folder = "models--" + hub_repo(facts.source).replace("/", "--")
            with _below(self._root, folder) as repository:
                for file in facts.files:
                    self._blob(repository, file, digests[file.path], canceller)
                self._snapshot(repository, facts)
                self._ref(repository, facts)
        except OSError as error:
            log.warning(
                "the Hugging Face cache could not be added to",
                source=facts.source.uri,
                path=str(self._root),
                cause=error.strerror or type(error).__name__,
            )

    def _blob(self, repository: int, file: RemoteFile, sha256: str, canceller: Canceller) -> None:
        name = _blob_name(file, sha256)
        with _below(repository, "blobs") as blobs:
            with suppress(FileNotFoundError):
                if os.stat(name, dir_fd=blobs).st_size == file.size_bytes:
                    return
            partial = f"{name}.{uuid.uuid4().hex[:8]}.incomplete"
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            with ExitStack() as held:
                source = self._store.open_content(sha256, self._store.verified_names())
                held.callback(os.close, source)
                target = os.open(partial, flags, 0o644, dir_fd=blobs)
                held.callback(os.close, target)
                held.callback(_forget, partial, blobs)
                facts = os.fstatvfs(target)
                if facts.f_bavail * facts.f_frsize < file.size_bytes + FREE_BYTES_MIN:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                done = 0
                while done < file.size_bytes:
                    canceller.check()
                    done += _copy(source, target, done, min(file.size_bytes - done, COPY_BYTES))
                os.fsync(target)
                os.rename(partial, name, src_dir_fd=blobs, dst_dir_fd=blobs)

    def _snapshot(self, repository: int, facts: SourceFacts) -> None:
        # Staged beside `snapshots`: whatever is in there is a revision to others.
        staged = f".{facts.revision}.{uuid.uuid4().hex[:8]}.incomplete"
        try:
            with _below(repository, staged) as made:
                self._links(made, facts)
            with _below(repository, "snapshots") as snapshots:
                try:
                    os.rename(staged, facts.revision, src_dir_fd=repository, dst_dir_fd=snapshots)
                except OSError:
                    # There is one of this commit: what is missing in it is added.
                    with _below(snapshots, facts.revision) as there:
                        self._links(there, facts)
        finally:
            shutil.rmtree(staged, ignore_errors=True, dir_fd=repository)

    @staticmethod
    def _links(snapshot: int, facts: SourceFacts) -> None:
        for file in facts.files:
            *folders, name = file.path.split("/")
            up = "../" * (len(folders) + 2)
            with _below(snapshot, *folders) as folder, suppress(FileExistsError):
                os.symlink(f"{up}blobs/{_blob_name(file, '')}", name, dir_fd=folder)

    @staticmethod
    def _ref(repository: int, facts: SourceFacts) -> None:
        revision = facts.source.revision or DEFAULT_REVISION
        if revision == facts.revision:
            return
        *folders, name = revision.split("/")
        with _below(repository, "refs", *folders) as refs:
            partial = f".{name[:100]}.{uuid.uuid4().hex[:8]}.incomplete"
            fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644, dir_fd=refs)
            try:
                os.write(fd, facts.revision.encode())
                os.fsync(fd)
                os.rename(partial, name, src_dir_fd=refs, dst_dir_fd=refs)
            finally:
                os.close(fd)
                _forget(partial, refs)


def _blob_name(file: RemoteFile, sha256: str) -> str:
    """Return what the Hub calls the content: the SHA-256 of large files, git's name of small ones."""
    return file.sha256 or file.git_sha1 or sha256


def _copy(source: int, target: int, offset: int, count: int) -> int:
    """Copy some bytes of one file to another, sharing blocks where that can be; returns how many."""
    try:
        copied = os.copy_file_range(source, target, count, offset, offset)
    except OSError as error:
        if error.errno not in {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP}:
            raise
        os.lseek(target, offset, os.SEEK_SET)
        copied = os.sendfile(target, source, offset, count)
    if copied == 0:
        raise OSError(errno.EIO, "a file became shorter")
    return copied


def _forget(name: str, folder: int) -> None:
    with suppress(OSError):
        os.unlink(name, dir_fd=folder)


@contextmanager
def _below(start: Path | int, *names: str) -> Iterator[int]:
    """Open a directory below another, made where it is missing; no link on the way is followed."""
    fd = os.open(start, _DIRECTORY & ~os.O_NOFOLLOW) if isinstance(start, Path) else os.dup(start)
    try:
        for name in names:
            with suppress(FileExistsError):
                os.mkdir(name, 0o755, dir_fd=fd)
            inner = os.open(name, _DIRECTORY, dir_fd=fd)
            os.close(fd)
            fd = inner
        yield fd
    finally:
        os.close(fd)
