"""The port of what is on disk: model trees, the blob store, the quarantine."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import Any, Protocol

from modelhostd.core.resources import ModelFile, Progress
from modelhostd.core.values import dataclass


@dataclass(frozen=True, slots=True)
class StorageFinding:
    """One difference between registry and disk. ``repaired`` says what was done, if anything.

    ``expected`` and ``actual``: the SHA-256 of a corrupt file.
    """

    kind: str
    name: str
    message: str
    repairable: bool = False
    repaired: bool = False
    expected: str = ""
    actual: str = ""


@dataclass(frozen=True, slots=True)
class Room:
    """What the disk and its budget leave, in bytes."""

    available_bytes: int
    """What a further download may promise itself now."""
    most_bytes: int
    """What one could have if nothing else of ours were there."""
    reserved_bytes: int = 0
    """What is promised and not written yet."""
    over_bytes: int = 0
    """What is there beyond the budget."""


@dataclass(frozen=True, slots=True)
class Holdings:
    """Which artifact has which blobs, and which blobs downloads under way count on.

    ``artifacts``: (model, version) -> SHA-256 -> bytes, of every artifact on disk, whoever knows it.
    """

    artifacts: Mapping[tuple[str, int], Mapping[str, int]] = field(default_factory=dict)
    held: frozenset[str] = frozenset()


@dataclass(slots=True)
class Pace:
    """How fast a verification may read. Whoever asked for it may change it while it runs.

    ``bytes_per_second`` 0 = not at all for now.
    """

    bytes_per_second: float


@dataclass(frozen=True, slots=True)
class StorageUse:
    """Bytes under the home directory, by what they are for."""

    blob_bytes: int
    blob_count: int
    staging_bytes: int
    quarantine_bytes: int
    reclaimable_bytes: int
    free_bytes: int
    total_bytes: int
    model_bytes: Mapping[str, int] = field(default_factory=dict)
    room: Room = Room(0, 0)


@dataclass(frozen=True, slots=True)
class Pruned:
    """What a pruning took away."""

    freed_bytes: int
    blob_count: int


@dataclass(frozen=True, slots=True)
class Quarantined:
    """A file that is not what was promised, set aside. Digests are SHA-256, empty where another kind."""

    name: str
    model: str
    path: str
    source: str
    size_bytes: int
    expected: str
    actual: str
    message: str
    create_time: float


class Files(Protocol):
    """The model trees and the blob store below one home directory."""

    def model_dir(self, model: str, version: int) -> Path:
        """Return where the files of one artifact are (they exist when it is AVAILABLE)."""

    async def list_files(self, model: str, version: int) -> Sequence[ModelFile]:
        """Return the manifest's files. Raises STORAGE_ERROR when the manifest is gone or broken."""

    async def read_config(self, model: str, version: int) -> Mapping[str, Any]:
        """Return the artifact's ``config.json``; empty where there is none of up to 1 MiB that is a JSON object."""

    async def on_disk(self, models: Collection[str]) -> Mapping[str, Sequence[int]]:
        """Return the artifacts of these models that lie on disk, whoever knows them: model -> versions.

        Models without any are left out.
        """

    async def delete_artifact(self, model: str, version: int, *, keep_bytes: bool = False) -> int:
        """Remove one artifact and the blobs that nobody else needs; crash-safe; returns bytes freed.

        With ``keep_bytes`` the next download may go on from those bytes, as after an interruption.
        Deleting what is not there frees 0.
        """

    async def verify(
        self,
        model: str,
        version: int,
        report: Callable[[Progress], None],
        pace: Pace | None = None,
    ) -> Sequence[StorageFinding]:
        """Hash every file again and compare with the manifest; at ``pace``, and then at low priority."""

    async def check(
        self, expected: Mapping[str, Sequence[int]], *, deep: bool, repair: bool
    ) -> Sequence[StorageFinding]:
        """Compare the disk with ``expected`` (model -> AVAILABLE versions); ``deep`` hashes files."""

    async def use(self) -> StorageUse:
        """Count bytes."""

    def limit_bytes(self, budget: int) -> None:
        """Let files take ``budget`` bytes of the disk from now on; 0 = as much as it has."""

    async def room(self) -> Room:
        """Return what downloads may still take."""

    async def holdings(self) -> Holdings:
        """Return who has which blobs."""

    async def read_uses(self) -> Mapping[str, float]:
        """Return what ``write_uses`` stored last; empty where that is gone or broken."""

    async def write_uses(self, uses: Mapping[str, float]) -> None:
        """Store when each model was last used: id -> seconds since the epoch."""

    async def prune(self, busy: Collection[str], *, dry_run: bool = False) -> Pruned:
        """Remove blobs that no artifact has and what interrupted downloads left, but for ``busy`` models'.

        With ``dry_run`` only tell what that would free.
        """

    async def quarantined(self) -> Sequence[Quarantined]:
        """Return what is in quarantine, the newest first."""

    async def restore_quarantined(self, name: str) -> str:
        """Declare a file right: the next download takes it as it is. Returns its model.

        Raises INVALID_ARGUMENT for what is not there.
        """

    async def delete_quarantined(self, name: str) -> None:
        """Delete a file of the quarantine; one that is gone is no error."""
