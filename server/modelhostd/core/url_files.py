"""What a URL names: one file under a sensible name, or a list of files with their checksums.

A URL whose last segment is ``SHA256SUMS`` (``SHA1SUMS``, ``MD5SUMS``, ``name.sha256`` ...) is a list as
``sha256sum`` writes it: hex digits, two spaces, a path below the list's own folder.
"""

import re
from collections.abc import Sequence
from email.message import Message
from urllib.parse import quote, unquote, urlsplit

from modelhostd.core.paths import path_fault
from modelhostd.core.values import dataclass

LIST_BYTES_MAX = 1 << 20
LIST_FILES_MAX = 2000
CHECKSUM_CHARS = {"sha256": 64, "sha1": 40, "md5": 32}
"""Kinds of checksums, and how many hex digits they have."""

_LIST = re.compile(r"(?:(.*)\.)?(sha256|sha1|md5)(?:sums?)?(?:\.txt)?", re.IGNORECASE)
_LINE = re.compile(r"([0-9a-fA-F]+)(?: [ *]?(.+))?")
_WEIGHTS = (".safetensors", ".gguf", ".bin", ".pt", ".pth", ".ckpt", ".onnx", ".zip")


class BadList(ValueError):
    """A list that is none; ``str()`` says why in a few words."""


@dataclass(frozen=True, slots=True)
class Listed:
    """One file of a list: its path below the list's folder, and its checksum as ``kind:digits``."""

    path: str
    checksum: str


def is_list(name: str) -> bool:
    """Tell whether the last segment of a URL is a list's name."""
    match = _LIST.fullmatch(name)
    # A file called `sha256` is none, `SHA256SUMS` and `model.safetensors.sha256` are.
    return match is not None and (match[1] is not None or "sum" in name.lower())


def parse_list(name: str, text: str) -> Sequence[Listed]:
    """Return the files of a list, in its order. Raises BadList.

    The name says the kind of the checksums. A line of digits alone means the file that the list is
    named for. Empty lines and lines that begin with ``#`` are left out.
    """
    match = _LIST.fullmatch(name)
    assert match is not None, name
    kind = match[2].lower()
    files: dict[str, Listed] = {}
    for line in text.splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        found = _LINE.fullmatch(line)
        if found is None or len(found[1]) != CHECKSUM_CHARS[kind]:
            raise BadList(f"a line that is no {kind} and a name")
        path = (found[2] or match[1] or "").removeprefix("./")
        if not path:
            raise BadList("a line without a name")
        if path in files:
            raise BadList("a name twice")
        if len(files) >= LIST_FILES_MAX:
            raise BadList(f"more than {LIST_FILES_MAX} files")
        files[path] = Listed(path, f"{kind}:{found[1].lower()}")
    if not files:
        raise BadList("no file")
    return tuple(files.values())


def beside(url: str, path: str) -> str:
    """Return the URL of a path below the folder of a list's URL. The path is a safe one."""
    assert not path_fault(path), path
    parts = urlsplit(url)
    folder = parts.path.rsplit("/", 1)[0]
    query = f"?{parts.query}" if parts.query else ""
    return f"{parts.scheme}://{parts.netloc}{folder}/{quote(path)}{query}"


def name_of(url: str, disposition: str, final_url: str) -> str:
    """Return what a file is to be called: the first that names weights, else the URL's own last segment.

    ``disposition`` is the answer's Content-Disposition, ``final_url`` who answered after redirects.
    The name is without folders, and not judged yet.
    """
    own = _last(url)
    named = _named(disposition)
    for name in (own, named, _last(final_url)):
        if name.lower().endswith(_WEIGHTS):
            return name
    return named if named and "." not in own else own


def _last(url: str) -> str:
    return unquote(urlsplit(url).path.rsplit("/", 1)[-1], errors="replace")


def _named(disposition: str) -> str:
    """Return the file name of a Content-Disposition (RFC 6266), without what looks like folders."""
    if not disposition or len(disposition) > 1024:
        return ""
    message = Message()
    message["Content-Disposition"] = re.sub(r"[\r\n]", " ", disposition)
    try:
        name = message.get_filename("")
    except (ValueError, LookupError):
        return ""
    return re.split(r"[/\\]", str(name))[-1]
