"""Whether two writings of a source mean the same, as the daemon would say."""

import pytest

from modelhost._sources import is_source, same_source
from modelhost.v1 import models_pb2
from modelhostd.core.sources import parse_source


@pytest.mark.parametrize(
    "text",
    [
        "hf://org/name", "HF://org/name@v1", "ollama://tiny", "ollama://library/tiny:8b",
        "github://o/r", "github://o/r@v1", "github://o/r@v1/a.gguf", "github://o/r@a/b/c.gguf",
        "github://o/r/a.gguf", "https://host/a.gguf", f"https://host/a.gguf#md5={'0' * 32}",
        "http://host/a.gguf", "file:///srv/models/tiny",
    ],
)  # fmt: skip
def test_what_was_written_is_what_the_daemon_stored(text: str) -> None:
    """URI and revision come apart alike on both sides."""
    source = parse_source(text)
    stored = models_pb2.Source(uri=source.uri, revision=source.revision)
    assert is_source(text)
    assert same_source(text, stored)
    assert not same_source(text + "x", stored)
