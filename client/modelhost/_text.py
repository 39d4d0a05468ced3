"""Words and numbers for people, safe to show on a terminal. Standard library only."""

import re

# What a terminal acts on instead of showing: C0 and C1 controls, line and paragraph separators, and the
# marks that turn the direction of text around (a name could look like another one).
_UNSAFE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u061c\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
SIZE_MAX = 1 << 63
"""What the contract's fields hold is below it."""

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgtp]?)(i?)b?", re.IGNORECASE)


def plain(text: str) -> str:
    r"""Return text from outside with what a terminal would act on written out, ``\x1b``."""
    return _UNSAFE.sub(lambda match: _escape(match.group()), text)


def plain_json(document: str) -> str:
    r"""Return a JSON document with the same characters as ``\u001b``: still the same document.

    Only characters inside strings can be among them; line ends between the members are kept.
    """
    return _UNSAFE.sub(
        lambda m: m.group() if m.group() == "\n" else f"\\u{ord(m.group()):04x}", document
    )


def show_bytes(count: int) -> str:
    """Return ``1.4 GiB`` for a number of bytes."""
    size = float(count)
    for unit in _UNITS:
        if abs(size) < 1024 or unit == _UNITS[-1]:
            return f"{count} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    raise AssertionError("unreachable")


def read_bytes(text: str) -> int:
    """Return the bytes in ``500MB`` (powers of 1,000), ``8GiB`` or ``8G`` (of 1,024), or a number.

    Raises ValueError for anything else.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is no size; write a number of bytes, 500MB or 8GiB")
    number, prefix, binary = match.groups()
    decimal = not binary and text.strip().lower().endswith("b") and prefix
    base = 1000 if decimal else 1024
    size = float(number) * base ** " kmgtp".index(prefix.lower() or " ")
    if size >= SIZE_MAX:
        raise ValueError(f"{text[:40]!r} is too much; a size is below 8 EiB")
    return int(size)


def show_seconds(seconds: float) -> str:
    """Return ``42 s``, ``3 min 5 s``, ``2 h 10 min`` or ``5 d 3 h`` for a span."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    for size, unit, below, small in (
        (86400, "d", 3600, "h"),
        (3600, "h", 60, "min"),
        (60, "min", 1, "s"),
    ):
        if whole >= size:
            rest = whole % size // below
            return f"{whole // size} {unit}" + (f" {rest} {small}" if rest else "")
    raise AssertionError("unreachable")


def _escape(character: str) -> str:
    return f"\\x{ord(character):02x}" if ord(character) < 256 else f"\\u{ord(character):04x}"
