"""What was set aside because it is not what was promised: listed, released or deleted by an operator alone.

Each entry is a file (or a directory that nobody knew) and a note beside it, written first. Blocking.
"""

import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from modelhostd.adapters.blobs import BlobStore
from modelhostd.adapters.layout import QUARANTINE, VERIFIED, is_digest, open_regular
from modelhostd.core.errors import invalid
from modelhostd.core.names import ID
from modelhostd.ports import Quarantined

NOTE_BYTES_MAX = 64 * 1024
TEXT_CHARS_MAX = 4096
HASH_BYTES = 1 << 20
ENTRIES_MAX = 10_000
"""How many are listed, the newest; what is there stays there."""

_NAME = re.compile(r"[0-9]{1,12}-[0-9a-f]{12}")
_KEY = re.compile(r"[0-9a-z-]{1,128}")


class Quarantine:
    """The quarantine of one home directory."""

    def __init__(self, store: BlobStore) -> None:
        self._store = store

    def list(self) -> Sequence[Quarantined]:
        """Return what is in quarantine, the newest first."""
        names = [n for n in self._store.home.names(*QUARANTINE) if _NAME.fullmatch(n)]
        names.sort(key=lambda name: (-int(name.partition("-")[0]), name))
        return [found for name in names[:ENTRIES_MAX] if (found := self._entry(name)) is not None]

    def restore(self, name: str) -> str:
        """Make a file a verified one under the digest it has, so that the next download of the same
        file takes it; return its model. Raises INVALID_ARGUMENT for what is not there or no file.
        """
        note, found = self._note(name), self._stat(name)
        key = _text(note, "key")
        if found is None or not stat.S_ISREG(found.st_mode) or _KEY.fullmatch(key) is None:
            raise invalid("name", "a file in quarantine; ListQuarantine lists them", name)
        sha256 = self._hash(name)
        verified_name = sha256 if key == sha256 else f"{sha256}+{key}"
        home = self._store.home
        with (
            self._store.commit,
            home.directory(*QUARANTINE) as here,
            home.directory(*VERIFIED) as verified,
        ):
            os.rename(name, verified_name, src_dir_fd=here, dst_dir_fd=verified)
            # Its age counts from now: it is not to be taken for an abandoned one.
            os.utime(verified_name, dir_fd=verified)
            os.fsync(verified)
            with suppress(FileNotFoundError):
                os.unlink(f"{name}.json", dir_fd=here)
        return _model(note)

    def delete(self, name: str) -> None:
        """Delete an entry for good; one that is gone is no error."""
        if _NAME.fullmatch(name) is None:
            raise invalid("name", "a file in quarantine; ListQuarantine lists them", name)
        with self._store.home.directory(*QUARANTINE) as here:
            with suppress(FileNotFoundError):
                try:
                    os.unlink(name, dir_fd=here)
                except IsADirectoryError:
                    shutil.rmtree(name, dir_fd=here)
            # The note last: what lies here always says why.
            with suppress(FileNotFoundError):
                os.unlink(f"{name}.json", dir_fd=here)

    def _entry(self, name: str) -> Quarantined | None:
        found = self._stat(name)
        if found is None:
            return None
        note = self._note(name)
        expected, actual = _text(note, "expected"), _text(note, "actual")
        why = _text(note, "why")
        if not why:
            why = f"its content is not what was promised: expected {expected}, found {actual}"
        return Quarantined(
            name=name,
            model=_model(note),
            path=_text(note, "file") or _text(note, "tree"),
            source=_text(note, "source"),
            size_bytes=found.st_size if stat.S_ISREG(found.st_mode) else 0,
            expected=expected if is_digest(expected) else "",
            actual=actual if is_digest(actual) else "",
            message=why,
            create_time=float(name.partition("-")[0]),
        )

    def _stat(self, name: str) -> os.stat_result | None:
        if _NAME.fullmatch(name) is None:
            return None
        return self._store.home.stat((*QUARANTINE, name))

    def _note(self, name: str) -> dict[str, Any]:
        """Return the note of an entry; one that is gone or broken says nothing."""
        if _NAME.fullmatch(name) is None:
            return {}
        try:
            with self._store.home.directory(*QUARANTINE) as here:
                fd = open_regular(here, f"{name}.json", os.O_RDONLY)
            with os.fdopen(fd, "rb") as file:
                note = json.loads(file.read(NOTE_BYTES_MAX))
        except (FileNotFoundError, ValueError, RecursionError):
            return {}
        return note if isinstance(note, dict) else {}

    def _hash(self, name: str) -> str:
        fd = self._store.home.open_file((*QUARANTINE, name))
        with os.fdopen(fd, "rb", buffering=0) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


def _text(note: dict[str, Any], key: str) -> str:
    value = note.get(key, "")
    return value[:TEXT_CHARS_MAX] if isinstance(value, str) else ""


def _model(note: dict[str, Any]) -> str:
    model = _text(note, "model")
    return model if ID.fullmatch(model) else ""
