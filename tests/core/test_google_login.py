"""Google's credential files and answers: whatever they hold is read or refused, and never shown."""

import json
from collections.abc import Callable
from typing import TypeVar

from hypothesis import given
from hypothesis import strategies as st

from modelhostd.core.google_login import BadLogin, parse_login, parse_refusal, parse_token

CANARY = "canary_5e77e"
T = TypeVar("T")
R = TypeVar("R")
VALUES = st.one_of(
    st.sampled_from(["service_account", "authorized_user", "https://a.example/token", CANARY, ""]),
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
    st.lists(st.integers(), max_size=2),
)
NAMES = [
    "type",
    "client_email",
    "private_key",
    "private_key_id",
    "client_id",
    "client_secret",
    "refresh_token",
    "token_uri",
    "access_token",
    "expires_in",
    "error",
]
DOCUMENTS = st.one_of(
    st.dictionaries(st.sampled_from(NAMES), VALUES).map(json.dumps), st.text(max_size=30)
)


def outcome(parse: Callable[[T], R], given: T) -> R | BadLogin:
    """Return what comes of parsing, or the refusal, which shows nothing of it."""
    try:
        return parse(given)
    except BadLogin as error:
        return error


@given(DOCUMENTS)
def test_any_file_is_read_or_refused(text: str) -> None:
    """What is read has an address and every field; a refusal shows none of them."""
    found = outcome(parse_login, text)
    if isinstance(found, BadLogin):
        assert CANARY not in str(found)
        assert str(found).isprintable()
    else:
        assert found.endpoint.startswith("http")
        assert all(found.fields.values())
        assert CANARY not in repr(found)


@given(DOCUMENTS.map(str.encode) | st.binary(max_size=20))
def test_any_answer_is_a_token_or_refused(body: bytes) -> None:
    """A token can go into a header and has an end; the word for a refusal is a plain one."""
    found = outcome(parse_token, body)
    if isinstance(found, BadLogin):
        assert CANARY not in str(found)
    else:
        token, life_s = found
        assert token.isascii()
        assert token.isprintable()
        assert 0 < life_s <= 86_400
    word = parse_refusal(body)
    assert not word or (word.isascii() and len(word) <= 40)
