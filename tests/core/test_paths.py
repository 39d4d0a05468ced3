"""File names from outside: a table of hostile ones, and what holds for every name that passes."""

import posixpath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.paths import check_path, check_tree, path_fault, path_key, printable

HOSTILE = [
    "",
    "/",
    "/etc/passwd",
    "//etc",
    "..",
    ".",
    "../x",
    "a/../b",
    "a/..",
    "a/./b",
    "./a",
    "a//b",
    "a/",
    "a\\b",
    "..\\x",
    "C:\\x",
    "a\x00b",
    "a\nb",
    "a\rb",
    "a\tb",
    "\x1b[31mred",
    "a\x7fb",
    "a\u202eb",
    "a\u200bb",
    "a\ufeff",
    "a\u2028b",
    "\ud800",
    "a\ue000",
    "\U000e0041",
    " a",
    "a ",
    "a/ b",
    "a.",
    "a./b",
    "con",
    "NUL.txt",
    "aux",
    "x/COM1.json",
    "lpt9",
    "a" * 241,
    "\u00e9" * 121,
    "/".join(["a"] * 33),
    "/".join(["z" * 100] * 11),
    "a/" + "b" * 250,
]
FINE = [
    "config.json",
    "1_Pooling/config.json",
    "model-00001-of-00002.safetensors",
    ".gitattributes",
    "a b.json",
    "t\u00e9st/\u6a21\u578b.json",
    "...a",
    "a..b",
    "~x",
    "%2e%2e/x",
    "-rf",
    "$(x)",
    "'quoted'",
    "/".join(["a"] * 32),
]


@pytest.mark.parametrize("path", HOSTILE, ids=lambda path: ascii(path[:30]))
def test_a_hostile_name_is_refused(path: str) -> None:
    """UNSAFE_FILE names it in a form that cannot break a line, and says why."""
    with pytest.raises(ModelhostError) as caught:
        check_path(path)
    assert caught.value.reason is Reason.UNSAFE_FILE
    assert caught.value.metadata["cause"]
    assert caught.value.message.isprintable()
    assert caught.value.message.isascii()


@pytest.mark.parametrize("path", FINE, ids=ascii)
def test_an_ordinary_name_passes(path: str) -> None:
    """Spaces, dots, quotes and other alphabets are fine."""
    assert check_path(path) == path


@pytest.mark.parametrize(
    "paths",
    [
        ["a", "a"],
        ["a.json", "A.json"],
        ["stra\u00dfe", "STRASSE"],
        ["caf\u00e9", "cafe\u0301"],
        ["a", "a/b"],
        ["a/b", "A"],
        ["a/b/c", "a/b"],
        ["Dir/a", "dir/b"],
        ["ok", "../x"],
    ],
    ids=ascii,
)
def test_names_that_collide_are_refused_together(paths: list[str]) -> None:
    """In either order: equal, equal but for case or form, a file used as a directory."""
    for order in (paths, paths[::-1]):
        with pytest.raises(ModelhostError) as caught:
            check_tree(order)
        assert caught.value.reason is Reason.UNSAFE_FILE


def test_a_tree_of_ordinary_names_passes() -> None:
    """Also with many files in one directory."""
    check_tree(["a/b", "a/c", "a/d/e", "b", "c/a"])


@given(
    st.text(max_size=60)
    | st.lists(st.sampled_from(["a", "..", ".", "", "b c", "\x00"])).map("/".join)
)
def test_what_passes_stays_beneath_its_root(path: str) -> None:
    """A name that passes joins to a path below the root, the same after normalisation."""
    if path_fault(path):
        return
    joined = posixpath.normpath(posixpath.join("/base", path))
    assert joined == f"/base/{path}"
    assert len(path.encode()) <= 1024
    assert path_key(path) == path_key(path.upper()) or path.upper().lower() != path.lower()


@given(st.text())
def test_printable_is_short_plain_ascii(path: str) -> None:
    """Whatever the name, it fits a log line."""
    shown = printable(path)
    assert shown.isascii()
    assert shown.isprintable()
    assert len(shown) <= 160
