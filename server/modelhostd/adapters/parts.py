"""A file that is being fetched: its bytes so far, and a journal that says which of them to trust.

``<key>.part`` grows from its beginning. ``<key>.json`` is written when the part is created and after each
data sync: ``{"format": 1, "size": .., "synced": .., "boot": "..", "model": ".."}``. After a crash of the
daemon the whole part is trusted (the kernel kept it); after another boot only what was synced. Either way
its bytes are hashed again, and the source's digest decides.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

from modelhostd.adapters.failpoints import hit
from modelhostd.adapters.layout import PARTS, Home, open_regular, write_all

FORMAT = 1
JOURNAL_BYTES_MAX = 4096
READ_BYTES = 1 << 20


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
    """What is written beside a part. ``synced`` bytes survive a power cut."""

    size: int
    synced: int
    boot: str
    model: str

    def trusted(self, have: int, size: int) -> int:
        """Return how many of the ``have`` bytes on disk belong to a file of ``size`` bytes."""
        if self.size != size:
            return 0
        return (
            min(have, size) if self.boot and self.boot == BOOT_ID else min(have, self.synced, size)
        )


def read_journal(home: Home, key: str) -> Journal | None:
    """Return the journal of a part, or None when there is none or it is torn."""
    try:
        fd = home.open_file((*PARTS, f"{key}.json"))
    except FileNotFoundError:
        return None
    with os.fdopen(fd, "rb") as file:
        data = file.read(JOURNAL_BYTES_MAX + 1)
    try:
        raw: Any = json.loads(data)
        size, synced, boot, model = (raw[key] for key in ("size", "synced", "boot", "model"))
        valid = (
            raw["format"] == FORMAT
            and all(type(number) is int for number in (size, synced))
            and all(isinstance(text, str) for text in (boot, model))
            and 0 <= synced <= size
        )
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return Journal(size, synced, boot, model) if valid else None


def kept_bytes(home: Home, key: str, size: int) -> int:
    """Return how many bytes of a file an earlier attempt left that can be gone on from."""
    journal, found = read_journal(home, key), home.stat((*PARTS, f"{key}.part"))
    return journal.trusted(found.st_size, size) if journal and found else 0


class Part:
    """One part, open for writing by one thread."""

    def __init__(self, home: Home, key: str, size: int, model: str, sync_bytes: int) -> None:
        self.key = key
        self.size = size
        self._home = home
        self._model = model
        self._sync_bytes = sync_bytes
        self.position = kept_bytes(home, key, size)
        with home.directory(*PARTS) as directory:
            self.fd = open_regular(directory, f"{key}.part", os.O_RDWR | os.O_CREAT)
        # What is behind the trusted prefix was written by nobody we know.
        os.ftruncate(self.fd, self.position)
        self._synced = 0
        self._write_journal()
        hit("part.opened")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close; what was written stays for the next attempt."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def rehash(self, update: Callable[[memoryview], None], stop: Callable[[], None]) -> None:
        """Feed the kept prefix to ``update`` (hashes); ``stop`` is called between reads, may raise."""
        buffer = bytearray(READ_BYTES)
        view = memoryview(buffer)
        offset = 0
        while offset < self.position:
            stop()
            wanted = view[: min(READ_BYTES, self.position - offset)]
            count = os.preadv(self.fd, [wanted], offset)
            if count == 0:
                break
            update(wanted[:count])
            offset += count
        self.position = offset

    def write(self, data: memoryview) -> None:
        """Append, and sync every ``sync_bytes``, so that no later fsync has gigabytes to write."""
        offset = self.position
        while data:
            count = os.pwrite(self.fd, data, offset)
            data = data[count:]
            offset += count
        self.position = offset
        hit("part.written")
        if self.position - self._synced >= self._sync_bytes:
            os.fdatasync(self.fd)
            self._synced = self.position
            self._write_journal()
            hit("part.synced")

    def restart(self) -> None:
        """Forget what is there: the next byte is the first."""
        os.ftruncate(self.fd, 0)
        self.position = self._synced = 0
        self._write_journal()

    def complete(self) -> None:
        """Make every byte and the size durable."""
        os.fsync(self.fd)
        hit("part.complete")

    def _write_journal(self) -> None:
        record = {
            "format": FORMAT,
            "size": self.size,
            "synced": self._synced,
            "boot": BOOT_ID,
            "model": self._model,
        }
        with self._home.directory(*PARTS) as directory:
            name, temporary = f"{self.key}.json", f"{self.key}.new"
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
            fd = open_regular(directory, temporary, flags)
            try:
                write_all(fd, json.dumps(record).encode())
            finally:
                os.close(fd)
            os.rename(temporary, name, src_dir_fd=directory, dst_dir_fd=directory)
