"""For properties of the kind "a good answer or a typed error, and nothing else"."""

from collections.abc import Callable
from typing import TypeVar

from modelhostd.core.errors import ModelhostError

T = TypeVar("T")


def attempt(work: Callable[[], T]) -> T | ModelhostError:
    """Return what ``work`` returns, or the typed error it raises; any other exception passes."""
    try:
        return work()
    except ModelhostError as error:
        return error
