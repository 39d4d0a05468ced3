"""Source URIs: what parses into what, and what is refused before any network."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.names import ID
from modelhostd.core.resources import Source
from modelhostd.core.source_uris import SCHEMES, split_uri
from modelhostd.core.sources import (
    canonical,
    derive_model_id,
    hub_repo,
    not_implemented,
    parse_source,
    scheme_of,
)
from tests.core.attempt import attempt

GOOD = {
    "hf://org/MiniLM-L6": ("hf://org/MiniLM-L6", "", "minilm-l6"),
    "HF://org/name@main": ("hf://org/name", "main", "name"),
    "hf://org/name@refs/pr/1": ("hf://org/name", "refs/pr/1", "name"),
    "hf://gpt2": ("hf://gpt2", "", "gpt2"),
    "https://Example.com:443/a/model.safetensors": (
        "https://example.com/a/model.safetensors",
        "",
        "model.safetensors",
    ),
    "https://example.com:8443/x%20y.gguf?download=1": (
        "https://example.com:8443/x%20y.gguf?download=1",
        "",
        None,
    ),
    "https://example.com/m/tiny/SHA256SUMS": (
        "https://example.com/m/tiny/SHA256SUMS",
        "",
        "tiny",
    ),
    f"https://example.com/a.gguf#SHA256={'AB' * 32}": (
        f"https://example.com/a.gguf#sha256={'ab' * 32}",
        "",
        "a.gguf",
    ),
    f"https://example.com/a.gguf?x=1#md5={'0' * 32}": (
        f"https://example.com/a.gguf?x=1#md5={'0' * 32}",
        "",
        "a.gguf",
    ),
    "http://nas.lan:80/a.gguf": ("http://nas.lan/a.gguf", "", "a.gguf"),
    "http://nas.lan:443/a.gguf": ("http://nas.lan:443/a.gguf", "", "a.gguf"),
    "github://owner/repo": ("github://owner/repo", "", "repo"),
    "github://owner/repo@v1.0": ("github://owner/repo", "v1.0", "repo"),
    "github://owner/repo@v1.0/asset.gguf": ("github://owner/repo/asset.gguf", "v1.0", "asset.gguf"),
    "github://owner/repo/asset.gguf": ("github://owner/repo/asset.gguf", "", "asset.gguf"),
    "github://owner/repo@release/2026/a.gguf": (
        "github://owner/repo/a.gguf",
        "release/2026",
        "a.gguf",
    ),
    "ollama://llama3:8b": ("ollama://llama3", "8b", "llama3"),
    "ollama://library/llama3": ("ollama://llama3", "", "llama3"),
    "ollama://someone/tiny:latest": ("ollama://someone/tiny", "latest", "tiny"),
    "file:///models/Tiny": ("file:///models/Tiny", "", "tiny"),
    "s3://bucket/a/b.safetensors": ("s3://bucket/a/b.safetensors", "", "b.safetensors"),
    "s3://bucket/models/Tiny/": ("s3://bucket/models/Tiny", "", "tiny"),
    "gs://my_bucket/models/tiny": ("gs://my_bucket/models/tiny", "", "tiny"),
}

BAD = [
    "",
    "org/name",
    "name",
    "org/name@main",
    "/etc/passwd",
    "a/b/c",
    "ftp://host/file",
    "http://user:secret@example.com/file",
    "javascript://x",
    "hf://",
    "hf://org/",
    "hf:///name",
    "hf://a/b/c",
    "hf://org/na me",
    "hf://org/name@",
    "hf://org/name@a..b",
    "hf://org/name@-x",
    "hf://org/name@a//b",
    "hf://org/name@x.lock",
    "hf://org/na--me",
    "hf://org/..",
    "hf://../name",
    "hf://org/name.git",
    "hf://org/name?x=1",
    "hf://org/name#frag",
    "hf://org/n\u0430me",
    "hf://org/name\n",
    "hf://org/\x00",
    "hf://user:secret@org/name",
    "hf://" + "a" * 2000,
    "https://user:secret@example.com/f",
    "https://user@example.com/f",
    "https://example.com",
    "https://example.com/",
    "https://example.com/../x",
    "https://example.com/%2e%2e/x",
    "https://example.com/a%2F..%2Fb/../c",
    "https://example.com/a%00b",
    "https://example.com/f?token=abc",
    "https://example.com/f?X-Amz-Signature=abc",
    "https://example.com/f#x",
    "https://[::1/f",
    "https://]/f",
    "https://[x]/f",
    "https://example.com:0/f",
    "https://example.com:99999/f",
    "https://exa mple.com/f",
    "https://ex_ample.com\\@evil/f",
    "https://huggingface.co/org/name",
    "https://example.com/f#sha256=abc",
    f"https://example.com/f#sha512={'0' * 128}",
    f"https://example.com/f#sha1={'g' * 40}",
    "https://example.com/f#",
    "github://owner/repo/",
    "github://owner/repo@",
    "github://owner/repo@/asset",
    "github://owner/repo@v1/",
    "github://owner",
    "github://owner/repo/%2e%2e",
    "ollama://",
    "ollama://a/b/c:x",
    "ollama://name:",
    "file://host/path",
    "file:///",
    "file:///a/../b",
    "file:///a//b",
    "file:///a%2f..%2f..",
    "s3://b/key",
    "s3://bucket",
    "s3://bucket/",
    "s3://BUCKET/key",
    "s3://a..b/key",
    "s3://127.0.0.1:9/key",
    "s3://key:secret@bucket/key",
    "s3://bucket/../key",
    "s3://bucket/key?versionId=1",
    "gs://bucket",
    "gs://BUCKET/key",
    "gs://bucket/a#1",
]


@pytest.mark.parametrize("text", GOOD)
def test_a_good_uri_has_one_canonical_form(text: str) -> None:
    """The canonical URI carries no revision, parses to itself, and names the model."""
    uri, revision, model = GOOD[text]
    source = parse_source(text)
    assert (source.uri, source.revision) == (uri, revision)
    assert split_uri(source.uri).uri == source.uri
    assert source.uri.startswith(f"{scheme_of(source)}://")
    if model is not None:
        assert derive_model_id(source) == model


@pytest.mark.parametrize("text", BAD, ids=lambda text: ascii(text[:40]))
def test_a_bad_uri_is_refused_with_its_field(text: str) -> None:
    """INVALID_ARGUMENT names the field, and no secret of the URL is repeated."""
    with pytest.raises(ModelhostError) as caught:
        parse_source(text)
    assert caught.value.reason is Reason.INVALID_ARGUMENT
    assert caught.value.metadata["field"].startswith("source")
    assert "abc" not in caught.value.message
    assert "secret@example" not in caught.value.message


def test_a_bare_repository_gets_the_hint() -> None:
    """Who writes org/name is told what to write."""
    with pytest.raises(ModelhostError, match="hf://org/name@main"):
        parse_source("org/name@main")
    with pytest.raises(ModelhostError, match="hf://org/name "):
        parse_source("https://huggingface.co/org/name/tree/main")


def test_an_unknown_scheme_names_the_known_ones() -> None:
    """The error lists every scheme."""
    with pytest.raises(ModelhostError) as caught:
        parse_source("ftp://host/file")
    assert all(scheme in caught.value.message for scheme in SCHEMES)


def test_a_revision_may_stand_beside_the_uri() -> None:
    """Beside it, in it, or both alike; two different ones are an error, and so is one for https."""
    assert parse_source("hf://org/name", revision="v1").revision == "v1"
    assert parse_source("hf://org/name@v1", revision="v1").revision == "v1"
    with pytest.raises(ModelhostError, match="not two"):
        parse_source("hf://org/name@v1", revision="v2")
    with pytest.raises(ModelhostError, match="no revisions"):
        parse_source("https://example.com/f", revision="v2")


def test_patterns_travel_with_the_source() -> None:
    """They belong to the model, not to one request."""
    source = parse_source("hf://org/name", allow_patterns=["*.json"], ignore_patterns=["a/*"])
    assert source == Source("hf://org/name", "", ("*.json",), ("a/*",))
    assert hub_repo(source) == "org/name"


def test_a_last_segment_that_is_no_id_asks_for_a_name() -> None:
    """The way out is an id of one's own."""
    with pytest.raises(ModelhostError, match="--name"):
        derive_model_id(Source("hf://org/trailing_"))
    with pytest.raises(ModelhostError, match="--name"):
        derive_model_id(Source("hf://org/" + "a" * 90))


