"""What a power cut may not take, by the letter of POSIX: a ledger of what was synced, and when.

SIGKILL takes nothing of what the kernel has, and ext4 writes names that nobody asked it to write; neither
shows an fsync that is missing. So this counts only what is promised: a name is there for good when its
directory was synced with the name in it, a file when it was synced and not written since. It sees fsync and
fdatasync of this process; SQLite's own are its own business (``power_cut.py`` looks at what comes of them).
"""

import os
import stat
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from modelhostd.adapters.database_file import DatabaseFile
from modelhostd.core.resources import ArtifactState, Model
from modelhostd.ports import Batch
from tests.event_validators import ViolationError

Id = tuple[int, int]
State = tuple[int, int]


class SyncLedger:
    """What of one home is durable."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self._lock = threading.Lock()
        self._names: dict[Id, dict[str, int]] = {}
        self._files: dict[Id, State] = {}
        self.checked = 0
        """Artifacts that were looked at when their row was about to be committed."""
        self.lost: list[str] = []
        """What a power cut right after a commit could have taken of an artifact."""

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Note every sync inside the block, and look at each artifact as its row is committed."""
        commit = DatabaseFile.commit

        def looking(file: DatabaseFile, batch: Batch) -> None:
            for change in batch.changes:
                if isinstance(change.resource, Model):
                    self._look(change.resource)
            commit(file, batch)

        with (
            mock.patch.object(os, "fsync", self._noting(os.fsync)),
            mock.patch.object(os, "fdatasync", self._noting(os.fdatasync)),
            mock.patch.object(DatabaseFile, "commit", looking),
        ):
            yield

    def expect_nothing_lost(self) -> None:
        """Raise ViolationError unless all that was committed was durable."""
        if self.lost:
            raise ViolationError(f"a power cut could take {len(self.lost)} things: {self.lost[:5]}")

    def _noting(self, sync: Callable[[Any], None]) -> Callable[[Any], None]:
        def synced(fd: int) -> None:
            before = os.fstat(fd)
            names = _names(fd) if stat.S_ISDIR(before.st_mode) else None
            sync(fd)
            with self._lock:
                if names is None:
                    self._files[_id(before)] = _state(before)
                else:
                    self._names[_id(before)] = names

        return synced

    def _look(self, model: Model) -> None:
        for artifact in model.artifacts:
            if artifact.state is ArtifactState.AVAILABLE:
                self.checked += 1
                place = "models", model.id, str(artifact.version)
                if not self._home.joinpath(*place).is_dir():
                    self.lost.append(f"{'/'.join(place)}: not there")
                    continue
                with self._lock:
                    self.lost += self._missing(place)

    def _missing(self, place: Sequence[str]) -> Iterator[str]:
        path = self._home
        for name in place:
            yield from self._missing_name(path, name)
            path /= name
        for folder, _, files in os.walk(path):
            inside = Path(folder)
            for entry in sorted(os.listdir(inside)):
                yield from self._missing_name(inside, entry)
            for name in files:
                found = (inside / name).stat()
                if self._files.get(_id(found)) != _state(found):
                    yield f"{inside / name}: its bytes"

    def _missing_name(self, folder: Path, name: str) -> Iterator[str]:
        durable = self._names.get(_id(folder.stat()), {})
        if durable.get(name) != (folder / name).stat().st_ino:
            yield f"{(folder / name).relative_to(self._home)}: its name"


def _names(fd: int) -> dict[str, int]:
    with os.scandir(fd) as entries:
        return {entry.name: entry.inode() for entry in entries}


def _id(found: os.stat_result) -> Id:
    return found.st_dev, found.st_ino


def _state(found: os.stat_result) -> State:
    return found.st_size, found.st_mtime_ns
