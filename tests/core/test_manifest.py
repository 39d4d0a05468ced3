"""The manifest: what is written is read back; what is not ours is refused, never half believed."""

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.manifest import Manifest, decode, encode
from modelhostd.core.resources import ModelFile, Source
from tests.core.attempt import attempt

DIGEST = "ab" * 32
MANIFEST = Manifest(
    model="minilm",
    version=3,
    source=Source("hf://org/minilm", "main", ("*.json",), ("x/*",)),
    revision="c" * 40,
    files=(ModelFile("a/b.json", 2, DIGEST), ModelFile("model.safetensors", 10, "cd" * 32)),
    predicted_bytes=8,
    create_time=1_700_000_000.25,
    source_task="sentence-similarity",
    licence="apache-2.0",
    tags=("a", "b"),
    entry={"labels": {"team": "search"}, "config": {"keep_alive_s": 1.5, "list": [1, None, True]}},
)


def test_a_manifest_comes_back_as_it_was() -> None:
    """Every field, files in the order of their paths."""
    assert decode(encode(MANIFEST), "minilm/3") == MANIFEST
    turned = replace(MANIFEST, files=MANIFEST.files[::-1])
    assert encode(turned) == encode(MANIFEST)
    assert MANIFEST.size_bytes == 12


def test_keys_of_a_newer_daemon_are_passed_over() -> None:
    """The format number tells what cannot be read."""
    document = json.loads(encode(MANIFEST))
    assert decode(json.dumps(document | {"new": 1}).encode(), "x") == MANIFEST
    with pytest.raises(ModelhostError, match="format 2"):
        decode(json.dumps(document | {"format": 2}).encode(), "x")


CHANGES: list[dict[str, Any]] = [
    {"model": "../x"},
    {"model": 3},
    {"version": 0},
    {"version": True},
    {"version": 2**40},
    {"source": None},
    {"revision": "x" * 5000},
    {"files": {}},
    {"files": [{"path": "../x", "size_bytes": 1, "sha256": DIGEST}]},
    {"files": [{"path": "a", "size_bytes": -1, "sha256": DIGEST}]},
    {"files": [{"path": "a", "size_bytes": 1, "sha256": DIGEST.upper()}]},
    {"files": [{"path": "a", "size_bytes": 1, "sha256": DIGEST + "\n"}]},
    {"files": [{"path": "a", "size_bytes": 1, "sha256": "../../etc"}]},
    {"files": [{"path": p, "size_bytes": 1, "sha256": DIGEST} for p in ("a", "A")]},
    {"create_time": "now"},
    {"create_time": -1},
    {"tags": "abc"},
    {"entry": []},
    {"predicted_bytes": 1.5},
]


@pytest.mark.parametrize("change", CHANGES, ids=[str(n) for n in range(len(CHANGES))])
def test_a_changed_manifest_is_refused(change: dict[str, Any]) -> None:
    """STORAGE_ERROR names the model and the next step."""
    document = json.loads(encode(MANIFEST)) | change
    with pytest.raises(ModelhostError) as caught:
        decode(json.dumps(document).encode(), "minilm/3")
    assert caught.value.reason is Reason.STORAGE_ERROR
    assert "minilm/3" in caught.value.message


@given(st.binary(max_size=300) | st.integers(0, 900).map(lambda cut: encode(MANIFEST)[:cut]))
def test_any_bytes_are_a_manifest_or_a_storage_error(data: bytes) -> None:
    """A torn file, a foreign one: never another exception."""
    found = attempt(lambda: decode(data, "x"))
    if isinstance(found, ModelhostError):
        assert found.reason is Reason.STORAGE_ERROR
    else:
        assert found == MANIFEST


def test_what_could_not_be_read_back_is_not_written() -> None:
    """An entry of megabytes is refused before it is on disk."""
    with pytest.raises(ModelhostError, match="too large"):
        encode(replace(MANIFEST, entry={"x": "y" * (1 << 20)}))
