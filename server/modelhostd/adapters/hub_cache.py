"""Hugging Face's own cache as a place where a file may be already: read, hashed again, never written.

    <root>/models--org--name/blobs/<digest>     a file, or a link to one that is inside the root, too

Copied, not linked: what other programs may still write must not become a blob.
"""

import os
from contextlib import suppress
from pathlib import Path

import structlog

from modelhostd.adapters.beneath import LeadsOut, NotRegular, open_regular_beneath
from modelhostd.adapters.hashing import Digests
from modelhostd.adapters.layout import disk_errors
from modelhostd.adapters.parts import Part
from modelhostd.adapters.pump import part_key
from modelhostd.adapters.transfer import Transfer
from modelhostd.ports import RemoteFile

log = structlog.get_logger(__name__)

READ_BYTES = 1 << 20
REPOSITORIES_MAX = 10_000
"""How many folders are looked into; a cache has hundreds."""


class _UnreadableError(Exception):
    """The cache's file cannot be read to its end: it is fetched instead."""


class HubCache:
    """One cache directory; a missing one is an empty one."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def take(self, transfer: Transfer, file: RemoteFile) -> None:
        """Bring a file to the verified ones, if the cache has it and it is what the plan says.

        What an earlier download left of it is gone on with instead. Blocking.
        """
        digest = file.sha256 or file.git_sha1
        if not digest:
            return
        store, canceller = transfer.store, transfer.canceller
        key = part_key(file, transfer.source, transfer.revision)
        with store.claim(key, canceller.is_cancelled), disk_errors(store.home.path):
            if store.found(key, file.size_bytes) is not None:
                return
            fd = self._open(digest, file.size_bytes)
            if fd < 0:
                return
            try:
                with store.open_part(key, file.size_bytes, transfer.model) as part:
                    if part.done_bytes == 0:
                        self._fill(transfer, file, part, fd)
            finally:
                os.close(fd)

    def _open(self, digest: str, size: int) -> int:
        """Open the first file of this name and size; -1 where there is none."""
        try:
            root = os.open(self._root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            return -1
        try:
            names = [name for name in os.listdir(root) if name.startswith("models--")]
            for name in sorted(names)[:REPOSITORIES_MAX]:
                with suppress(OSError, LeadsOut, NotRegular):
                    fd = open_regular_beneath(root, (name, "blobs", digest))
                    if os.fstat(fd).st_size == size:
                        return fd
                    os.close(fd)
        except OSError as error:
            log.warning("the Hugging Face cache cannot be read", cause=error.strerror)
        finally:
            os.close(root)
        return -1

    def _fill(self, transfer: Transfer, file: RemoteFile, part: Part, fd: int) -> None:
        """Copy and hash; what is wrong is dropped, and fetched as if it had not been there."""
        digests = Digests(file)
        accepted = False
        try:
            self._copy(transfer, part, fd, digests)
            if digests.actual == digests.expected:
                transfer.store.accept(part, digests.sha256)
                accepted = True
            else:
                log.warning(
                    "a file of the Hugging Face cache is not what its name says; it is fetched",
                    file=file.path,
                    expected=digests.expected,
                    actual=digests.actual,
                )
        except _UnreadableError as error:
            log.warning("a file of the Hugging Face cache cannot be read", cause=str(error))
        finally:
            if not accepted:
                transfer.written(-part.done_bytes)
                transfer.store.drop_part(part.key)

    @staticmethod
    def _copy(transfer: Transfer, part: Part, fd: int, digests: Digests) -> None:
        buffer = memoryview(bytearray(min(READ_BYTES, max(1, part.size))))
        position = 0
        while position < part.size:
            transfer.canceller.check()
            wanted = buffer[: part.size - position]
            try:
                count = os.preadv(fd, [wanted], position)
            except OSError as error:
                raise _UnreadableError(error.strerror) from None
            if count == 0:
                raise _UnreadableError("it became shorter")
            digests.update(wanted[:count])
            part.write(position, wanted[:count])
            part.sync_if_due()
            transfer.written(count)
            position += count
