"""A manifest of an Ollama registry as files, and where its login sends strangers."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelhostd.core.ollama_manifest import (
    LAYERS_MAX,
    BadManifest,
    Layer,
    OtherLayers,
    parse_challenge,
    parse_manifest,
    parse_token,
)

HEX = "ab" * 32


def layer(kind: str = "model", **changes: Any) -> dict[str, Any]:
    """Return a layer as a manifest has it."""
    media = f"application/vnd.ollama.image.{kind}"
    return {"mediaType": media, "digest": f"sha256:{HEX}", "size": 5, **changes}


def manifest(*layers: dict[str, Any], version: Any = 2) -> bytes:
    """Return a manifest as a registry sends it."""
    return json.dumps({"schemaVersion": version, "layers": layers}).encode()


def test_layers_become_files_with_names() -> None:
    """Blobs have none: the weights are called like the model, several of a kind are numbered."""
    kinds = ["model", "projector", "adapter", "template", "license", "license", "params"]
    found = parse_manifest(manifest(*map(layer, kinds)), "tiny")
    assert [file.path for file in found] == [
        "tiny.gguf", "mmproj-tiny.gguf", "adapter-tiny.gguf", "template.txt", "LICENSE.txt",
        "LICENSE-2.txt", "params.json",
    ]  # fmt: skip
    assert found[0] == Layer("tiny.gguf", HEX, 5)


@pytest.mark.parametrize(
    "kinds", [["tensor"], ["model", "tokenizer.json"], ["license"], ["x/../y"]]
)
def test_layers_of_other_kinds_are_told_apart(kinds: list[str]) -> None:
    """A model that is there, and cannot be taken, is no broken answer."""
    with pytest.raises(OtherLayers):
        parse_manifest(manifest(*map(layer, kinds)), "tiny")


@pytest.mark.parametrize(
    "data",
    [
        b"", b"null", b"[]", b"{}", b"\xff", b"[" * 100_000, manifest(), manifest(layer(), version=1),
        manifest(layer(digest=HEX)), manifest(layer(digest=f"sha512:{HEX}")),
        manifest(layer(digest=f"sha256:{HEX}0")), manifest(layer(digest=f"sha256:{HEX.upper()}")),
        manifest(layer(digest="sha256:../../../etc/passwd")), manifest(layer(digest=None)),
        manifest(layer(size=-1)), manifest(layer(size="5")), manifest(layer(size=True)),
        manifest(layer(size=1 << 60)), b'{"schemaVersion": 2, "layers": {"a": 1}}',
        b'{"schemaVersion": 2, "layers": [7]}', manifest(*[layer()] * (LAYERS_MAX + 1)),
    ],
    ids=[str(number) for number in range(21)],
)  # fmt: skip
def test_what_is_no_manifest_is_refused(data: bytes) -> None:
    """Wrong algorithm, wrong length, paths as digests, lying sizes, endless lists."""
    with pytest.raises(BadManifest):
        parse_manifest(data, "tiny")


def test_a_challenge_names_a_place() -> None:
    """Realm, service and scope in one URL."""
    header = 'Bearer realm="https://a.example/token?x=1",service="reg",scope="repository:a/b:pull"'
    assert parse_challenge(header) == (
        "https://a.example/token?x=1&service=reg&scope=repository%3Aa%2Fb%3Apull"
    )


@pytest.mark.parametrize(
    "header",
    [
        "", "Basic realm=x", "Bearer", 'Bearer realm=""', 'Bearer realm="file:///etc/passwd"',
        'Bearer realm="//evil"', 'Bearer realm="https://[::1"', 'Bearer realm="https://a/#x"',
        'Bearer service="x"', 'Bearer realm="' + "a" * 3000 + '"', "Digest x",
    ],
    ids=[str(number) for number in range(11)],
)  # fmt: skip
def test_what_is_no_challenge_is_none(header: str) -> None:
    """The registry's 401 then stands."""
    assert parse_challenge(header) is None


def test_a_token_is_what_a_header_can_hold() -> None:
    """Under either name; anything else would break a request apart."""
    assert parse_token(b'{"token": "abc"}') == parse_token(b'{"access_token": "abc"}') == "abc"
    for data in (b"", b"[]", b"{}", b'{"token": "a\\r\\nb"}', b'{"token": 7}', b'{"token": "a b"}'):
        with pytest.raises(BadManifest):
            parse_token(data)


@given(st.text(max_size=200), st.binary(max_size=200))
def test_any_answer_is_judged_without_a_crash(text: str, data: bytes) -> None:
    """Challenges, manifests and tokens of any content."""
    place = parse_challenge(f'Bearer realm="{text}"')
    assert place is None or place.startswith(("http://", "https://"))
    for judge in (lambda: parse_manifest(data, "x"), lambda: parse_token(data)):
        try:
            judge()
        except (BadManifest, OtherLayers):
            continue
