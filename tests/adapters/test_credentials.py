"""Credentials: which files are believed, when they are read again, and that nobody is shown one."""

import os
from pathlib import Path

import pytest

from modelhostd.adapters.credentials import (
    ACCEPTED,
    REFUSED,
    UNKNOWN,
    UNUSABLE,
    Credentials,
    Known,
)
from modelhostd.adapters.secret_files import Place
from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.origins import Origin

A = Origin("https", "a.example", 443)
B = Origin("https", "b.example", 443)
TOKEN = "canary_0123456789"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file of credentials as it should be."""
    file = tmp_path / "credentials"
    file.write_text(f"https://a.example {TOKEN}\n")
    file.chmod(0o600)
    return file


def why(credentials: Credentials) -> str:
    """Return why nothing of it can be used; no message shows a token."""
    with pytest.raises(ModelhostError) as caught:
        credentials.for_origin(A)
    (known,) = credentials.known()
    assert caught.value.reason is Reason.AUTHENTICATION_REQUIRED
    assert (known.origin, known.state, known.message) == ("", UNUSABLE, caught.value.message)
    assert TOKEN not in str(caught.value) + repr(known)
    return caught.value.message


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644, 0o610])
def test_a_file_that_others_can_read_is_not_believed(file: Path, mode: int) -> None:
    """Its tokens may be known to anybody: the operator is told before one is used."""
    file.chmod(mode)
    assert "chmod 600" in why(Credentials([Place(file)]))
    # The service manager guards its own files, whose mode shows an access list.
    if not mode & 0o007:
        assert Credentials([Place(file, guarded=True)]).for_origin(A) is not None


@pytest.mark.parametrize(
    "content", [b"\xff\xfe", TOKEN.encode(), b"x" * (1 << 20) + b"yz", f"{TOKEN} https://a".encode()]
)  # fmt: skip
def test_a_file_that_says_nothing_useful_is_an_error(file: Path, content: bytes) -> None:
    """To ask without a token would answer another question."""
    file.write_bytes(content)
    assert str(file) in why(Credentials([Place(file)]))


def test_what_is_no_file_is_an_error(tmp_path: Path) -> None:
    """A folder, a pipe, nothing at all; what is optional may be missing."""
    missing = tmp_path / "missing"
    assert "not there" in why(Credentials([Place(missing)]))
    assert Credentials([Place(missing, required=False)]).for_origin(A) is None
    os.mkfifo(tmp_path / "pipe", 0o600)
    why(Credentials([Place(tmp_path / "pipe")]))
    why(Credentials([Place(tmp_path)]))


def test_a_change_of_the_file_acts_at_once(file: Path) -> None:
    """A token that was exchanged needs no restart; the state of the old one is not the new one's."""
    credentials = Credentials([Place(file)])
    first = credentials.for_origin(A)
    assert first is not None
    first.answered(200)
    assert credentials.known() == (Known("https://a.example", str(file), ACCEPTED),)
    file.write_text("https://a.example another\nhttps://b.example ada secret\n")
    second, third = credentials.for_origin(A), credentials.for_origin(B)
    assert second is not None
    assert third is not None
    assert (second.header, third.header) == ("Bearer another", "Basic YWRhOnNlY3JldA==")
    assert [known.state for known in credentials.known()] == [UNKNOWN, UNKNOWN]


def test_answers_tell_whether_it_is_valid(file: Path) -> None:
    """A 401 is the one refusal of the credential itself; a 403, a 404 and a 503 say nothing of it."""
    credentials = Credentials([Place(file)])
    credential = credentials.for_origin(A)
    assert credential is not None
    states = []
    for status in (503, 404, 206, 403, 401, 500, 302):
        credential.answered(status)
        states += [known.state for known in credentials.known()]
    assert states == [UNKNOWN, UNKNOWN, ACCEPTED, ACCEPTED, REFUSED, REFUSED, ACCEPTED]


def test_variables_win_over_files_and_earlier_files_over_later(file: Path, tmp_path: Path) -> None:
    """And each says where it is kept."""
    later = tmp_path / "later"
    later.write_text("https://a.example x\nhttps://b.example y\nhttps://c.example z\n")
    later.chmod(0o600)
    credentials = Credentials([Place(file), Place(later)], {B: ("B_TOKEN", "from a variable")})
    kept = {known.origin: known.kept_in for known in credentials.known()}
    assert kept == {
        "https://a.example": str(file),
        "https://b.example": "B_TOKEN",
        "https://c.example": str(later),
    }
    # A variable with what no header can hold: nothing of it is sent.
    with pytest.raises(ModelhostError, match="B_TOKEN"):
        credentials.for_origin(B)
    assert [known.state for known in credentials.known()] == [UNKNOWN, UNUSABLE, UNKNOWN]


def test_nothing_shows_a_token(file: Path) -> None:
    """Neither the object nor what it gives, however it is printed."""
    credentials = Credentials([Place(file)], {B: ("B_TOKEN", TOKEN)})
    shown = [credentials, vars(credentials), credentials.for_origin(A), credentials.known()]
    assert TOKEN not in "".join(map(repr, shown)) + "".join(map(str, shown))
