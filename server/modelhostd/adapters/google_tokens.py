"""Access tokens for ``gs://``, made of a credential file of Google's: a service account's key, or a user's login.

The file names the endpoint that hands out tokens, and is the operator's own: that endpoint may be asked, and
sees a signed statement or the user's refresh token; the private key is never sent. A token lasts an hour.
"""

import math
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib import import_module
from urllib.parse import urlencode

from modelhostd.adapters.cancel import Canceller
from modelhostd.adapters.connections import Connections, Response
from modelhostd.adapters.http_source import lower
from modelhostd.adapters.secret_files import Place, SecretFile, Unreadable, unusable
from modelhostd.adapters.wire import Limits, Transient, bad_reply
from modelhostd.core.google_login import (
    LIFE_S,
    BadLogin,
    Login,
    parse_login,
    parse_refusal,
    parse_token,
)
from modelhostd.core.http_replies import Asked, failure
from modelhostd.core.origins import OriginPolicy, parse_target

SCOPE = "https://www.googleapis.com/auth/devstorage.read_only"
EARLY_S = 300.0
"""A token is renewed before its end: a request with it may take a while to be judged."""
ANSWER_BYTES_MAX = 64 << 10


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
        self._file = SecretFile(place, _parsed)
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
        if response.status in {400, 401, 403}:
            word = parse_refusal(body)
            raise unusable(self.kept_in, f"{origin} refused it{f' ({word})' if word else ''}")
        if response.status != 200:
            asked = Asked(origin, "an access token", has_credential=True)
            error, wait_s, passing = failure(asked, response.status, lower(response), self._now())
            raise Transient(error, wait_s) if passing else error
        try:
            return parse_token(body)
        except BadLogin as error:
            raise bad_reply(origin, str(error)) from None


def _parsed(text: str) -> Login:
    try:
        return parse_login(text)
    except BadLogin as error:
        raise Unreadable(str(error)) from None
