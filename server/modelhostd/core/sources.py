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

from collections.abc import Iterable, Sequence

from modelhostd.core.errors import ModelhostError, Reason, invalid
from modelhostd.core.names import ID, ID_RULE
from modelhostd.core.resources import Source
from modelhostd.core.source_uris import SourceName, check_revision, split_uri
from modelhostd.core.url_files import is_list

MORE_URIS_MAX = 64


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
        revision=check_revision(asked, "source.revision"),
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


def derive_model_id(source: Source) -> str:
    """Return the model id of a source: its last segment, lower-cased.

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


def offered_as(source: Source) -> str:
    """Return the scheme under which an operator allows a source, and GetHost tells of it."""
    scheme = scheme_of(source)
    return "https" if scheme == "http" else scheme


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
