"""Tokens by origin, from variables and from files that nobody else can read; shown by none of them.

Files are looked at again when they change, so that a token can be exchanged while the daemon runs.
"""

import os
import stat
import threading
from collections.abc import Mapping, Sequence
from dataclasses import field
from pathlib import Path

from modelhostd.adapters.connections import Credential
from modelhostd.core.credential_file import BadLine, Login, is_secret, parse_credentials
from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.origins import Origin
from modelhostd.core.values import dataclass

FILE_BYTES_MAX = 1 << 20

UNKNOWN, ACCEPTED, REFUSED, UNUSABLE = "UNKNOWN", "ACCEPTED", "REFUSED", "UNUSABLE"


@dataclass(frozen=True, slots=True)
class Place:
    """A file of credentials (see ``core.credential_file``)."""

    path: Path
    guarded: bool = False
    """Whether somebody else keeps readers out (systemd's credentials): its mode is not looked at."""
    required: bool = True
    """Whether it is an error that it is not there."""


@dataclass(frozen=True, slots=True)
class Known:
    """One credential as it may be shown: whose it is and how it did, never what it is."""

    origin: str
    kept_in: str
    """The variable or the file's path."""
    state: str
    """UNKNOWN until an answer came, ACCEPTED, REFUSED by a 401, or UNUSABLE."""
    message: str = ""
    """Why it cannot be used. For a file that cannot be read there is no origin."""


@dataclass(slots=True)
class _Read:
    stamp: tuple[int, ...] = ()
    logins: Mapping[Origin, Login] = field(default_factory=dict)


class Credentials:
    """What is known for each origin. Thread-safe. Variables win over files, earlier files over later."""

    def __init__(
        self,
        places: Sequence[Place] = (),
        variables: Mapping[Origin, tuple[str, ...]] | None = None,
    ) -> None:
        """``variables``: origin -> (the variable's name, the token, and whose it is where that counts)."""
        self._places = tuple(places)
        self._variables = {
            origin: (name, Login(*login)) for origin, (name, *login) in (variables or {}).items()
        }
        self._lock = threading.Lock()
        self._read: dict[Place, _Read] = {}
        self._states: dict[tuple[Origin, Login], str] = {}

    def for_origin(self, origin: Origin) -> Credential | None:
        """Return the credential for an origin as it is now.

        Raises AUTHENTICATION_REQUIRED when a file of credentials or its content cannot be used: to ask
        without a token would answer another question.
        """
        kept_in, login = self._all().get(origin, ("", None))
        if login is None:
            return None
        if not is_secret(login.secret):
            raise _unusable(kept_in, "it holds characters that no token has")
        key = (origin, login)
        return Credential(
            origin, login.secret, login.user, lambda status: self._answered(key, status)
        )

    def known(self) -> Sequence[Known]:
        """Return every credential as it may be shown, by origin; files that cannot be used last."""
        found: dict[Origin, tuple[str, Login]] = {}
        unusable: list[Known] = []
        for place in reversed(self._places):
            kept_in = str(place.path)
            try:
                logins = self._logins(place)
            except ModelhostError as error:
                unusable.append(Known("", kept_in, UNUSABLE, error.message))
            else:
                found.update((origin, (kept_in, login)) for origin, login in logins.items())
        found |= self._variables
        by_origin = sorted(found.items(), key=lambda item: str(item[0]))
        return (*(self._known(origin, *kept) for origin, kept in by_origin), *unusable)

    def _known(self, origin: Origin, kept_in: str, login: Login) -> Known:
        if not is_secret(login.secret):
            return Known(str(origin), kept_in, UNUSABLE, "it holds characters that no token has")
        with self._lock:
            return Known(str(origin), kept_in, self._states.get((origin, login), UNKNOWN))

    def _answered(self, key: tuple[Origin, Login], status: int) -> None:
        state = REFUSED if status == 401 else ACCEPTED if status < 400 else ""
        if state:
            with self._lock:
                self._states[key] = state

    def _all(self) -> dict[Origin, tuple[str, Login]]:
        found: dict[Origin, tuple[str, Login]] = {}
        for place in reversed(self._places):
            shown = str(place.path)
            found.update((origin, (shown, login)) for origin, login in self._logins(place).items())
        return found | self._variables

    def _logins(self, place: Place) -> Mapping[Origin, Login]:
        with self._lock:
            kept = self._read.setdefault(place, _Read())
            try:
                fd = os.open(place.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            except FileNotFoundError:
                if place.required:
                    raise _unusable(str(place.path), "it is not there") from None
                return {}
            except OSError as error:
                raise _unusable(str(place.path), error.strerror or "it cannot be read") from error
            try:
                facts = os.fstat(fd)
                stamp = (facts.st_ino, facts.st_mtime_ns, facts.st_size, facts.st_mode)
                if stamp != kept.stamp:
                    kept.logins = _read(fd, facts, place)
                    kept.stamp = stamp
            finally:
                os.close(fd)
            return kept.logins


def _read(fd: int, facts: os.stat_result, place: Place) -> Mapping[Origin, Login]:
    shown = str(place.path)
    if not stat.S_ISREG(facts.st_mode) or facts.st_size > FILE_BYTES_MAX:
        raise _unusable(shown, "it is no file of credentials")
    if not place.guarded:
        if facts.st_mode & 0o077:
            raise _unusable(shown, "others may read it: chmod 600")
        if facts.st_uid not in {0, os.geteuid()}:
            raise _unusable(shown, "it belongs to another user")
    data = b""
    while more := os.read(fd, FILE_BYTES_MAX + 1 - len(data)):
        data += more
    try:
        return parse_credentials(data.decode("utf-8"))
    except UnicodeDecodeError:
        raise _unusable(shown, "it is no UTF-8") from None
    except BadLine as error:
        raise _unusable(shown, str(error)) from None


def _unusable(kept_in: str, why: str) -> ModelhostError:
    return ModelhostError(
        Reason.AUTHENTICATION_REQUIRED,
        f"{kept_in} cannot be used for credentials: {why}",
        {"source": "", "credential": f"{kept_in} cannot be used"},
    )
