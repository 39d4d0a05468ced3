"""Which waiting request runs next: fair between instances, by priority within one. Pure."""

import heapq
import itertools
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")


class FairQueue(Generic[K, T]):
    """A bounded queue of items with a request id, an instance and a priority.

    Instances take turns, so that one with a thousand requests delays another's by one request, not
    by a thousand. Within an instance the higher priority goes first, then the earlier.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._order = itertools.count()
        self._waiting: OrderedDict[K, list[tuple[int, int, int]]] = OrderedDict()
        self._items: dict[int, T] = {}

    def __len__(self) -> int:
        return len(self._items)

    def push(self, instance: K, request: int, priority: int, item: T) -> bool:
        """Add an item; False = the queue is full and the item was not taken."""
        if len(self._items) >= self.limit:
            return False
        self._items[request] = item
        entry = (-priority, next(self._order), request)
        heap = self._waiting.setdefault(instance, [])
        heapq.heappush(heap, entry)
        if len(heap) > 2 * self.limit:
            # What was removed leaves its entry behind; a storm of cancellations must not pile up.
            heap[:] = [entry for entry in heap if entry[2] in self._items]
            heapq.heapify(heap)
        return True

    def pop(self, ready: Callable[[K], bool]) -> tuple[K, T] | None:
        """Take the next item of an instance that is ``ready``; None when there is none.

        The instance it came from then waits for its next turn behind the others.
        """
        for instance, heap in list(self._waiting.items()):
            if not ready(instance):
                continue
            while heap:
                item = self._items.pop(heapq.heappop(heap)[2], None)
                if item is None:
                    continue
                if heap:
                    self._waiting.move_to_end(instance)
                else:
                    del self._waiting[instance]
                return instance, item
            del self._waiting[instance]
        return None

    def remove(self, request: int) -> T | None:
        """Take one item out of its turn; None when it does not wait (any more)."""
        return self._items.pop(request, None)

    def discard(self, instance: K) -> list[T]:
        """Take out everything that waits for ``instance``."""
        entries = self._waiting.pop(instance, [])
        removed = (self._items.pop(request, None) for _, _, request in sorted(entries))
        return [item for item in removed if item is not None]
