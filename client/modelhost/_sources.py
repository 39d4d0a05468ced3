"""Whether two writings of a source mean the same; the daemon alone decides what a source is."""

from collections.abc import Iterable

from modelhost._errors import AlreadyExists
from modelhost.v1 import models_pb2


def is_source(text: str) -> bool:
    """Whether a text is a source's URI, not a model's id."""
    return "://" in text


def make(
    uri: str,
    revision: str,
    more_uris: Iterable[str],
    allow_patterns: Iterable[str],
    ignore_patterns: Iterable[str],
) -> models_pb2.Source:
    """Return a source as it is sent."""
    return models_pb2.Source(
        uri=uri,
        revision=revision,
        more_uris=more_uris,
        allow_patterns=allow_patterns,
        ignore_patterns=ignore_patterns,
    )


def same_source(asked: models_pb2.Source, stored: models_pb2.Source) -> bool:
    """Whether what a caller wrote is a model's stored source, its revision included."""
    uri, revision = _split(asked.uri)
    more = [_split(more)[0] for more in asked.more_uris]
    return (
        uri == stored.uri
        and (revision or asked.revision) == stored.revision
        and more == list(stored.more_uris)
    )


def same_patterns(asked: models_pb2.Source, stored: models_pb2.Source) -> bool:
    """Whether the patterns that a caller gave, if any, are those of a model."""
    return all(
        not given or list(given) == list(have)
        for given, have in (
            (asked.allow_patterns, stored.allow_patterns),
            (asked.ignore_patterns, stored.ignore_patterns),
        )
    )


def other_patterns(known: models_pb2.Model, error: AlreadyExists) -> AlreadyExists:
    """Return the error for a model that is registered with other patterns than those that were given."""
    have = " ".join(known.source.allow_patterns) or "all that is needed"
    without = " ".join(known.source.ignore_patterns)
    taken = (
        f"{known.name} takes {have}{f' without {without}' if without else ''} of {known.source.uri}"
    )
    return AlreadyExists(
        f"{taken}; its patterns are not changed by a pull",
        reason=error.reason,
        metadata=error.metadata,
        hint="leave --include and --exclude out, choose another id with `--name`, or remove it first "
        f"with `modelhost rm {known.name.partition('/')[2]}`",
        request_id=error.request_id,
    )


def _split(text: str) -> tuple[str, str]:
    """Return URI and revision as the daemon stores them, for the usual writings."""
    scheme, _, rest = text.partition("://")
    scheme = scheme.lower()
    revision = ""
    if scheme == "hf":
        rest, _, revision = rest.partition("@")
    elif scheme == "ollama":
        rest, _, revision = rest.removeprefix("library/").partition(":")
    elif scheme == "github" and "@" in rest:
        repo, _, tail = rest.partition("@")
        revision, slash, asset = tail.rpartition("/") if "/" in tail else (tail, "", "")
        rest = f"{repo}{slash}{asset}"
    return f"{scheme}://{rest}", revision
