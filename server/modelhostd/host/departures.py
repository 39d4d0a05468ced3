"""Files on their way out: their row is gone before they are, and a check must not take them for nobody's."""

from collections import Counter
from collections.abc import Iterable, Iterator
from collections.abc import Set as AbstractSet
from contextlib import contextmanager


class Departures:
    """The models whose files are being taken away by anything but a DELETE, which is an operation."""

    def __init__(self) -> None:
        self._leaving: Counter[str] = Counter()

    @property
    def models(self) -> AbstractSet[str]:
        """Return them."""
        return self._leaving.keys()

    @contextmanager
    def leaving(self, models: Iterable[str]) -> Iterator[None]:
        """Have files of these models leave inside the block: from before their row goes until all are gone."""
        marked = tuple(models)
        self._leaving.update(marked)
        try:
            yield
        finally:
            self._leaving.subtract(marked)
            self._leaving = +self._leaving
