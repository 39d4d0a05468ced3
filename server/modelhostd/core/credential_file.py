"""A file of credentials: one line per origin, ``https://host TOKEN`` or ``https://host USER PASSWORD``.

The messages name lines and origins, never what stands behind them.
"""

from collections.abc import Mapping
from dataclasses import field

from modelhostd.core.errors import ModelhostError
from modelhostd.core.origins import Origin, parse_target
from modelhostd.core.values import dataclass

LINES_MAX = 1000
SECRET_CHARS_MAX = 4096


class BadLine(ValueError):
    """A line that cannot be used; ``str()`` says which and why, without what it holds."""


@dataclass(frozen=True, slots=True)
class Login:
    """What one origin wants to see."""

    secret: str = field(repr=False)
    user: str = ""


def parse_credentials(text: str) -> Mapping[Origin, Login]:
    """Return what a file says, by origin. Raises BadLine.

    Empty lines and lines that begin with ``#`` are left out. An origin stands for itself alone: scheme,
    host and port, no path.
    """
    found: dict[Origin, Login] = {}
    lines = text.splitlines()
    if len(lines) > LINES_MAX:
        raise BadLine(f"more than {LINES_MAX} lines")
    for number, line in enumerate(lines, start=1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        if len(words) not in {2, 3}:
            raise BadLine(
                f"line {number}: expected an origin and a token, or a user and a password"
            )
        origin = _origin(words[0], number)
        if origin in found:
            raise BadLine(f"line {number}: {origin} stands there twice")
        user = words[1] if len(words) == 3 else ""
        if ":" in user or not all(is_secret(word) for word in words[1:]):
            raise BadLine(f"line {number}: {origin} has characters that no token or user has")
        found[origin] = Login(words[-1], user)
    return found


def is_secret(text: str) -> bool:
    """Tell whether a text can go into a header: printable ASCII without spaces, not endless."""
    printable = text.isascii() and text.isprintable() and " " not in text
    return printable and 0 < len(text) <= SECRET_CHARS_MAX


def _origin(word: str, number: int) -> Origin:
    try:
        target = parse_target(word, "")
    except ModelhostError:
        # The word itself is not shown: somebody may have put the token first.
        raise BadLine(f"line {number}: expected an origin such as https://host first") from None
    if target.path != "/":
        raise BadLine(f"line {number}: {target.origin} goes without a path")
    return target.origin
