"""What a home holds after a kill, read without changing it, and held against what was told."""

import time
from pathlib import Path

from modelhostd.adapters import database_check, rows
from modelhostd.adapters.blobs import BlobStore, StoreConfig
from modelhostd.adapters.database import FILE_NAME
from modelhostd.adapters.database_file import read_only
from modelhostd.adapters.storage_check import StorageCheck
from modelhostd.adapters.trees import TreeStore
from modelhostd.api import convert
from modelhostd.core.findings import FindingKind
from modelhostd.core.resources import ArtifactState, Kind, Model
from modelhostd.ports import Stored
from tests.event_validators import Event, Resource, ViolationError
from tests.kill.chronicle import Chronicle, named
from tests.kill.recording import Recorded

LEFTOVERS = frozenset(
    {FindingKind.STRAY_TREE, FindingKind.STRAY_BLOB, FindingKind.LEFTOVER_STAGING}
)
"""What a kill may leave on disk for the next start to take up: nothing of it is visible."""


class Disk:
    """One home that nobody uses while it is looked at. Starts no thread."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self._database = home / FILE_NAME
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._store = BlobStore(StoreConfig(home))
        self._check = StorageCheck(self._store, TreeStore(self._store), time.time)
        self.artifacts_seen = 0

    def close(self) -> None:
        """Let go of the home."""
        self._store.close()

    def look(self, chronicle: Chronicle, recorded: Recorded, *, thorough: bool) -> None:
        """Hold the disk against what was told. Raises ViolationError.

        Every file is hashed; ``thorough`` also has the database check itself and read every event.
        """
        stored = self._stored(chronicle, thorough=thorough)
        chronicle.take(
            stored.store_id or chronicle.store_id,
            self._events(stored, chronicle.last_sequence + 1),
            _rows(stored),
            recorded,
            {r.request_id: r.answer for r in stored.requests},
        )
        models = [m for m in stored.resources.get(Kind.MODEL, {}).values() if isinstance(m, Model)]
        expected = {
            m.id: [a.version for a in m.artifacts if a.state is ArtifactState.AVAILABLE]
            for m in models
        }
        self.artifacts_seen += sum(map(len, expected.values()))
        found = self._check.run(expected, deep=True, repair=False)
        half = [f for f in found if f.kind not in LEFTOVERS]
        expect(not half, f"half a model is visible: {half}")

    def _stored(self, chronicle: Chronicle, *, thorough: bool) -> Stored:
        if not thorough and chronicle.last_sequence:
            with read_only(self._database) as connection:
                return rows.read_stored(connection)
        report = database_check.look(self._database, deep=thorough)
        expect(not report.findings, f"the database: {report.findings}")
        assert report.stored is not None
        return report.stored

    def _events(self, stored: Stored, start: int) -> list[Event]:
        found: list[Event] = []
        if stored.last_sequence:
            with read_only(self._database) as connection:
                while page := rows.read_events(connection, start, 256):
                    found.extend(convert.event(event) for event in page)
                    start = page[-1].sequence + 1
        return found


def _rows(stored: Stored) -> dict[str, Resource]:
    return named(
        convert.resource(resource)
        for table in stored.resources.values()
        for resource in table.values()
    )


def expect(holds: bool, what: str) -> None:
    """Raise ViolationError unless something holds."""
    if not holds:
        raise ViolationError(what)
