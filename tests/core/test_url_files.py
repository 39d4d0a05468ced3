"""What a URL names: names of files, and lists of files with their checksums."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelhostd.core.url_files import (
    LIST_FILES_MAX,
    BadList,
    Listed,
    beside,
    is_list,
    name_of,
    parse_list,
)

HEX = "ab" * 32
HOST = "https://host.example"


def test_lists_are_known_by_their_name() -> None:
    """As the tools that write them call them; a file of another name is never taken for one."""
    for name in ("SHA256SUMS", "sha256sum.txt", "MD5SUMS", "a.gguf.sha256", "model.sha1sum"):
        assert is_list(name), name
    for name in ("model.safetensors", "sha256", "md5", "SUMS", "a.sha512", "sha256sums.gguf", ""):
        assert not is_list(name), name


def test_a_list_is_read_as_the_tools_write_it() -> None:
    """Text and binary marks, comments, empty lines, `./`, and names with spaces."""
    text = f"# made today\n\n{HEX}  ./a.gguf\n{HEX.upper()} *dir/b c.json\r\n"
    assert parse_list("SHA256SUMS", text) == (
        Listed("a.gguf", f"sha256:{HEX}"),
        Listed("dir/b c.json", f"sha256:{HEX}"),
    )
    assert parse_list("a.gguf.md5", "0" * 32) == (Listed("a.gguf", f"md5:{'0' * 32}"),)


@pytest.mark.parametrize(
    "text",
    [
        "", "# nothing", "<html>login</html>", f"{HEX}", f"{HEX[:-1]}  a", f"{HEX}a", f"{HEX}\ta",
        f"{'0' * 32}  a", f"{HEX}  a\n{HEX}  a", f"{HEX}  a\n{HEX}  ./a", "\x00",
        "\n".join(f"{HEX}  f{n}" for n in range(LIST_FILES_MAX + 1)),
    ],
    ids=[str(number) for number in range(12)],
)  # fmt: skip
def test_what_is_no_list_is_refused(text: str) -> None:
    """Login pages, cut digests, the wrong kind, names twice, too many."""
    with pytest.raises(BadList):
        parse_list("SHA256SUMS", text)


def test_files_are_beside_their_list() -> None:
    """Escaped, on the same origin, whatever their names look like."""
    url = f"{HOST}/m/SHA256SUMS?v=1"
    assert beside(url, "a b/c#d?.json") == f"{HOST}/m/a%20b/c%23d%3F.json?v=1"
    assert beside(url, "@evil.example") == f"{HOST}/m/%40evil.example?v=1"
    assert beside(url, "http:x") == f"{HOST}/m/http%3Ax?v=1"


@pytest.mark.parametrize(
    ("url", "disposition", "final", "name"),
    [
        ("/a.gguf", "", "/b.gguf", "a.gguf"),
        ("/a.gguf?download=1", 'attachment; filename="b.gguf"', "", "a.gguf"),
        ("/api/download/7", 'attachment; filename="b c.safetensors"', "", "b c.safetensors"),
        ("/api/7", "attachment; filename*=UTF-8''%C3%A9.gguf", "", "\u00e9.gguf"),
        ("/api/7", 'attachment; filename="../../etc/b.gguf"', "", "b.gguf"),
        ("/api/7", r'attachment; filename="C:\\x\\b.gguf"', "", "b.gguf"),
        ("/api/7", 'attachment; filename=".."', "", ".."),
        ("/api/7", "", "/signed/c.gguf", "c.gguf"),
        ("/my%20model.gguf", "", "", "my model.gguf"),
        ("/config.json", 'inline; filename="x"', "", "config.json"),
        ("/x", "garbage;;=", "", "x"),
        ("/x", "attachment; filename*=nonsense''%zz", "", "%zz"),
    ],
)  # fmt: skip
def test_names_are_sensible(url: str, disposition: str, final: str, name: str) -> None:
    """The URL's own name where it names weights, else what the server calls it; never a folder."""
    found = name_of(HOST + url, disposition, HOST + final if final else HOST + url)
    assert found == name


@given(st.text(max_size=60), st.text(max_size=60))
def test_any_answer_gives_a_name_without_folders(segment: str, disposition: str) -> None:
    """Nothing raises, and what comes is one segment, judged by ``paths`` afterwards."""
    name = name_of(f"{HOST}/x", f"attachment; filename={disposition}", f"{HOST}/y")
    assert "/" not in name
    assert "\\" not in name
    if is_list(segment):
        try:
            files = parse_list(segment, disposition)
        except BadList:
            return
        assert all(file.checksum for file in files)