def test_other_schemes_parse_and_say_that_nothing_fetches_them() -> None:
    """A typed error, not a crash."""
    error = not_implemented(parse_source("s3://bucket/a/b"))
    assert error.reason is Reason.UNIMPLEMENTED
    assert "s3://" in error.message


@given(st.text(max_size=80) | st.text("hf:/@.-_?#%az AZ09\\[]=", max_size=60))
def test_any_text_gives_a_canonical_source_or_invalid_argument(text: str) -> None:
    """Nothing else is raised, and what parses is printable, stable and free of user names."""
    for candidate in (text, f"hf://{text}", f"https://{text}", f"file:///{text}"):
        source = attempt(lambda candidate=candidate: parse_source(candidate))
        if isinstance(source, ModelhostError):
            assert source.reason is Reason.INVALID_ARGUMENT
            continue
        assert source.uri.isascii()
        assert source.uri.isprintable()
        assert parse_source(source.uri).uri == source.uri
        model = attempt(lambda source=source: derive_model_id(source))
        if isinstance(model, ModelhostError):
            assert model.reason is Reason.INVALID_ARGUMENT
        else:
            assert ID.fullmatch(model)


def test_further_urls_are_canonical_too() -> None:
    """Checksums are kept, hosts are written one way."""
    digest = "#sha256=" + "a" * 64
    source = parse_source("https://h/a", more_uris=["HTTPS://H:443/b" + digest])
    assert source.more_uris == ("https://h/b" + digest,)
    assert canonical(source) == source


@pytest.mark.parametrize(
    ("uri", "more"),
    [
        ("hf://org/name", ["https://h/a"]),
        ("https://h/a", ["hf://org/name"]),
        ("https://h/a", ["file:///a"]),
        ("https://h/SHA256SUMS", ["https://h/a"]),
        ("https://h/a", ["https://h/SHA256SUMS"]),
        ("https://h/a", ["https://h/a"]),
        ("https://h/a", ["https://h/b", "https://h/b"]),
        ("https://h/a", ["https://u:p@h/b"]),
        ("https://h/a", ["https://h/b?token=x"]),
        ("https://h/a", [f"https://h/{n}" for n in range(65)]),
        ("https://h/a", [""]),
    ],
)
def test_further_urls_are_files_beside_the_url_of_one(uri: str, more: list[str]) -> None:
    """Anything else is INVALID_ARGUMENT for the field."""
    with pytest.raises(ModelhostError) as caught:
        parse_source(uri, more_uris=more)
    assert caught.value.reason is Reason.INVALID_ARGUMENT
    assert caught.value.metadata["field"] == "source.more_uris"
