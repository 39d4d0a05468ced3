r"""File names from outside: what may become a path below a model's directory, and what may not.

``tokenizer/vocab.json`` is fine; ``../x``, ``/etc/passwd``, ``a//b``, ``a\b``, a NUL, a control or a
bidirectional character, and names that only differ by case or Unicode form are refused.
"""

import unicodedata
from collections.abc import Iterable

from modelhostd.core.errors import ModelhostError, Reason

SEGMENT_BYTES_MAX = 240
"""Below NAME_MAX (255), so that a suffix of ours still fits."""
PATH_BYTES_MAX = 1024
SEGMENTS_MAX = 32

# Names that Windows keeps for devices: a tree that is copied there must not open one.
_RESERVED = frozenset(
    {"con", "prn", "aux", "nul", *(f"{p}{n}" for p in ("com", "lpt") for n in range(1, 10))}
)


def path_fault(path: str) -> str:
    """Return why ``path`` may not be used as a ``/``-separated relative path, or ``""`` if it may."""
    if not path:
        return "it is empty"
    try:
        encoded = path.encode("utf-8")
    except UnicodeEncodeError:
        return "it is not valid Unicode"
    if len(encoded) > PATH_BYTES_MAX:
        return f"it is longer than {PATH_BYTES_MAX} bytes"
    if path.startswith("/"):
        return "it is absolute"
    if "\\" in path:
        return "it holds a backslash"
    # Cc: control (NUL, newline), Cf: format (right-to-left override, zero width), Cs/Co/Cn: no text,
    # Zl/Zp: line and paragraph separators. None of them belongs in a name that people read.
    if any(unicodedata.category(c) in {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"} for c in path):
        return "it holds a control, format or unassigned character"
    segments = path.split("/")
    if len(segments) > SEGMENTS_MAX:
        return f"it has more than {SEGMENTS_MAX} segments"
    for segment in segments:
        if fault := _segment_fault(segment):
            return fault
    return ""


def _segment_fault(segment: str) -> str:
    if not segment:
        return "it has an empty segment"
    if segment in {".", ".."}:
        return f"it has a segment {segment!r}"
    if len(segment.encode("utf-8")) > SEGMENT_BYTES_MAX:
        return f"a segment is longer than {SEGMENT_BYTES_MAX} bytes"
    if segment != segment.strip() or segment.endswith("."):
        return "a segment begins or ends with a space, or ends with a dot"
    if segment.split(".", 1)[0].lower() in _RESERVED:
        return "a segment is the name of a device"
    return ""


def path_key(path: str) -> str:
    """Return what two names must differ in to be two files on every file system: case and form."""
    return unicodedata.normalize("NFC", path).casefold()


def check_path(path: str, source: str = "") -> str:
    """Return ``path`` if it may be used, else raise UNSAFE_FILE naming it, and who gave it."""
    if fault := path_fault(path):
        raise unsafe_path(path, fault, source)
    return path


def check_tree(paths: Iterable[str], source: str = "") -> None:
    """Raise UNSAFE_FILE if one of ``paths`` may not be used, or if two of them collide.

    Collisions: equal names, names equal but for case or Unicode form, a file that another path uses
    as its directory. ``source`` is named in the message.
    """
    files: dict[str, str] = {}
    folders: dict[str, str] = {}
    for path in paths:
        if fault := path_fault(path):
            raise unsafe_path(path, fault, source)
        key = path_key(path)
        if key in files:
            raise unsafe_path(path, f"it collides with {printable(files[key])}", source)
        files[key] = path
        end = len(path)
        while (end := path.rfind("/", 0, end)) > 0:
            folder = path[:end]
            known = folders.setdefault(path_key(folder), folder)
            if known != folder:
                raise unsafe_path(path, f"its directory collides with {printable(known)}", source)
    for key, path in files.items():
        if key in folders:
            raise unsafe_path(path, "another file uses it as its directory", source)


def printable(path: str) -> str:
    """Return ``path`` quoted, escaped and cut, so that it cannot break a log line or a terminal."""
    shown = ascii(path)
    return shown if len(shown) <= 160 else shown[:157] + "..."


def unsafe_path(path: str, fault: str, source: str = "") -> ModelhostError:
    """Return UNSAFE_FILE for a name that may not be used; ``source`` is who gave it."""
    shown = printable(path)
    return ModelhostError(
        Reason.UNSAFE_FILE,
        f"{f'{source}: ' if source else ''}file name {shown} is refused: {fault}; leave the file out "
        "with an ignore pattern",
        {"file": shown, "cause": fault} | ({"source": source} if source else {}),
    )
