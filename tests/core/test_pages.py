"""Pages: sizes, tokens, and that walking them sees each item once, whatever changes meanwhile."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelhostd.core import pages
from modelhostd.core.errors import ModelhostError, Reason
from tests.core.attempt import attempt

KEYS = st.text(min_size=1, max_size=8)


@pytest.mark.parametrize(
    ("asked", "size"), [(0, 50), (1, 1), (50, 50), (1000, 1000), (1001, 1000), (2**31 - 1, 1000)]
)
def test_page_sizes(asked: int, size: int) -> None:
    """0 is the default of 50, and nothing is above 1,000."""
    assert pages.page_size(asked) == size


@pytest.mark.parametrize("asked", [-1, -(2**31)])
def test_a_negative_page_size_is_refused(asked: int) -> None:
    """A page size below 0 is INVALID_ARGUMENT, naming the field."""
    with pytest.raises(ModelhostError) as caught:
        pages.page_size(asked)
    assert caught.value.metadata["field"] == "page_size"


@given(st.text(), st.text())
def test_a_token_is_its_position(position: str, query: str) -> None:
    """A token gives its position back to its own query; it is safe in a URL."""
    try:
        position.encode()
        query.encode()
    except UnicodeEncodeError:
        return
    token = pages.encode(position, query)
    assert token.replace("-", "").replace("_", "").isalnum()
    if len(token) <= 1024:
        assert pages.decode(token, query) == position


@given(KEYS, KEYS, KEYS)
def test_a_token_belongs_to_its_query(position: str, query: str, other: str) -> None:
    """A token of another query is refused."""
    if query == other:
        return
    with pytest.raises(ModelhostError) as caught:
        pages.decode(pages.encode(position, query), other)
    assert caught.value.metadata["field"] == "page_token"


@given(st.text(max_size=60) | st.text("ABCab01-_", max_size=60))
def test_any_token_is_read_or_refused(token: str) -> None:
    """No text makes the decoder fail in another way than INVALID_ARGUMENT."""
    found = attempt(lambda: pages.decode(token, "query"))
    if isinstance(found, ModelhostError):
        assert found.reason is Reason.INVALID_ARGUMENT


def test_a_token_is_bounded() -> None:
    """A token above 1,024 characters is refused, though it was made here."""
    with pytest.raises(ModelhostError):
        pages.decode(pages.encode("x" * 2000, "q"), "q")


@given(st.sets(KEYS), st.integers(1, 7))
def test_pages_have_each_item_once(keys: set[str], size: int) -> None:
    """Walking the pages gives every item once, in order, in pages of the size asked for."""
    items = sorted(keys)
    token, seen = "", []
    while True:
        page, token = pages.page(items, lambda k: k, size, token, "q")
        seen += page
        if not token:
            break
        assert len(page) == size
    assert seen == items


@given(st.sets(KEYS, min_size=1), st.sets(KEYS), st.sets(KEYS), st.integers(1, 3))
def test_changes_between_pages_hide_nothing(
    keys: set[str], added: set[str], removed: set[str], size: int
) -> None:
    """What was there all the time is seen exactly once, whatever came and went between two pages."""
    page, token = pages.page(sorted(keys), lambda k: k, size, "", "q")
    seen = list(page)
    now = sorted((keys | added) - removed)
    while token:
        page, token = pages.page(now, lambda k: k, size, token, "q")
        seen += page
    assert len(set(seen)) == len(seen)
    assert set(seen) >= keys - removed
