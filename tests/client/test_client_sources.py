"""Whether two writings of a source mean the same, as the daemon would say."""

from collections.abc import Iterable

import pytest

from modelhost._sources import is_source, make, same_source
from modelhost.v1 import models_pb2
from modelhostd.core.sources import parse_source


def asked(uri: str, revision: str = "", more_uris: Iterable[str] = ()) -> models_pb2.Source:
    """Return a source as a caller gives it."""
    return make(uri, revision, more_uris, (), ())


@pytest.mark.parametrize(
    "text",
    [
        "hf://org/name", "HF://org/name@v1", "ollama://tiny", "ollama://library/tiny:8b",
        "github://o/r", "github://o/r@v1", "github://o/r@v1/a.gguf", "github://o/r@a/b/c.gguf",
        "github://o/r/a.gguf", "https://host/a.gguf", f"https://host/a.gguf#md5={'0' * 32}",
        "http://host/a.gguf", "file:///srv/models/tiny", "s3://bucket/a", "gs://bucket/a/b",
    ],
)  # fmt: skip
def test_what_was_written_is_what_the_daemon_stored(text: str) -> None:
    """URI and revision come apart alike on both sides."""
    source = parse_source(text)
    stored = models_pb2.Source(uri=source.uri, revision=source.revision)
    assert is_source(text)
    assert same_source(asked(text), stored)
    assert not same_source(asked(text + "x"), stored)


def test_revision_and_further_urls_may_stand_beside_the_uri() -> None:
    """The same as behind it; another one, or other URLs, are another source."""
    stored = models_pb2.Source(uri="hf://o/n", revision="v1")
    assert same_source(asked("hf://o/n", "v1"), stored)
    assert same_source(asked("hf://o/n@v1"), stored)
    assert not same_source(asked("hf://o/n", "v2"), stored)
    assert not same_source(asked("hf://o/n"), stored)
    stored = models_pb2.Source(uri="https://h/a", more_uris=["https://h/b"])
    assert same_source(asked("https://h/a", more_uris=["https://h/b"]), stored)
    assert not same_source(asked("https://h/a"), stored)
