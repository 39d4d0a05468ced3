"""Each scheme's URIs taken apart, checked, and put into their one canonical form; see ``sources``."""

import re
from collections.abc import Callable
from urllib.parse import parse_qsl, quote, unquote, urlsplit

from modelhostd.core.errors import invalid
from modelhostd.core.paths import path_fault
from modelhostd.core.url_files import CHECKSUM_CHARS, is_list
from modelhostd.core.values import dataclass

URI_CHARS_MAX = 1024
REVISION_CHARS_MAX = 200

_HUB_SEGMENT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,95}")
_OWNER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_HOST = re.compile(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?|\[[0-9a-f:.]+\]")
_BUCKETS = {
    "s3": re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]"),
    "gs": re.compile(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]"),
}
_REVISION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._/+-]*")
_SECRET_KEYS = re.compile(
    r"(access_?|auth_?|api_?)?(token|key)|sig|signature|password|passwd|secret|auth|x-amz-.*|x-goog-.*",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class SourceName:
    """A source URI taken apart: scheme, canonical URI, the revision it named, and its last segment."""

    scheme: str
    uri: str
    revision: str
    last: str


def split_uri(text: str, *, field: str = "source.uri") -> SourceName:
    """Take a URI apart and return its canonical form. Raises INVALID_ARGUMENT naming ``field``."""
    if not text:
        raise invalid(field, f"a source URI: {_examples()}", text)
    if len(text) > URI_CHARS_MAX:
        raise invalid(field, f"at most {URI_CHARS_MAX} characters", f"{len(text)} characters")
    if not text.isascii() or any(c <= " " or c in '"<>\\^`{|}\x7f' for c in text):
        raise invalid(field, "printable ASCII without spaces; escape other characters as %XX", text)
    scheme, found, rest = text.partition("://")
    if not found:
        raise invalid(field, _bare_hint(text), text)
    if re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]*", scheme) is None:
        raise invalid(field, f"a scheme before '://': {_examples()}", text)
    scheme = scheme.lower()
    parser = _PARSERS.get(scheme)
    if parser is None:
        raise invalid(field, f"one of the schemes {', '.join(SCHEMES)}", text)
    if ("#" in rest or "?" in rest) and scheme not in {"https", "http"}:
        raise invalid(field, "no query and no fragment", text)
    return parser(rest, text, field)


def check_revision(revision: str, field: str) -> str:
    """Return a branch, tag or commit, or nothing. Raises INVALID_ARGUMENT naming ``field``."""
    if not revision:
        return ""
    bad = (
        len(revision) > REVISION_CHARS_MAX
        or _REVISION.fullmatch(revision) is None
        or ".." in revision
        or "//" in revision
        or revision.endswith(("/", ".lock"))
    )
    if bad:
        raise invalid(
            field,
            f"a branch, tag or commit: up to {REVISION_CHARS_MAX} of letters, digits and . _ / + -",
            revision,
        )
    return revision


def _examples() -> str:
    return "hf://org/name, https://host/file, github://owner/repo@tag/asset, ollama://name:tag, ..."


def _bare_hint(text: str) -> str:
    name, _, revision = text.partition("@")
    segments = name.split("/")
    if len(segments) <= 2 and all(_HUB_SEGMENT.fullmatch(s) for s in segments):
        hint = f"hf://{name}" + (f"@{revision}" if revision else "")
        return f"a URI with a scheme; for the Hugging Face Hub write {hint}"
    return f"a URI with a scheme: {_examples()}"


def _hub(rest: str, text: str, field: str) -> SourceName:
    repo, at, revision = rest.partition("@")
    segments = repo.split("/")
    valid = len(segments) in {1, 2} and all(
        _HUB_SEGMENT.fullmatch(s) and "--" not in s and ".." not in s and s[-1] not in ".-"
        for s in segments
    )
    if not valid or repo.endswith(".git") or (at and not revision):
        raise invalid(field, "hf://org/name or hf://org/name@revision", text)
    return SourceName("hf", f"hf://{repo}", check_revision(revision, field), segments[-1])


def _https(rest: str, text: str, field: str) -> SourceName:
    return _url("https", 443, rest, text, field)


def _http(rest: str, text: str, field: str) -> SourceName:
    return _url("http", 80, rest, text, field)


