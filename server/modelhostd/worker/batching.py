"""Which of the requests that wait for an instance run together, and which of their items in one pass. Pure.

The first that waits decides: it runs now, and whoever fits goes with it. So nothing is passed over for ever: what did
not fit is first one day. That an idle model answers at once, and who waits for company, is the schedule's matter.
"""

from collections.abc import Hashable, Sequence

from modelhostd.core.values import dataclass

DEFAULT_ITEMS = 32
"""Items that run together where nobody says otherwise."""
LENGTH_RATIO = 2
"""The longest of a batch is at most so many times as long as its shortest: all are padded to the longest,
so at most half of what is computed is padding."""
LENGTH_FLOOR = 64
"""Lengths up to here count as the same: what short items cost is not their padding."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A request that waits: what it must have in common with others, its items, and their length.

    ``kind`` covers everything but the items: names, datatypes, shapes, parameters. ``length`` is in the backend's measure, 0
    where items do not differ.
    """

    kind: Hashable
    items: int
    length: int = 0


def choose(waiting: Sequence[Candidate], limit: int) -> list[int]:
    """Return the positions of those that run now, in order: the first, and whoever fits to it.

    ``waiting`` is in the order of their turns; ``limit`` is how many items may run together. The first runs
    also where it is larger than that.
    """
    first = waiting[0]
    chosen = [0]
    items = first.items
    shortest = longest = max(first.length, LENGTH_FLOOR)
    for position, candidate in enumerate(waiting[1:], 1):
        if items >= limit:
            break
        length = max(candidate.length, LENGTH_FLOOR)
        low, high = min(shortest, length), max(longest, length)
        if (
            candidate.kind == first.kind
            and items + candidate.items <= limit
            and high <= low * LENGTH_RATIO
        ):
            chosen.append(position)
            items += candidate.items
            shortest, longest = low, high
    return chosen


def passes(lengths: Sequence[int], price: float) -> list[list[int]]:
    """Return the positions of items that go through a model together, each pass padded to its longest item.

    A pass ends where its padding would come to more than ``price``: what one pass more costs, in the unit of
    ``lengths`` (infinite = all go together). Positions keep their order where all fit.
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    found: list[list[int]] = []
    held = 0
    for position in order:
        length = lengths[position]
        if not found or length * (len(found[-1]) + 1) - held - length > price:
            found.append([])
            held = 0
        found[-1].append(position)
        held += length
    return found if len(found) > 1 else [list(range(len(lengths)))]
