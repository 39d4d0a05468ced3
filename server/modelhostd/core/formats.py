"""What a file is by its first bytes, whatever its name says."""

from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.paths import printable

SNIFF_BYTES = 512

_TAR_MAGIC_AT = 257


def unsafe_content(head: bytes) -> str:
    """Return why a file beginning with ``head`` is refused, or ``""``.

    A pickle of protocol 2 and up begins with 0x80 and the protocol's number; torch's zip files with
    ``PK``; its legacy archives are tar files. Archives are refused as a whole: none is ever extracted.
    """
    if len(head) >= 2 and head[0] == 0x80 and 2 <= head[1] <= 5:
        return "it is a pickle, and a pickle can run code when it is loaded"
    if head[:4] in {b"PK\x03\x04", b"PK\x05\x06", b"PK\x07\x08"}:
        return "it is a zip archive, as torch uses for pickles"
    if head[_TAR_MAGIC_AT : _TAR_MAGIC_AT + 5] == b"ustar":
        return "it is a tar archive, as torch once used for pickles"
    if head[:4] == b"\x7fELF" or head[:2] == b"MZ":
        return "it is a program"
    return ""


def check_content(path: str, head: bytes, source: str) -> None:
    """Raise UNSAFE_FILE when a file's first bytes are those of a pickle, archive or program."""
    if cause := unsafe_content(head):
        raise ModelhostError(
            Reason.UNSAFE_FILE,
            f"{source}: {printable(path)} is refused by its content: {cause}; leave it out with an "
            "ignore pattern",
            {"source": source, "file": printable(path), "cause": cause},
        )
