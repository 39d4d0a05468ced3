"""The port of what is on disk: model trees, the blob store, the quarantine."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from modelhostd.core.resources import ModelFile, Progress


@dataclass(frozen=True, slots=True)
class StorageFinding:
    """One difference between registry and disk. ``repaired`` says what was done, if anything."""

    kind: str
    name: str
    message: str
    repairable: bool = False
    repaired: bool = False


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
        self, model: str, version: int, report: Callable[[Progress], None]
    ) -> Sequence[StorageFinding]:
        """Hash every file again and compare with the manifest."""

    async def check(
        self, expected: Mapping[str, Sequence[int]], *, deep: bool, repair: bool
    ) -> Sequence[StorageFinding]:
        """Compare the disk with ``expected`` (model -> AVAILABLE versions); ``deep`` hashes files."""

    async def use(self) -> StorageUse:
        """Count bytes."""

    async def prune(self, busy: Collection[str]) -> Pruned:
        """Remove blobs that no artifact has and what interrupted downloads left, but for ``busy`` models'."""

    async def quarantined(self) -> Sequence[Quarantined]:
        """Return what is in quarantine, the newest first."""

    async def restore_quarantined(self, name: str) -> str:
        """Declare a file right: the next download takes it as it is. Returns its model.

        Raises INVALID_ARGUMENT for what is not there.
        """

    async def delete_quarantined(self, name: str) -> None:
        """Delete a file of the quarantine; one that is gone is no error."""
