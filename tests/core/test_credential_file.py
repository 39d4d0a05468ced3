"""Files of credentials: what stands in them, and that no message repeats it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelhostd.core.credential_file import LINES_MAX, BadLine, Login, parse_credentials
from modelhostd.core.origins import Origin

SECRET = "s3cr3t-canary"


def test_lines_are_origins_and_what_they_want() -> None:
    """Tokens, users with passwords, comments; ports and schemes count."""
    text = (
        f"# mine\n\nhttps://a.example {SECRET}\n"
        f"https://A.example:8443 ada {SECRET}\r\nhttp://b.example\t{SECRET}\n"
    )
    assert parse_credentials(text) == {
        Origin("https", "a.example", 443): Login(SECRET),
        Origin("https", "a.example", 8443): Login(SECRET, "ada"),
        Origin("http", "b.example", 80): Login(SECRET),
    }
    assert SECRET not in repr(parse_credentials(text))


@pytest.mark.parametrize(
    "text",
    [
        SECRET,
        f"{SECRET} https://a.example",
        f"https://a.example/path {SECRET}",
        f"a.example {SECRET}",
        f"https://u:{SECRET}@a.example {SECRET}",
        "https://a.example",
        f"https://a.example a b {SECRET}",
        f"https://a.example {SECRET}\nhttps://a.example:443 {SECRET}",
        f"https://a.example {SECRET}\x07",
        f"https://a.example {SECRET}\u00e9",
        f"https://a.example a:b {SECRET}",
        f"https://a.example {SECRET * 1000}",
        "\n" * (LINES_MAX + 2),
    ],
    ids=[str(number) for number in range(13)],
)
def test_a_line_that_cannot_be_used_is_named_and_not_shown(text: str) -> None:
    """The number of the line and perhaps the origin: somebody may have mixed up the columns."""
    with pytest.raises(BadLine, match="line") as caught:
        parse_credentials(text)
    assert SECRET not in str(caught.value)


@given(st.text(max_size=200))
def test_any_text_is_credentials_or_refused(text: str) -> None:
    """Nothing else is raised."""
    for candidate in (text, f"https://a.example {text}"):
        try:
            found = parse_credentials(candidate)
        except BadLine:
            continue
        for login in found.values():
            assert login.secret.isprintable()
            assert " " not in login.secret
