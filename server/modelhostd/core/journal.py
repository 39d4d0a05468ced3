"""The event ring: the newest events in memory, shared by every subscriber, each of which is a number."""

from collections import deque
from collections.abc import Sequence

from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.resources import Event


class Ring:
    """The newest ``capacity`` events, contiguous by sequence.

    Data: after events 5, 6, 7 with capacity 2 it holds 6 and 7: ``first`` is 6, ``last`` is 7.
    """

    def __init__(self, last_sequence: int, capacity: int) -> None:
        assert capacity > 0
        self._events: deque[Event] = deque(maxlen=capacity)
        self.last = last_sequence

    @property
    def first(self) -> int:
        """The oldest sequence held; ``last + 1`` while the ring is empty."""
        return self._events[0].sequence if self._events else self.last + 1

    def append(self, event: Event) -> None:
        """Add the next event; its sequence must follow the last one."""
        assert event.sequence == self.last + 1, (event.sequence, self.last)
        self._events.append(event)
        self.last = event.sequence

    def read(self, start: int, limit: int) -> Sequence[Event] | None:
        """Return up to ``limit`` events from ``start``, or None when the ring no longer holds it."""
        if start < self.first:
            return None
        offset = start - self.first
        count = min(limit, self.last - start + 1)
        return [self._events[offset + i] for i in range(max(0, count))]


def check_start(start: int, first: int, last: int) -> None:
    """Raise OUT_OF_RANGE unless a watch may start at ``start``.

    ``start`` is inclusive; ``last + 1`` waits for the next event. With first=10, last=20: 9 is
    compacted, 10 to 21 are fine, 22 is in the future.
    """
    metadata = {
        "startSequence": str(start),
        "firstSequence": str(first),
        "currentSequence": str(last),
    }
    if start < first:
        raise ModelhostError(
            Reason.SEQUENCE_COMPACTED,
            f"events before sequence {first} are gone (asked for {start}); take a snapshot "
            f"(include_snapshot) and watch from its bookmark",
            metadata,
        )
    if start > last + 1:
        raise ModelhostError(
            Reason.SEQUENCE_IN_FUTURE,
            f"sequence {start} has not happened yet (the last one is {last}); is the store_id the "
            f"one this number came with?",
            metadata,
        )
