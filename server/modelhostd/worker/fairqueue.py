"""Which waiting request runs next: fair between instances, by priority within one. Pure."""

import heapq
import itertools
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from typing import Generic, TypeGuard, TypeVar

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")
S = TypeVar("S")
Entry = tuple[int, int, int]
"""An item's place: its priority (negative), its number in the order of arrival, its request id."""


class FairQueue(Generic[K, T]):
    """A bounded queue of items with a request id, an instance and a priority.

    Instances take turns, so that one with a thousand requests delays another's by one request, not
    by a thousand. Within an instance the higher priority goes first, then the earlier.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._order = itertools.count()
        self._waiting: OrderedDict[K, list[Entry]] = OrderedDict()
        self._items: dict[int, T] = {}

    def __len__(self) -> int:
        return len(self._items)

    def push(
        self, instance: K, request: int, priority: int, item: T, *, forced: bool = False
    ) -> bool:
        """Add an item; False = the queue is full and the item, unless it is ``forced``, was not taken."""
        if len(self._items) >= self.limit and not forced:
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

    def count(self, instance: K) -> int:
        """Return how many wait for ``instance`` (a few more, where some were removed)."""
        return len(self._waiting.get(instance, ()))

    def more(
        self, instance: K, count: int, fit: Callable[[T], TypeGuard[S]]
    ) -> list[tuple[Entry, S]]:
        """Take up to ``count`` further items of ``instance``, in their order, up to the first not ``fit``.

        They are its turn still. Each comes with its place, for :meth:`put_back`.
        """
        heap = self._waiting.get(instance, [])
        taken: list[tuple[Entry, S]] = []
        while heap and len(taken) < count:
            item = self._items.get(heap[0][2])
            if item is None:
                heapq.heappop(heap)
            elif fit(item):
                entry = heapq.heappop(heap)
                del self._items[entry[2]]
                taken.append((entry, item))
            else:
                break
        if not heap:
            self._waiting.pop(instance, None)
        return taken

    def put_back(self, instance: K, taken: Iterable[tuple[Entry, T]]) -> None:
        """Put items back to the places that they were taken from by :meth:`more`."""
        for entry, item in taken:
            self._items[entry[2]] = item
            heapq.heappush(self._waiting.setdefault(instance, []), entry)

    def remove(self, request: int) -> T | None:
        """Take one item out of its turn; None when it does not wait (any more)."""
        return self._items.pop(request, None)

    def discard(self, instance: K) -> list[T]:
        """Take out everything that waits for ``instance``."""
        entries = self._waiting.pop(instance, [])
        removed = (self._items.pop(request, None) for _, _, request in sorted(entries))
        return [item for item in removed if item is not None]
