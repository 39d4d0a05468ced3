"""Tokens by origin, from variables and from files that nobody else can read; shown by none of them.

Files are looked at again when they change, so that a token can be exchanged while the daemon runs.
A token that has to be made, out of a key, comes of a Maker.
"""

import threading
from collections.abc import Mapping, Sequence
from typing import Protocol

from modelhostd.adapters.connections import Credential
from modelhostd.adapters.secret_files import Place, SecretFile, Unreadable, unusable
from modelhostd.core.credential_file import BadLine, Login, is_secret, parse_credentials
from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.origins import Origin
from modelhostd.core.values import dataclass

UNKNOWN, ACCEPTED, REFUSED, UNUSABLE = "UNKNOWN", "ACCEPTED", "REFUSED", "UNUSABLE"


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


class Maker(Protocol):
    """Makes the tokens of one origin, and says where from."""

    kept_in: str

    def check(self) -> None:
        """Raise AUTHENTICATION_REQUIRED where it cannot make any, as far as can be told without asking."""

    def token(self) -> str:
        """Return a token; may ask somebody for it. Raises like ``check``, and Transient."""

    def refused(self) -> None:
        """Take note that a token was not taken."""


class Credentials:
    """What is known for each origin. Thread-safe.

    Variables win over files, earlier files over later, and both over what has to be made.
    """

    def __init__(
        self,
        places: Sequence[Place] = (),
        variables: Mapping[Origin, tuple[str, ...]] | None = None,
        makers: Mapping[Origin, Maker] | None = None,
    ) -> None:
        """``variables``: origin -> (the variable's name, the token, and whose it is where that counts)."""
        self._files = [SecretFile(place, _parsed) for place in places]
        self._variables = {
            origin: (name, Login(*login)) for origin, (name, *login) in (variables or {}).items()
        }
        self._makers = dict(makers or {})
        self._lock = threading.Lock()
        self._states: dict[tuple[Origin, Login | None], str] = {}
        """By whose it is; None = a maker's, whatever it has made."""

    def for_origin(self, origin: Origin) -> Credential | None:
        """Return the credential for an origin as it is now.

        Raises AUTHENTICATION_REQUIRED when a file of credentials or its content cannot be used: to ask
        without a token would answer another question. Raises Transient where a token has to be asked for.
        """
        kept_in, login = self._all().get(origin, ("", None))
        if login is None:
            return self._made(origin)
        if not is_secret(login.secret):
            raise unusable(kept_in, "it holds characters that no token has")
        key = (origin, login)
        return Credential(
            origin, login.secret, login.user, lambda status: self._answered(key, status)
        )

    def _made(self, origin: Origin) -> Credential | None:
        maker = self._makers.get(origin)
        if maker is None:
            return None

        def answered(status: int) -> None:
            self._answered((origin, None), status)
            if status == 401:
                maker.refused()

        try:
            token = maker.token()
        except ModelhostError as error:
            if error.reason is Reason.AUTHENTICATION_REQUIRED:
                self._answered((origin, None), 401)
            raise
        return Credential(origin, token, answered=answered)

    def known(self) -> Sequence[Known]:
        """Return every credential as it may be shown, by origin; files that cannot be used last."""
        found: dict[Origin, tuple[str, Login]] = {}
        broken: list[Known] = []
        for file in reversed(self._files):
            kept_in = str(file.place.path)
            try:
                logins = file.value() or {}
            except ModelhostError as error:
                broken.append(Known("", kept_in, UNUSABLE, error.message))
            else:
                found.update((origin, (kept_in, login)) for origin, login in logins.items())
        found |= self._variables
        shown = [self._known(origin, *kept) for origin, kept in found.items()]
        for origin, maker in self._makers.items():
            if origin in found:
                continue
            try:
                maker.check()
            except ModelhostError as error:
                broken.append(Known("", maker.kept_in, UNUSABLE, error.message))
            else:
                shown.append(Known(str(origin), maker.kept_in, self._state((origin, None))))
        return (*sorted(shown, key=lambda known: known.origin), *broken)

    def _known(self, origin: Origin, kept_in: str, login: Login) -> Known:
        if not is_secret(login.secret):
            return Known(str(origin), kept_in, UNUSABLE, "it holds characters that no token has")
        return Known(str(origin), kept_in, self._state((origin, login)))

    def _state(self, key: tuple[Origin, Login | None]) -> str:
        with self._lock:
            return self._states.get(key, UNKNOWN)

    def _answered(self, key: tuple[Origin, Login | None], status: int) -> None:
        state = REFUSED if status == 401 else ACCEPTED if status < 400 else ""
        if state:
            with self._lock:
                self._states[key] = state

    def _all(self) -> dict[Origin, tuple[str, Login]]:
        found: dict[Origin, tuple[str, Login]] = {}
        for file in reversed(self._files):
            shown, logins = str(file.place.path), file.value() or {}
            found.update((origin, (shown, login)) for origin, login in logins.items())
        return found | self._variables


def _parsed(text: str) -> Mapping[Origin, Login]:
    try:
        return parse_credentials(text)
    except BadLine as error:
        raise Unreadable(str(error)) from None
