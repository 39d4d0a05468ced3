"""What the threads of one download share: its plan, its limits, and the means to carry it out."""

import threading
from collections.abc import Callable

from modelhostd.adapters.blobs import BlobStore
from modelhostd.adapters.cancel import Canceller
from modelhostd.adapters.connections import Connections
from modelhostd.adapters.progress import Meter
from modelhostd.adapters.source import SourceAdapter
from modelhostd.adapters.throttle import Tap
from modelhostd.core.resources import Source
from modelhostd.core.values import dataclass


@dataclass(frozen=True, slots=True)
class StreamConfig:
    """How a file's bytes are shared out among connections."""

    connections: int = 8
    """Of one file, at most."""
    connections_first: int = 1
    """Of one file, before it is known whether more are of use."""
    connections_more: int = 8
    """Of one download, all its files together, beyond the one that each file has."""
    ranged_bytes: int = 16 << 20
    """What is shorter comes by one connection."""
    piece_bytes_min: int = 4 << 20
    piece_bytes_max: int = 32 << 20
    """A piece is asked for by one request; between these a connection gets some four of them."""

    def piece(self, left: int) -> int:
        """Return the bytes of one piece when so many are left."""
        wanted = left // (4 * self.connections)
        return min(max(wanted, self.piece_bytes_min), self.piece_bytes_max)


class Places:
    """Connections beyond the first of each file that one download may have. Thread-safe."""

    def __init__(self, count: int) -> None:
        self._left = threading.BoundedSemaphore(max(1, count))

    def take(self) -> bool:
        """Take one, if there is one."""
        return self._left.acquire(blocking=False)

    def give_back(self) -> None:
        """Give one back."""
        self._left.release()


@dataclass(frozen=True, slots=True)
class Transfer:
    """One download under way."""

    adapter: SourceAdapter
    connections: Connections
    store: BlobStore
    meter: Meter
    source: Source
    revision: str
    model: str
    written: Callable[[int], None]
    """Takes bytes that are on disk now off the space promised to this download."""
    tap: Tap
    streams: StreamConfig
    places: Places

    @property
    def canceller(self) -> Canceller:
        """What ends every wait of this download."""
        return self.connections.canceller
