"""The bytes of one file: streamed, hashed on the way, gone on with after every kind of cut.

One stream per file in a plain thread. A part that an earlier attempt left is hashed again and continued;
where the source gives no ranges the file is taken from its first byte.
"""

import hashlib
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from modelhostd.adapters.blobs import BlobStore
from modelhostd.adapters.cancel import Canceller
from modelhostd.adapters.connections import Connections
from modelhostd.adapters.layout import disk_errors
from modelhostd.adapters.parts import Part
from modelhostd.adapters.progress import Meter
from modelhostd.adapters.source import Body, SourceAdapter, mismatch
from modelhostd.adapters.wire import Transient, bad_reply
from modelhostd.core.paths import printable
from modelhostd.core.resources import Source
from modelhostd.core.transfer import RetryPolicy
from modelhostd.ports import RemoteFile

BUFFER_BYTES = 256 << 10
GAIN_BYTES_MIN = 64 << 10
"""An attempt that brought less does not start the count of tries anew: a drip must end."""
ATTEMPTS_MAX = 1000

T = TypeVar("T")


def part_key(file: RemoteFile, source: Source, revision: str) -> str:
    """Return the name of a file's part: its digest, so that any source of it can go on."""
    if file.sha256:
        return file.sha256
    if file.git_sha1:
        return f"git-{file.git_sha1}-{file.size_bytes}"
    seed = "\0".join((source.uri, revision, file.path, str(file.size_bytes)))
    return f"source-{hashlib.sha256(seed.encode()).hexdigest()}"


def with_retries(
    work: Callable[[], T], policy: RetryPolicy, canceller: Canceller, tell: Callable[[int], None]
) -> T:
    """Do ``work`` again after each Transient, as the policy says; raise its error in the end."""
    attempt = 0
    while True:
        try:
            return work()
        except Transient as failure:
            attempt += 1
            wait_for_next(failure, attempt, policy, canceller, tell)


def wait_for_next(
    failure: Transient,
    attempt: int,
    policy: RetryPolicy,
    canceller: Canceller,
    tell: Callable[[int], None],
) -> None:
    """Wait until the next try after failed attempt number ``attempt``, or raise the failure's error."""
    jitter = random.random()  # noqa: S311 -- spreads clients, guards nothing
    delay = policy.delay(attempt, failure.retry_after_s, jitter)
    if delay is None:
        raise failure.error from failure
    tell(attempt)
    canceller.wait(delay)


@dataclass
class _Hashes:
    """The digests of a file's bytes so far."""

    file: RemoteFile

    def __post_init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self.sha256: Any = hashlib.sha256()
        self.told: Any = None
        """The source's own kind of digest, where it is not SHA-256."""
        if not self.file.sha256 and self.file.git_sha1:
            # git's name of a blob is the SHA-1 of a header with its length, and its bytes.
            header = b"blob %d\0" % self.file.size_bytes
            self.told = hashlib.sha1(header, usedforsecurity=False)
        elif not self.file.sha256 and self.file.checksum:
            name = self.file.checksum.partition(":")[0]
            self.told = hashlib.new(name, usedforsecurity=False)

    def update(self, data: memoryview) -> None:
        self.sha256.update(data)
        if self.told is not None:
            self.told.update(data)


@dataclass(frozen=True, slots=True)
class Transfer:
    """What the threads of one download share: its plan, and the means to carry it out."""

    adapter: SourceAdapter
    connections: Connections
    store: BlobStore
    meter: Meter
    source: Source
    revision: str
    model: str
    written: Callable[[int], None]
    """Takes bytes that are on disk now off the space promised to this download."""

    @property
    def canceller(self) -> Canceller:
        """What ends every wait of this download."""
        return self.connections.canceller


def fetch_file(transfer: Transfer, file: RemoteFile) -> str:
    """Fetch one file into the verified files (or find it there); return its SHA-256.

    Raises CHECKSUM_MISMATCH (what came is in quarantine), the source's reasons, the disk's, or Stopped;
    what can be gone on with is kept.
    """
    store, canceller = transfer.store, transfer.canceller
    key = part_key(file, transfer.source, transfer.revision)
    with store.claim(key, canceller.is_cancelled), disk_errors(store.home.path):
        # Another download of the same file may have ended while this one waited for its turn.
        if (sha256 := store.found(key, file.size_bytes)) is not None:
            transfer.meter.reuse(file.path, file.size_bytes)
        else:
            with store.open_part(key, file.size_bytes, transfer.model) as part:
                try:
                    sha256 = _fill(transfer, file, part)
                    store.accept(part, sha256)
                except BaseException:
                    if part.position == 0:
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
    hashes = _Hashes(file)
    resumed = part.position > 0
    part.rehash(hashes.update, transfer.canceller.check)
    while True:
        _Stream(transfer, file, part, hashes).run()
        sha256 = str(hashes.sha256.hexdigest())
        expected = file.sha256 or file.git_sha1 or file.checksum.partition(":")[2]
        actual = sha256 if hashes.told is None else str(hashes.told.hexdigest())
        if not expected or actual == expected:
            return sha256
        if not resumed:
            break
        # What an earlier attempt left may be what is wrong: once more, from the first byte.
        resumed = False
        part.restart()
        hashes.restart()
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


class _Stream:
    """The attempts at one file."""

    def __init__(self, transfer: Transfer, file: RemoteFile, part: Part, hashes: _Hashes) -> None:
        self._transfer = transfer
        self._file = file
        self._part = part
        self._hashes = hashes
        self._reader = transfer.adapter.reader(
            transfer.connections, transfer.source, transfer.revision, file
        )
        self._buffer = memoryview(bytearray(BUFFER_BYTES))

    def run(self) -> None:
        """Try until every byte is there, or patience ends."""
        transfer, path = self._transfer, self._file.path
        attempt = 0
        for _ in range(ATTEMPTS_MAX):
            start = self._part.position
            if start == self._file.size_bytes:
                return
            try:
                self._attempt()
            except Transient as failure:
                gained = self._part.position - start
                attempt = 1 if gained >= GAIN_BYTES_MIN else attempt + 1
                wait_for_next(
                    failure,
                    attempt,
                    transfer.adapter.retry,
                    transfer.canceller,
                    lambda count: transfer.meter.retrying(path, count),
                )
        raise bad_reply(transfer.source.uri, f"{printable(path)} did not end")

    def _attempt(self) -> None:
        body = self._reader.open(self._part.position, self._file.size_bytes)
        try:
            if body.start != self._part.position:
                assert body.start == 0, body.start
                self._part.restart()
                self._hashes.restart()
            self._copy(body)
        except BaseException:
            body.close()
            raise

    def _copy(self, body: Body) -> None:
        transfer, part, size = self._transfer, self._part, self._file.size_bytes
        while count := body.read_into(self._buffer):
            if part.position + count > size:
                raise mismatch(self._file, f"{size} bytes", "more")
            data = self._buffer[:count]
            part.write(data)
            self._hashes.update(data)
            transfer.written(count)
            transfer.meter.advance(self._file.path, part.position)
            transfer.canceller.check()
        if part.position < size:
            cause = f"the body ended at byte {part.position} of {size}"
            raise Transient(bad_reply(transfer.source.uri, cause))
