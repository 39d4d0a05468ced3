"""Pages of lists: bounded by count and by bytes, continued by a token that is bound to the query."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from google.protobuf.message import Message

from modelhostd.api import convert_from
from modelhostd.core import pages

PAGE_BYTES_MAX = 240 * 1024
"""Under the 256 KiB of the contract, with room for what stands around the items."""

T = TypeVar("T")
M = TypeVar("M", bound=Message)


def page(
    request: Any, items: Sequence[T], key: Callable[[T], str], convert: Callable[[T], M]
) -> tuple[list[M], str]:
    """Return one page of ``items`` (sorted by ``key``) as messages, and the token of the next.

    ``request`` has ``page_size`` and ``page_token``; its other fields are the query. A page has at least
    one item, however large that is.
    """
    query = convert_from.query(request)
    chosen, token = pages.page(items, key, request.page_size, request.page_token, query)
    messages: list[M] = []
    size = 0
    for item in chosen:
        message = convert(item)
        size += message.ByteSize() + 4
        if messages and size > PAGE_BYTES_MAX:
            return messages, pages.encode(key(chosen[len(messages) - 1]), query)
        messages.append(message)
    return messages, token
