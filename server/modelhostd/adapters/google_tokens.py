"""Access tokens for ``gs://``, made of a credential file of Google's: a service account's key, or a user's login.

The file names the endpoint that hands out tokens, and is the operator's own: that endpoint may be asked, and
sees a signed statement or the user's refresh token; the private key is never sent. A token lasts an hour.
"""

import json
import math
import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import field, replace
from importlib import import_module
from typing import Any
from urllib.parse import urlencode

from modelhostd.adapters.cancel import Canceller
from modelhostd.adapters.connections import Connections, Response
from modelhostd.adapters.http_source import lower
from modelhostd.adapters.secret_files import Place, SecretFile, Unreadable, unusable
from modelhostd.adapters.wire import Limits, Transient, bad_reply
from modelhostd.core.credential_file import is_secret
from modelhostd.core.errors import ModelhostError
from modelhostd.core.http_replies import Asked, failure
from modelhostd.core.origins import OriginPolicy, parse_target
from modelhostd.core.values import dataclass

TOKEN_ENDPOINT = "https://oauth2.googleapis.com/token"  # noqa: S105 - an address
SCOPE = "https://www.googleapis.com/auth/devstorage.read_only"
LIFE_S = 3600
EARLY_S = 300.0
"""A token is renewed before its end: a request with it may take a while to be judged."""
ANSWER_BYTES_MAX = 64 << 10

_ERROR = re.compile(r"[a-z_]{1,40}")


@dataclass(frozen=True, slots=True)
class Login:
    """What a file says: how tokens are asked for."""

    endpoint: str
    fields: Mapping[str, str] = field(repr=False)
    """Of a service account ``client_email``, ``private_key`` and its id; of a user's login what is sent."""
    signs: bool = True


class GoogleTokens:
    """Makes the tokens of one file; satisfies ``credentials.Maker``. Thread-safe, blocking."""

    def __init__(
        self,
        place: Place,
        policy: OriginPolicy,
        limits: Limits,
        now: Callable[[], float] = time.time,
    ) -> None:
        self.kept_in = str(place.path)
        self._file = SecretFile(place, parse_login)
        self._policy = policy
        self._limits = limits
        self._now = now
        self._lock = threading.Lock()
        self._made_of: Login | None = None
        self._token = ""
        self._until = -math.inf

    def check(self) -> None:
        """Raise AUTHENTICATION_REQUIRED where the file cannot be used; nobody is asked."""
        self._file.value()

    def token(self) -> str:
        """Return a token that is good for minutes yet.

        Raises AUTHENTICATION_REQUIRED, BAD_SOURCE_REPLY, SOURCE_NOT_ALLOWED, or Transient.
        """
        with self._lock:
            login = self._file.value()
            assert login is not None
            if login is not self._made_of or self._now() >= self._until - EARLY_S:
                self._token, life_s = self._asked(login)
                self._made_of, self._until = login, self._now() + life_s
            return self._token

    def refused(self) -> None:
        """Forget the token: whom it was shown to did not take it."""
        with self._lock:
            self._made_of = None

    def _asked(self, login: Login) -> tuple[str, float]:
        origin = parse_target(login.endpoint, self.kept_in).origin
        policy = self._policy.with_endpoints(login.endpoint)
        policy = replace(policy, hosts=(*policy.hosts, origin.host))
        connections = Connections(policy, self._limits, Canceller(), str(origin))
        try:
            body = urlencode(self._assertion(login) if login.signs else login.fields).encode()
            headers = {"Content-Type": "application/x-www-form-urlencoded", "Accept": "*/*"}
            response = connections.request("POST", login.endpoint, headers, body=body, redirects=0)
            return self._judged(str(origin), response, response.read_all(ANSWER_BYTES_MAX))
        finally:
            connections.close()

    def _assertion(self, login: Login) -> Mapping[str, str]:
        now = int(self._now())
        claims = {
            "iss": login.fields["client_email"],
            "scope": SCOPE,
            "aud": login.endpoint,
            "iat": now,
            "exp": now + LIFE_S,
        }
        try:
            signer = import_module("google.auth.crypt").RSASigner.from_service_account_info(
                dict(login.fields)
            )
            signed = import_module("google.auth.jwt").encode(signer, claims)
        except ImportError:
            raise unusable(self.kept_in, "google-auth is not installed") from None
        except Exception:
            # Whatever a library says of a key may hold some of it.
            raise unusable(self.kept_in, "its private_key is none") from None
        grant = "urn:ietf:params:oauth:grant-type:jwt-bearer"
        return {"grant_type": grant, "assertion": signed.decode("ascii")}

    def _judged(self, origin: str, response: Response, body: bytes) -> tuple[str, float]:
        try:
            told: Any = json.loads(body)
        except ValueError:
            told = None
        told = told if isinstance(told, dict) else {}
        if response.status in {400, 401, 403}:
            word = told.get("error")
            said = f" ({word})" if isinstance(word, str) and _ERROR.fullmatch(word) else ""
            raise unusable(self.kept_in, f"{origin} refused it{said}")
        if response.status != 200:
            asked = Asked(origin, "an access token", has_credential=True)
            error, wait_s, passing = failure(asked, response.status, lower(response), self._now())
            raise Transient(error, wait_s) if passing else error
        token, life_s = told.get("access_token"), told.get("expires_in", LIFE_S)
        if not (isinstance(token, str) and is_secret(token)):
            raise bad_reply(origin, "no access_token")
        if not (isinstance(life_s, int | float) and 0 < life_s <= 24 * LIFE_S):
            raise bad_reply(origin, "an expires_in that no token has")
        return token, float(life_s)


def parse_login(text: str) -> Login:
    """Return what a file of Google's says. Raises Unreadable."""
    try:
        told: Any = json.loads(text)
    except (ValueError, RecursionError):
        told = None
    if not isinstance(told, dict):
        raise Unreadable("it is no credential file of Google's (JSON)")
    kind = told.get("type")
    names = {
        "service_account": ("client_email", "private_key", "private_key_id"),
        "authorized_user": ("client_id", "client_secret", "refresh_token"),
    }.get(kind if isinstance(kind, str) else "")
    if names is None:
        raise Unreadable(
            "its type is neither service_account nor authorized_user; give an access token instead "
            "($GOOGLE_OAUTH_ACCESS_TOKEN, or a line in downloads.credentials)"
        )
    endpoint = told.get("token_uri", TOKEN_ENDPOINT)
    if missing := [n for n in names if not (isinstance(told.get(n), str) and told[n])]:
        raise Unreadable(f"it has no {missing[0]}")
    try:
        parse_target(endpoint if isinstance(endpoint, str) else "", "token_uri")
    except ModelhostError:
        raise Unreadable("its token_uri is no address of http(s)") from None
    fields = {name: told[name] for name in names}
    if kind == "service_account":
        return Login(endpoint, fields)
    return Login(endpoint, {"grant_type": "refresh_token", **fields}, signs=False)
