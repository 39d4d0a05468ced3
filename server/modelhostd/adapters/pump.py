"""One file into the verified files: claimed, fetched, held against its digest, accepted or put away."""

import hashlib
from collections.abc import Mapping

from modelhostd.adapters.blobs import BlobStore
from modelhostd.adapters.hashing import Digests, Hasher
from modelhostd.adapters.layout import disk_errors
from modelhostd.adapters.parts import Part
from modelhostd.adapters.source import mismatch
from modelhostd.adapters.streams import FileStreams
from modelhostd.adapters.transfer import Transfer
from modelhostd.core.resources import Source
from modelhostd.ports import RemoteFile


def part_key(file: RemoteFile, source: Source, revision: str) -> str:
    """Return the name of a file's part: its digest, so that any source of it can go on."""
    if file.sha256:
        return file.sha256
    if file.git_sha1:
        return f"git-{file.git_sha1}-{file.size_bytes}"
    seed = "\0".join((source.uri, revision, file.path, str(file.size_bytes)))
    return f"source-{hashlib.sha256(seed.encode()).hexdigest()}"


def fetch_file(transfer: Transfer, file: RemoteFile) -> str:
    """Fetch one file into the verified files (or find it there); return its SHA-256.

    Raises CHECKSUM_MISMATCH (what came is in quarantine), the source's reasons, the disk's, or Stopped;
    what can be gone on with is kept.
    """
    store, canceller = transfer.store, transfer.canceller
    key = part_key(file, transfer.source, transfer.revision)
    with store.claim(key, canceller.is_cancelled), disk_errors(store.home.path):
        transfer.meter.start(file.path)
        # Another download of the same file may have ended while this one waited for its turn.
        if (sha256 := store.found(key, file.size_bytes)) is not None:
            transfer.meter.reuse(file.path, file.size_bytes)
        else:
            with store.open_part(key, file.size_bytes, transfer.model) as part:
                try:
                    sha256 = _fill(transfer, file, part)
                    store.accept(part, sha256)
                except BaseException:
                    if part.done_bytes == 0:
                        store.drop_part(key)
                    raise
    transfer.meter.finish(file.path)
    return sha256


def kept_whole(
    store: BlobStore, file: RemoteFile, key: str, verified: Mapping[str, str]
) -> str | None:
    """Return the SHA-256 of a file that is here already; None when it must be fetched.

    ``verified`` is ``store.verified()``: listed once for many files.
    """
    if file.sha256 and store.has_blob(file.sha256, file.size_bytes):
        return file.sha256
    return verified.get(key)


def _fill(transfer: Transfer, file: RemoteFile, part: Part) -> str:
    """Bring a part to its full size with the right digest; return its SHA-256."""
    digests = Digests(file)
    hasher = Hasher(part, digests, transfer.canceller.check)
    resumed = part.done_bytes > 0
    while True:
        FileStreams(transfer, file, part, hasher).run()
        expected, actual = digests.expected, digests.actual
        if not expected or actual == expected:
            return digests.sha256
        if not resumed:
            break
        # What an earlier attempt left may be what is wrong: once more, from the first byte.
        resumed = False
        part.restart()
        hasher.restart()
    facts = {
        "source": transfer.source.uri,
        "revision": transfer.revision,
        "file": file.path,
        "model": transfer.model,
        "expected": expected,
        "actual": actual,
    }
    name = transfer.store.quarantine_part(part, facts)
    raise mismatch(file, expected, actual, f"what came is in quarantine as {name}")