def _url(scheme: str, default_port: int, rest: str, text: str, field: str) -> SourceName:
    try:
        parts = urlsplit(f"{scheme}://{rest}")
        named = parts.hostname
    except ValueError:
        raise invalid(field, f"{scheme}://host/path with a host name", f"{scheme}://...") from None
    if "@" in parts.netloc:
        raise invalid(field, "no user name or password in a URL", f"{scheme}://***@{named}/...")
    try:
        port = parts.port
    except ValueError:
        raise invalid(field, "a port of 1 to 65535", text) from None
    host = parts.netloc.lower()
    host = host[: host.rfind(":")] if port is not None else host
    if _HOST.fullmatch(host) is None or ".." in host or port == 0:
        raise invalid(field, f"{scheme}://host/path with a host name", text)
    if host in {"huggingface.co", "hf.co", "www.huggingface.co"}:
        repo = "/".join(parts.path.strip("/").split("/")[:2]) or "org/name"
        raise invalid(field, f"hf://{repo} for a repository of the Hub", text)
    for key, _ in parse_qsl(parts.query, keep_blank_values=True):
        if _SECRET_KEYS.fullmatch(key):
            raise invalid(
                field, f"no secret in a URL (query parameter {key!r})", f"https://{host}/..."
            )
    path = _clean_path(parts.path, text, field)
    netloc = host if port in {None, default_port} else f"{host}:{port}"
    query = f"?{parts.query}" if parts.query else ""
    segments = path.split("/")
    # A list is named for what it lists: the folder that it is in.
    last = segments[-2] if is_list(segments[-1]) and segments[-2] else segments[-1]
    checksum = _checksum(parts.fragment, field) if "#" in rest else ""
    return SourceName(scheme, f"{scheme}://{netloc}{path}{query}{checksum}", "", last)


def _checksum(fragment: str, field: str) -> str:
    name, _, digits = fragment.lower().partition("=")
    if len(digits) != CHECKSUM_CHARS.get(name, -1) or re.fullmatch("[0-9a-f]+", digits) is None:
        kinds = ", ".join(f"#{kind}=" for kind in CHECKSUM_CHARS)
        raise invalid(
            field, f"nothing behind '#' but a checksum: {kinds} and its hex digits", "#..."
        )
    return f"#{name}={digits}"


def _github(rest: str, text: str, field: str) -> SourceName:
    expected = "github://owner/repo@tag/asset, github://owner/repo/asset or github://owner/repo@tag"
    owner, _, tail = rest.partition("/")
    repo, at, tagged = tail.partition("@")
    if at:
        # A tag may hold slashes: what follows the last one is the asset.
        revision, slash, asset = tagged.rpartition("/") if "/" in tagged else (tagged, "", "")
    else:
        revision = ""
        repo, slash, asset = tail.partition("/")
    decoded = unquote(asset, errors="surrogateescape")
    valid = (
        _OWNER.fullmatch(owner)
        and _OWNER.fullmatch(repo)
        and bool(slash) == bool(asset)
        and not (asset and path_fault(decoded))
        and "/" not in decoded
        and bool(at) == bool(revision)
    )
    if not valid:
        raise invalid(field, expected, text)
    shown = f"/{quote(decoded, safe='-._~+@')}" if asset else ""
    uri = f"github://{owner}/{repo}{shown}"
    return SourceName("github", uri, check_revision(revision, field), decoded or repo)


def _ollama(rest: str, text: str, field: str) -> SourceName:
    name, colon, tag = rest.partition(":")
    segments = name.split("/")
    if len(segments) == 2 and segments[0] == "library":
        segments = segments[1:]
    valid = len(segments) in {1, 2} and all(_OWNER.fullmatch(s) for s in segments)
    if not valid or (colon and not tag) or "/" in tag:
        raise invalid(field, "ollama://name:tag or ollama://namespace/name:tag", text)
    uri = f"ollama://{'/'.join(segments)}"
    return SourceName("ollama", uri, check_revision(tag, field), segments[-1])


def _file(rest: str, text: str, field: str) -> SourceName:
    if not rest.startswith("/") or len(rest) < 2:
        raise invalid(field, "file:///absolute/path, without a host", text)
    path = _clean_path(rest, text, field)
    return SourceName("file", f"file://{path}", "", unquote(path.rsplit("/", 1)[-1]))


def _s3(rest: str, text: str, field: str) -> SourceName:
    return _bucket("s3", rest, text, field)


def _gs(rest: str, text: str, field: str) -> SourceName:
    return _bucket("gs", rest, text, field)


def _bucket(scheme: str, rest: str, text: str, field: str) -> SourceName:
    bucket, _, key = rest.partition("/")
    if _BUCKETS[scheme].fullmatch(bucket) is None or ".." in bucket or not key:
        raise invalid(field, f"{scheme}://bucket/prefix", text)
    path = _clean_path("/" + key, text, field)
    return SourceName(scheme, f"{scheme}://{bucket}{path}", "", unquote(path.rsplit("/", 1)[-1]))


def _clean_path(path: str, text: str, field: str) -> str:
    """Return an absolute URL path with every segment checked once decoded, and encoded one way."""
    decoded = unquote(path.rstrip("/"), errors="surrogateescape")
    if not decoded.startswith("/") or (fault := path_fault(decoded[1:])):
        why = fault if decoded.startswith("/") else "it names no file"
        raise invalid(field, f"a path that names a file ({why})", text)
    return quote(decoded, safe="/-._~+@!$&'()*,;=:")


_PARSERS: dict[str, Callable[[str, str, str], SourceName]] = {
    "hf": _hub,
    "https": _https,
    "http": _http,
    "github": _github,
    "ollama": _ollama,
    "file": _file,
    "s3": _s3,
    "gs": _gs,
}
SCHEMES = tuple(f"{scheme}://" for scheme in _PARSERS if scheme != "http")
