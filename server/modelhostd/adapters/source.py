"""What every kind of source offers; how its bytes become blobs and trees is the same for all of them.

One ``SourceAdapter`` per scheme: it says what there is, under which policy it may be asked, and opens a
file's bytes from any offset. Blocking, one attempt each: who calls it tries again.
"""

from dataclasses import field
from typing import Protocol

from modelhostd.adapters.cancel import Canceller
from modelhostd.adapters.connections import Connections
from modelhostd.adapters.wire import Limits
from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.paths import printable
from modelhostd.core.resources import Source
from modelhostd.core.transfer import RetryPolicy
from modelhostd.core.values import dataclass
from modelhostd.ports import RemoteFile, SourceFacts

LISTED_FILES_MAX = 100_000
"""More than any model has; a listing beyond it is a mistake or an attack."""


@dataclass(frozen=True, slots=True)
class TransferConfig:
    """How patient to be with a source, and how much to ask of it at a time."""

    limits: Limits = field(default_factory=Limits)
    retry: RetryPolicy = field(default_factory=RetryPolicy)
    files_at_once: int = 8
    """Files of one download that are fetched side by side."""
    version: str = "0"
    """modelhost's version, for the user agent."""

    @property
    def user_agent(self) -> str:
        """What the requests call themselves."""
        return f"modelhost/{self.version}"


class Body(Protocol):
    """Bytes of a file on their way."""

    @property
    def start(self) -> int:
        """The offset of the first byte: what was asked for, or 0 where the source gives no ranges."""

    @property
    def end(self) -> int:
        """The offset behind the last: what was asked for, or the file's size where there are no ranges."""

    def read_into(self, buffer: memoryview) -> int:
        """Read what is there, at most ``len(buffer)``; 0 at the end. Raises Transient."""

    def close(self) -> None:
        """Be done with it; needed unless it was read to its end."""


class Changed(Exception):
    """Two answers are of different versions of one file: what came of it is to be fetched again."""


class Reader(Protocol):
    """One file of a source, for several threads; knows what earlier attempts taught."""

    def open(self, start: int, end: int) -> Body:
        """Ask for the bytes from ``start`` to before ``end``.

        Raises Transient for what may pass, Changed (the next open may be of another version, which is
        then the one to go by), else the source's reasons.
        """


class SourceAdapter(Protocol):
    """The sources of one scheme. Thread-safe; holds no connection itself."""

    @property
    def retry(self) -> RetryPolicy:
        """How often and how long it is tried again."""

    @property
    def files_at_once(self) -> int:
        """Files of one download that are fetched side by side."""

    def connections(self, canceller: Canceller, source: Source) -> Connections:
        """Return the connections of one transfer, under the policy of this kind of source.

        Raises SOURCE_NOT_ALLOWED for a source that the operator did not allow.
        """

    def plan(
        self, connections: Connections, source: Source, *, allow_unsafe: bool = False
    ) -> SourceFacts:
        """Return what there is and which of it would be fetched.

        Raises Transient for what may pass, else the source's reasons and those of ``selection.select``.
        """

    def reader(
        self, connections: Connections, source: Source, revision: str, file: RemoteFile
    ) -> Reader:
        """Return the reader of one file of a plan. Asks nothing yet."""


def mismatch(file: RemoteFile, expected: str, actual: str, then: str = "") -> ModelhostError:
    """Return CHECKSUM_MISMATCH: what came is not what the source had announced."""
    shown = printable(file.path)
    return ModelhostError(
        Reason.CHECKSUM_MISMATCH,
        f"{shown}: expected {expected}, got {actual}"
        + (f"; {then}" if then else "")
        + "; download again, and tell the publisher if it happens again",
        {"file": shown, "expected": expected, "actual": actual},
    )
