"""Page tokens: opaque, url-safe, and bound to the query that they continue."""

import base64
import binascii
import hashlib
from collections.abc import Callable, Sequence
from typing import TypeVar

from modelhostd.core.errors import invalid

PAGE_SIZE_DEFAULT = 50
PAGE_SIZE_MAX = 1000

T = TypeVar("T")


def page_size(asked: int) -> int:
    """Return the page size for what was asked: 0 = 50, above 1000 = 1000, below 0 is an error."""
    if asked < 0:
        raise invalid("page_size", "0 (the default, 50) to 1000", asked)
    return min(asked or PAGE_SIZE_DEFAULT, PAGE_SIZE_MAX)


def encode(position: str, query: str) -> str:
    """Return a token for the position after which the next page of ``query`` begins."""
    raw = _digest(query) + position.encode()
    return base64.urlsafe_b64encode(raw).decode().rstrip("=")


def decode(token: str, query: str) -> str:
    """Return a token's position; raise INVALID_ARGUMENT for a foreign or broken one."""
    if not token:
        return ""
    expected = "the next_page_token of the same query, unchanged"
    try:
        raw = base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True)
        position = raw[8:].decode()
    except (binascii.Error, UnicodeDecodeError, ValueError):
        raise invalid("page_token", expected, token) from None
    if len(token) > 1024 or raw[:8] != _digest(query):
        raise invalid("page_token", expected, token)
    return position


def page(
    items: Sequence[T], key: Callable[[T], str], asked: int, token: str, query: str
) -> tuple[Sequence[T], str]:
    """Return one page of ``items`` (sorted by ``key``) and the token of the next (empty = the end).

    Positions are keys, not offsets: what is added or removed between two pages neither repeats nor
    hides the others.
    """
    size = page_size(asked)
    after = decode(token, query)
    rest = [item for item in items if key(item) > after] if after else list(items)
    chosen = rest[:size]
    more = len(rest) > size
    return chosen, encode(key(chosen[-1]), query) if more else ""


def _digest(query: str) -> bytes:
    return hashlib.sha256(query.encode()).digest()[:8]
