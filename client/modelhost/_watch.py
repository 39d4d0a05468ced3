"""How a watch of events goes on after any break: a state machine without a connection.

The driver asks for a request, feeds in what the stream brings and what it fails with, and hands out the
items. See events.proto for sequence, ``store_id``, snapshot and bookmark.
"""

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from modelhost import _enums, _names
from modelhost._errors import Cancelled, ModelhostError, OutOfRange, QueueFull, Unavailable, invalid
from modelhost.v1 import event_service_pb2, events_pb2

FIRST_DELAY_S = 0.1
LONGEST_DELAY_S = 2.0


@dataclass(frozen=True, slots=True)
class Reset:
    """What came before no longer holds: forget the state that was built from it.

    With a snapshot asked for, the whole state follows; else events go on from now, and some are lost.
    ``reason``: SEQUENCE_COMPACTED (away for longer than history is kept), SEQUENCE_IN_FUTURE or
    STORE_CHANGED (another history), SNAPSHOT_BROKEN (the connection broke inside a snapshot).
    """

    reason: str
    sequence: int
    """The last sequence that had been seen; 0 = none."""


WatchItem = (
    events_pb2.Event | events_pb2.Resource | events_pb2.Bookmark | events_pb2.ProgressSample | Reset
)
"""What a watch yields: ``Resource`` a part of the snapshot; ``Bookmark`` once, when the snapshot is
complete or, without one, when the watch has begun; ``Event`` each change after it; ``ProgressSample``
where progress is asked for; ``Reset`` when what came before is void."""


def make_filter(
    kinds: Iterable[str], names: Iterable[str], models: Iterable[str], reasons: Iterable[str]
) -> events_pb2.EventFilter | None:
    """Return the filter of the contract; None for no filter. Raises InvalidArgument for a kind."""
    made = events_pb2.EventFilter(
        kinds=[_enums.number_of(events_pb2.Resource.Kind, kind, "kinds") for kind in kinds],
        names=names,
        models=_names.model_names(models),
        reasons=reasons,
    )
    return made if made.ByteSize() else None


@dataclass(slots=True)
class WatchState:
    """Where a watch is, and what to ask for next.

    ``sequence`` is the last one that is known to be seen, 0 = none yet; ``store_id`` the history it
    belongs to, empty = not known. Both are worth keeping, to go on from in another process.
    """

    sequence: int | None
    store_id: str = ""
    snapshot: bool = True
    filter: events_pb2.EventFilter | None = None
    progress: bool = False
    jitter: Callable[[], float] = random.random
    connected: bool = False
    """Whether anything has ever come."""
    _wants_snapshot: bool = field(init=False)
    _delivered: int = field(init=False, default=0)
    _announced: bool = field(init=False, default=False)
    _failures: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        if self.sequence is not None and self.sequence < 0:
            raise invalid("since", "a sequence from 0", str(self.sequence))
        self._wants_snapshot = self.snapshot and self.sequence is None

    def request(self) -> event_service_pb2.WatchEventsRequest:
        """Return the request to open the next stream with."""
        from_now = self._wants_snapshot or self.sequence is None
        return event_service_pb2.WatchEventsRequest(
            start_sequence=0 if from_now or self.sequence is None else self.sequence + 1,
            filter=self.filter,
            include_snapshot=self._wants_snapshot,
            include_progress=self.progress,
        )

    def receive(
        self, message: event_service_pb2.WatchEventsResponse
    ) -> tuple[list[WatchItem], bool]:
        """Return the items of a message, and whether the stream goes on (else open a new one)."""
        self.connected = True
        self._failures = 0
        if message.HasField("bookmark"):
            return self._bookmark(message.bookmark)
        if message.HasField("snapshot"):
            self._delivered += len(message.snapshot.resources)
            return list(message.snapshot.resources), True
        items: list[WatchItem] = list(message.progress_samples)
        for event in message.events:
            if self.sequence is None or event.sequence > self.sequence:
                self.sequence = event.sequence
                items.append(event)
        return items, True

    def broken(self, error: ModelhostError | None) -> tuple[list[WatchItem], float]:
        """Return what a stream's end means: items, and the seconds to wait before the next stream.

        ``error`` None = the daemon closed it in order. Raises ``error`` when to go on is no use: the
        daemon was never reached, or it refuses for good.
        """
        items: list[WatchItem] = []
        if isinstance(error, OutOfRange):
            items = self._reset(error.reason)
        elif error is not None and not self._passing(error):
            raise error
        elif self._wants_snapshot and self._delivered:
            items = self._reset("SNAPSHOT_BROKEN")
        self._failures += 1
        return items, self._delay(error)

    def _passing(self, error: ModelhostError) -> bool:
        """Whether an error is one that a connection gets over."""
        return self.connected and isinstance(error, Unavailable | Cancelled | QueueFull)

    def _delay(self, error: ModelhostError | None) -> float:
        if isinstance(error, OutOfRange) and self._failures == 1:
            return 0.0
        doubled = min(FIRST_DELAY_S * 2.0 ** min(self._failures - 1, 16), LONGEST_DELAY_S)
        asked = error.retry_delay if error is not None and error.retry_delay is not None else 0.0
        return max(doubled * (0.75 + self.jitter() / 2), min(asked, LONGEST_DELAY_S))

    def _bookmark(self, bookmark: events_pb2.Bookmark) -> tuple[list[WatchItem], bool]:
        if not self._wants_snapshot and self.store_id not in ("", bookmark.store_id):
            return self._reset("STORE_CHANGED"), False
        first = self._wants_snapshot or not self._announced
        self._wants_snapshot = False
        self._announced = True
        self._delivered = 0
        self.store_id = bookmark.store_id
        self.sequence = max(self.sequence or 0, bookmark.sequence)
        return ([bookmark] if first else []), True

    def _reset(self, reason: str) -> list[WatchItem]:
        reset = Reset(reason, self.sequence or 0)
        self.sequence = None
        self.store_id = ""
        self._wants_snapshot = self.snapshot
        self._delivered = 0
        self._announced = False
        return [reset]
