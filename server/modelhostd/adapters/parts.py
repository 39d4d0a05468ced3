"""A file that is being fetched: the bytes that are there, and a journal that says which they are.

``<key>.part`` has bytes wherever they came. ``<key>.json`` beside it has two lines:

    {"format": 2, "size": .., "boot": "..", "model": "..", "synced": "0-33554432"}
    0-40370176 50331648-51380224

The first is replaced as a whole after each data sync: ``synced`` spans survive a power cut. The second is
written over after each write of bytes, by one call, so that ``kill -9`` finds it whole: after a crash of
the daemon these spans are trusted (the kernel kept them), after another boot only what was synced. Either
way the bytes are hashed again, and the source's digest decides.
"""

import json
import os
import threading
from typing import Any, Self

from modelhostd.adapters.failpoints import hit
from modelhostd.adapters.layout import PARTS, Home, open_regular, write_all
from modelhostd.core.spans import Spans, parse_spans
from modelhostd.core.values import dataclass

FORMAT = 2
JOURNAL_BYTES_MAX = 8192
SPANS_CHARS_MAX = 3000
"""Some 70 spans; there are never more than a file has connections, and one."""


def boot_id() -> str:
    """Return what tells this boot of the machine from any other; empty where the kernel has none."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return file.read(64).strip()
    except OSError:
        return ""


BOOT_ID = boot_id()


@dataclass(frozen=True, slots=True)
class Journal:
    """What is written beside a part. ``synced`` bytes survive a power cut, ``written`` a crash."""

    size: int
    boot: str
    model: str
    synced: Spans
    written: Spans

    def trusted(self, have: int, size: int) -> Spans:
        """Return which of the ``have`` bytes on disk belong to a file of ``size`` bytes."""
        if self.size != size:
            return Spans()
        same_boot = bool(self.boot) and self.boot == BOOT_ID
        return (self.written if same_boot else self.synced).within(min(have, size))


def read_journal(home: Home, key: str) -> Journal | None:
    """Return the journal of a part, or None when there is none or it is torn."""
    try:
        fd = home.open_file((*PARTS, f"{key}.json"))
    except FileNotFoundError:
        return None
    with os.fdopen(fd, "rb") as file:
        head, _, tail = file.read(JOURNAL_BYTES_MAX + 1).partition(b"\n")
    try:
        raw: Any = json.loads(head)
        size, boot, model = (raw[key] for key in ("size", "boot", "model"))
        synced = parse_spans(raw["synced"])
        written = parse_spans(tail.decode("ascii").rstrip(" "))
        valid = (
            raw["format"] == FORMAT
            and type(size) is int
            and all(isinstance(text, str) for text in (boot, model))
        )
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    if not valid or synced is None or synced.end > size:
        return None
    return Journal(size, boot, model, synced, synced if written is None else written)


def kept_spans(home: Home, key: str, size: int) -> Spans:
    """Return which bytes of a file an earlier attempt left that can be gone on from."""
    journal, found = read_journal(home, key), home.stat((*PARTS, f"{key}.part"))
    return journal.trusted(found.st_size, size) if journal and found else Spans()


class Part:
    """One part, open for writing at any offset, by several threads."""

    def __init__(self, home: Home, key: str, size: int, model: str, sync_bytes: int) -> None:
        self.key = key
        self.size = size
        self._home = home
        self._model = model
        self._sync_bytes = sync_bytes
        self._lock = threading.Lock()
        self._done = kept_spans(home, key, size)
        self._synced = Spans()
        self._unsynced = self._done.total
        self._journal_fd = -1
        self._mark_at = self._marked = 0
        with home.directory(*PARTS) as directory:
            self.fd = open_regular(directory, f"{key}.part", os.O_RDWR | os.O_CREAT)
        try:
            # What is behind the trusted bytes was written by nobody we know.
            os.ftruncate(self.fd, self._done.end)
            self._write_journal()
            hit("part.opened")
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close; what was written stays for the next attempt."""
        for fd in (self.fd, self._journal_fd):
            if fd >= 0:
                os.close(fd)
        self.fd = self._journal_fd = -1

    @property
    def done(self) -> Spans:
        """The bytes that are there; a copy."""
        with self._lock:
            return self._done.copy()

    @property
    def done_bytes(self) -> int:
        """How many bytes are there."""
        with self._lock:
            return self._done.total

    @property
    def prefix(self) -> int:
        """How many bytes are there from the first on without a gap."""
        with self._lock:
            return self._done.prefix

    @property
    def unsynced_bytes(self) -> int:
        """How many bytes a power cut would take."""
        return self._unsynced

    def write(self, offset: int, data: memoryview) -> int:
        """Write bytes at an offset and note them; return how many bytes of the file are there."""
        end = offset
        while data:
            count = os.pwrite(self.fd, data, end)
            data = data[count:]
            end += count
        hit("part.written")
        with self._lock:
            self._done.add(offset, end)
            self._unsynced += end - offset
            self._mark()
            return self._done.total

    def sync_if_due(self) -> None:
        """Sync every ``sync_bytes``, so that no later sync has gigabytes to write. One thread's work."""
        if self._unsynced < self._sync_bytes:
            return
        with self._lock:
            done, unsynced = self._done.copy(), self._unsynced
        os.fdatasync(self.fd)
        with self._lock:
            self._synced = done
            self._unsynced -= unsynced
            self._write_journal()
        hit("part.synced")

    def restart(self) -> None:
        """Forget what is there: the next byte is the first. Nobody may be writing."""
        with self._lock:
            os.ftruncate(self.fd, 0)
            self._done, self._synced, self._unsynced = Spans(), Spans(), 0
            self._write_journal()

    def complete(self) -> None:
        """Make every byte and the size durable."""
        os.fsync(self.fd)
        hit("part.complete")

    def _mark(self) -> None:
        """Write the second line over: shorter than what is there, it ends in spaces."""
        hit("part.marked")
        data = _line(self._done)
        self._marked = max(self._marked, len(data))
        os.pwrite(self._journal_fd, data.ljust(self._marked), self._mark_at)

    def _write_journal(self) -> None:
        record = {
            "format": FORMAT,
            "size": self.size,
            "boot": BOOT_ID,
            "model": self._model,
            "synced": _line(self._synced).decode(),
        }
        head, tail = json.dumps(record).encode() + b"\n", _line(self._done)
        with self._home.directory(*PARTS) as directory:
            name, temporary = f"{self.key}.json", f"{self.key}.new"
            fd = open_regular(directory, temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            try:
                write_all(fd, head + tail)
                hit("part.journal")
                os.rename(temporary, name, src_dir_fd=directory, dst_dir_fd=directory)
            except BaseException:
                os.close(fd)
                raise
        if self._journal_fd >= 0:
            os.close(self._journal_fd)
        self._journal_fd, self._mark_at, self._marked = fd, len(head), len(tail)


def _line(spans: Spans) -> bytes:
    text = spans.text()
    if len(text) > SPANS_CHARS_MAX:
        # What is left out is fetched again.
        text = text[:SPANS_CHARS_MAX].rpartition(" ")[0]
    return text.encode()
