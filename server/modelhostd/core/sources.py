"""Source URIs: taken apart, checked and put into one canonical form.

    hf://org/name@revision        a repository of the Hugging Face Hub
    https://host/path             one file, or a list of files with checksums (see ``url_files``);
                                  ``#sha256=...`` (sha1, md5) behind it says what must come
    github://owner/repo@tag/asset a release asset; without @tag the latest release, without /asset all
    ollama://name:tag             a model of the Ollama registry; also ollama://namespace/name:tag
    file:///path                  a file or folder of this machine
    s3://bucket/prefix            objects of a store that speaks S3's protocol: one, or all below a prefix
    gs://bucket/prefix            the same of Google Cloud Storage

The canonical URI carries no revision, no user, no password and no secret query: it is stored, logged
and shown. ``http://`` parses too; whether a host may be asked without TLS is the operator's to say.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from urllib.parse import parse_qsl, quote, unquote, urlsplit

from modelhostd.core.errors import ModelhostError, Reason, invalid
from modelhostd.core.names import ID, ID_RULE
from modelhostd.core.paths import path_fault
from modelhostd.core.resources import Source
from modelhostd.core.url_files import CHECKSUM_CHARS, is_list

URI_CHARS_MAX = 1024
REVISION_CHARS_MAX = 200
MORE_URIS_MAX = 64

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


def parse_source(
    text: str,
    *,
    revision: str = "",
    allow_patterns: Sequence[str] = (),
    ignore_patterns: Sequence[str] = (),
    more_uris: Sequence[str] = (),
    field: str = "source.uri",
) -> Source:
    """Return the Source for a URI that a client gave; ``revision`` may stand in the URI or beside it.

    Raises INVALID_ARGUMENT naming ``field`` and what a valid URI looks like, before any network.
    """
    name = split_uri(text, field=field)
    if revision and name.revision and revision != name.revision:
        raise invalid(f"{field} and revision", "one revision, not two", f"{text} and {revision}")
    asked = revision or name.revision
    if asked and name.scheme in {"https", "http", "file", "s3", "gs"}:
        raise invalid("source.revision", f"nothing: {name.scheme} sources have no revisions", asked)
    return Source(
        uri=name.uri,
        revision=_revision(asked, "source.revision"),
        allow_patterns=tuple(allow_patterns),
        ignore_patterns=tuple(ignore_patterns),
        more_uris=_more(name, more_uris, field.removesuffix("uri") + "more_uris"),
    )


def canonical(source: Source) -> Source:
    """Return a source as a client gave it in its canonical form. Raises INVALID_ARGUMENT."""
    return parse_source(
        source.uri,
        revision=source.revision,
        allow_patterns=source.allow_patterns,
        ignore_patterns=source.ignore_patterns,
        more_uris=source.more_uris,
    )


def canonical_or_none(source: Source) -> Source:
    """The same; a source without anything is that of a model whose files are uploaded."""
    return source if source == Source("") else canonical(source)


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


def derive_model_id(source: Source) -> str:
    """Return the model id of a source: its last segment, lower-cased (DESIGN section 4).

    ``hf://org/MiniLM-L6`` -> ``minilm-l6``. Raises INVALID_ARGUMENT where that is no id.
    """
    last = split_uri(source.uri).last.lower()
    if ID.fullmatch(last) is None:
        raise invalid(
            "model_id",
            f"an id of your own (model_id, `--name`), because the source's last segment is not {ID_RULE}",
            last,
        )
    return last


def scheme_of(source: Source) -> str:
    """Return the scheme of a canonical source."""
    return source.uri.partition("://")[0]


def host_of(source: Source) -> str:
    """Return whose limits a source falls under: its host, or its scheme where that means one place."""
    scheme, _, rest = source.uri.partition("://")
    return rest.partition("/")[0] if scheme in {"http", "https"} else scheme


def hub_repo(source: Source) -> str:
    """Return ``org/name`` (or a bare canonical ``name``) of an ``hf://`` source."""
    assert source.uri.startswith("hf://"), source.uri
    return source.uri.removeprefix("hf://")


def not_implemented(source: Source, schemes: Iterable[str] = ("hf",)) -> ModelhostError:
    """Return UNIMPLEMENTED for a scheme that parses, and that nothing fetches yet.

    ``schemes`` are those that are fetched from.
    """
    use = ", ".join(f"{scheme}://" for scheme in schemes)
    return ModelhostError(
        Reason.UNIMPLEMENTED,
        f"{source.uri}: fetching from {scheme_of(source)}:// is not implemented yet; use one of {use}",
        {"method": "DownloadModel"},
    )


def _more(first: SourceName, texts: Sequence[str], field: str) -> tuple[str, ...]:
    """Return further URLs in their canonical form."""
    if len(texts) > MORE_URIS_MAX:
        raise invalid(field, f"at most {MORE_URIS_MAX} URLs", f"{len(texts)} URLs")
    names = [split_uri(text, field=field) for text in texts]
    uris = tuple(name.uri for name in names)
    for name in (first, *names) if names else ():
        last = name.uri.partition("#")[0].partition("?")[0].rpartition("/")[2]
        if name.scheme not in {"https", "http"} or is_list(last):
            expected = "URLs of one file each (https://...), the source's own uri among them"
            raise invalid(field, expected, name.uri)
    if len({first.uri, *uris}) < 1 + len(uris):
        raise invalid(field, "each URL once", ", ".join(uris))
    return uris


def _revision(revision: str, field: str) -> str:
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
    return SourceName("hf", f"hf://{repo}", _revision(revision, field), segments[-1])


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
    return SourceName("github", uri, _revision(revision, field), decoded or repo)


def _ollama(rest: str, text: str, field: str) -> SourceName:
    name, colon, tag = rest.partition(":")
    segments = name.split("/")
    if len(segments) == 2 and segments[0] == "library":
        segments = segments[1:]
    valid = len(segments) in {1, 2} and all(_OWNER.fullmatch(s) for s in segments)
    if not valid or (colon and not tag) or "/" in tag:
        raise invalid(field, "ollama://name:tag or ollama://namespace/name:tag", text)
    uri = f"ollama://{'/'.join(segments)}"
    return SourceName("ollama", uri, _revision(tag, field), segments[-1])


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
