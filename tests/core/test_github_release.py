"""A GitHub release from its API's answer: what counts, and what is refused."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelhostd.core.github_release import (
    ASSETS_MAX,
    Asset,
    BadRelease,
    parse_release,
    tag_of,
)

HEX = "ab" * 32


def asset(**changes: Any) -> dict[str, Any]:
    """Return an asset as the API has it."""
    one = {"id": 7, "name": "a.gguf", "size": 5, "state": "uploaded", "digest": f"sha256:{HEX}"}
    return {**one, **changes}


def answer(*assets: dict[str, Any], tag: Any = "v1.0") -> bytes:
    """Return a release as the API has it."""
    return json.dumps({"tag_name": tag, "assets": assets}).encode()


def test_an_asset_is_what_the_api_tells() -> None:
    """With its digest, or without for those from before GitHub told them; half uploads are left out."""
    release = parse_release(
        answer(
            asset(),
            asset(name="b.gguf", id=8, digest=None),
            asset(name="c.gguf", id=9, state="starter"),
        )
    )
    assert release.assets == (Asset(7, "a.gguf", 5, HEX), Asset(8, "b.gguf", 5, ""))
    assert tag_of(release.revision) == "v1.0"
    assert tag_of(parse_release(answer(tag="a+b")).revision) == "a+b"


@pytest.mark.parametrize(
    "change", [{"digest": f"sha256:{'cd' * 32}"}, {"size": 6}, {"name": "x"}, {"digest": None}]
)
def test_another_asset_is_another_revision(change: dict[str, Any]) -> None:
    """Also under the same name and tag."""
    assert (
        parse_release(answer(asset())).revision != parse_release(answer(asset(**change))).revision
    )


def test_an_asset_that_was_replaced_without_a_digest_is_another() -> None:
    """Its id tells; with a digest the id does not matter."""
    first, second = (parse_release(answer(asset(digest=None, id=n))) for n in (1, 2))
    assert first.revision != second.revision
    first, second = (parse_release(answer(asset(id=n))) for n in (1, 2))
    assert first.revision == second.revision


@pytest.mark.parametrize(
    "data",
    [
        b"", b"null", b"[]", b"{}", b"\xff", b"[" * 100_000, b'{"tag_name": "v1"}',
        answer(tag=None), answer(tag=""), answer(tag="a\nb"), answer(tag="x" * 300),
        answer(asset(id="7")), answer(asset(id=-1)), answer(asset(id=True)), answer(asset(name="")),
        answer(asset(name=None)), answer(asset(size=-1)), answer(asset(size=1 << 51)),
        answer(asset(size=1.5)), answer(asset(digest=HEX)), answer(asset(digest="md5:00")),
        answer(asset(digest=f"sha256:{HEX.upper()}")), answer(asset(digest=7)),
        answer(asset(), asset(id=8)), b'{"tag_name": "v1", "assets": {"a": 1}}',
        answer(*(asset(name=str(n)) for n in range(ASSETS_MAX + 1))),
    ],
    ids=[str(number) for number in range(26)],
)  # fmt: skip
def test_what_is_no_release_is_refused(data: bytes) -> None:
    """Never a crash, whatever comes."""
    with pytest.raises(BadRelease):
        parse_release(data)


@given(st.recursive(st.none() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.sampled_from(["id", "name", "size", "state", "digest"]), x)))  # fmt: skip
def test_any_json_is_a_release_or_refused(value: Any) -> None:
    """Whatever stands where the assets should be."""
    try:
        parse_release(json.dumps({"tag_name": "v", "assets": value}).encode())
    except BadRelease:
        return
