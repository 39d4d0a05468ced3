"""Google's credential files and what its token endpoint answers, taken apart; no message shows what they hold."""

import json
import re
from collections.abc import Mapping
from dataclasses import field
from typing import Any

from modelhostd.core.credential_file import is_secret
from modelhostd.core.errors import ModelhostError
from modelhostd.core.origins import parse_target
from modelhostd.core.values import dataclass

TOKEN_ENDPOINT = "https://oauth2.googleapis.com/token"  # noqa: S105 - an address
LIFE_S = 3600
"""Seconds that a token lasts where its answer does not say."""
LIFE_MAX_S = 24 * LIFE_S

_ERROR = re.compile(r"[a-z_]{1,40}")
_FIELDS: Mapping[object, tuple[str, ...]] = {
    "service_account": ("client_email", "private_key", "private_key_id"),
    "authorized_user": ("client_id", "client_secret", "refresh_token"),
}


class BadLogin(ValueError):
    """A file or an answer that cannot be used; ``str()`` says why."""


@dataclass(frozen=True, slots=True)
class Login:
    """What a file says: how tokens are asked for."""

    endpoint: str
    fields: Mapping[str, str] = field(repr=False)
    """Of a service account ``client_email``, ``private_key`` and its id; of a user's login what is sent."""
    signs: bool = True


def parse_login(text: str) -> Login:
    """Return what a credential file says. Raises BadLogin."""
    told = _object(text)
    if told is None:
        raise BadLogin("it is no credential file of Google's (JSON)")
    kind = told.get("type")
    names = _FIELDS.get(kind if isinstance(kind, str) else "")
    if names is None:
        raise BadLogin(
            "its type is neither service_account nor authorized_user; give an access token instead "
            "($GOOGLE_OAUTH_ACCESS_TOKEN, or a line in downloads.credentials)"
        )
    fields = {name: told[name] for name in names if isinstance(told.get(name), str) and told[name]}
    for name in names:
        if name not in fields:
            raise BadLogin(f"it has no {name}")
        if not fields[name].isascii():
            raise BadLogin(f"its {name} has characters that none has")
    endpoint = told.get("token_uri", TOKEN_ENDPOINT)
    try:
        parse_target(endpoint if isinstance(endpoint, str) else "", "token_uri")
    except ModelhostError:
        raise BadLogin("its token_uri is no address of http(s)") from None
    if kind == "service_account":
        return Login(endpoint, fields)
    return Login(endpoint, {"grant_type": "refresh_token", **fields}, signs=False)


def parse_token(body: bytes) -> tuple[str, float]:
    """Return a token and the seconds that it lasts. Raises BadLogin."""
    told = _object(body) or {}
    token, life_s = told.get("access_token"), told.get("expires_in", LIFE_S)
    if not (isinstance(token, str) and is_secret(token)):
        raise BadLogin("no access_token")
    if not (isinstance(life_s, int | float) and 0 < life_s <= LIFE_MAX_S):
        raise BadLogin("an expires_in that no token has")
    return token, float(life_s)


def parse_refusal(body: bytes) -> str:
    """Return the word that a refusal has for its cause; empty where it has none."""
    word = (_object(body) or {}).get("error")
    return word if isinstance(word, str) and _ERROR.fullmatch(word) else ""


def _object(text: str | bytes) -> Mapping[str, Any] | None:
    try:
        told: Any = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return told if isinstance(told, dict) else None
