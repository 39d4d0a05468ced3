"""The port of files that a client brings: staged, checked and published as downloads are."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from typing import TYPE_CHECKING, Protocol

from modelhostd.core.resources import ModelFile, Progress
from modelhostd.core.uploads import UploadFile

if TYPE_CHECKING:
    from modelhostd.ports import DownloadJob, Fetched


class Incoming(Protocol):
    """One upload under way; its methods are called one after another."""

    async def begin(self, file: UploadFile) -> None:
        """Begin the next file; the one before is ended, hashed and checked.

        Raises INVALID_ARGUMENT (an offset beyond what is there), CHECKSUM_MISMATCH, UNSAFE_FILE,
        MALFORMED_FILE, INSUFFICIENT_DISK_SPACE (it may be asked again) and the disk's other reasons.
        """

    async def write(self, data: bytes) -> None:
        """Take the next bytes of the file; returns when there is room for more."""

    async def end(self) -> Sequence[ModelFile]:
        """End the last file and return all of them, by path: each verified, none published yet."""

    async def publish(self, revision: str) -> "Fetched":
        """Make the artifact visible as a whole. Cancelled on the way it is taken back."""


class Uploads(Protocol):
    """The way of a client's bytes into the blob store."""

    async def have(self, files: Sequence[UploadFile]) -> Sequence[int]:
        """Return how many first bytes of each file are there; files without SHA-256 have none."""

    def hold(self, digests: Iterable[str]) -> AbstractContextManager[None]:
        """Keep files by their SHA-256 from being deleted within the block."""

    async def check_room(self, needed_bytes: int) -> None:
        """Raise INSUFFICIENT_DISK_SPACE where there is no room for so many bytes more."""

    def open(
        self, job: "DownloadJob", total_bytes: int, report: Callable[[Progress], None]
    ) -> AbstractAsyncContextManager[Incoming]:
        """Begin one upload; ``total_bytes`` (0 = not known) are reserved. What came of files with a
        SHA-256 is kept when the block is left early. Raises INSUFFICIENT_DISK_SPACE on entry.
        """
