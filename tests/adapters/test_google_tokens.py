"""Access tokens made of Google's credential files: asked for on loopback, shown to the store, renewed, refused."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gcsfs")

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from google.auth import jwt

from modelhostd.adapters.credentials import ACCEPTED, REFUSED, UNUSABLE, Credentials
from modelhostd.adapters.google_tokens import SCOPE, GoogleTokens
from modelhostd.adapters.secret_files import Place
from modelhostd.adapters.wire import Limits, Transient
from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.google_login import LIFE_S
from modelhostd.core.origins import Origin, OriginPolicy
from tests.adapters.loopback_objects import Answer, LoopbackObjects
from tests.adapters.object_desk import FILES, TOKEN, desk_for, put

CANARY = "canary_5e77e"
GS = Origin("https", "storage.googleapis.com", 443)


@pytest.fixture(scope="module")
def key() -> rsa.RSAPrivateKey:
    """The key of a service account."""
    return rsa.generate_private_key(public_exponent=65537, key_size=2048)


def pem(key: rsa.RSAPrivateKey) -> str:
    """Return the private key as it stands in a file."""
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    ).decode()


@dataclass
class Desk:
    """A store that hands out tokens, too, and a credential file that names it."""

    store: LoopbackObjects
    path: Path
    forms: list[Mapping[str, str]] = field(default_factory=list)
    time: float = 1_800_000_000.0
    answer: Answer | None = None
    """What the endpoint says; None = a token, another one each time."""
    token: str = ""
    """The last one; the first is what ``object_desk`` calls it."""

    def __post_init__(self) -> None:
        self.store.exchange = self._exchange

    def _exchange(self, form: Mapping[str, str]) -> Answer:
        self.forms.append(form)
        if self.answer is not None:
            return self.answer
        self.token = TOKEN + "x" * (len(self.forms) - 1)
        told = {"access_token": self.token, "expires_in": LIFE_S, "token_type": "Bearer"}
        return Answer(data=json.dumps(told).encode())

    def account(self, key: rsa.RSAPrivateKey | None, **told: Any) -> None:
        """Write the key of a service account."""
        facts = {
            "type": "service_account",
            "client_email": "models@project.example",
            "private_key_id": "k1",
            "private_key": pem(key) if key is not None else CANARY,
            "token_uri": f"{self.store.url}/token",
            **told,
        }
        self.write(json.dumps(facts))

    def write(self, text: str) -> None:
        """Write the file as it should be."""
        self.path.write_text(text)
        self.path.chmod(0o600)

    def tokens(self) -> GoogleTokens:
        """Return the maker of this file's tokens."""
        limits = Limits(connect_s=60.0, stall_s=60.0)
        return GoogleTokens(Place(self.path), OriginPolicy(), limits, lambda: self.time)


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    """A private store."""
    with LoopbackObjects(token=TOKEN) as store:
        put(store)
        yield Desk(store, tmp_path / "key.json")


async def test_a_service_accounts_key_opens_a_private_bucket(
    tmp_path: Path, desk: Desk, key: rsa.RSAPrivateKey
) -> None:
    """By one signed statement, for reading alone; the key itself goes nowhere."""
    desk.account(key)
    source = desk_for(tmp_path, desk.store, "gs", maker=desk.tokens())
    await source.fetch("gs://models/tiny")
    assert source.content() == FILES
    (form,) = desk.forms
    assert form["grant_type"] == "urn:ietf:params:oauth:grant-type:jwt-bearer"
    public = key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    claims = jwt.decode(form["assertion"], certs=public, verify=False)  # type: ignore[no-untyped-call]
    jwt.decode(
        form["assertion"],
        certs={"k1": public},
        audience=f"{desk.store.url}/token",
        clock_skew_in_seconds=10**9,
    )  # type: ignore[no-untyped-call]
    assert (claims["iss"], claims["scope"]) == ("models@project.example", SCOPE)
    assert (claims["iat"], claims["exp"]) == (desk.time, desk.time + LIFE_S)
    assert "PRIVATE" not in repr(desk.forms) + repr(desk.store.requests)


async def test_a_users_login_opens_it_as_well(tmp_path: Path, desk: Desk) -> None:
    """What the file says is sent to the endpoint that hands out tokens, never to the store."""
    told = {"client_id": "id", "client_secret": "s", "refresh_token": CANARY}
    told |= {"type": "authorized_user", "token_uri": f"{desk.store.url}/token"}
    desk.write(json.dumps(told))
    source = desk_for(tmp_path, desk.store, "gs", maker=desk.tokens())
    await source.fetch("gs://models/tiny")
    (form,) = desk.forms
    assert form["grant_type"] == "refresh_token"
    assert form["refresh_token"] == CANARY
    assert CANARY not in repr(desk.store.requests)


async def test_a_token_that_nobody_hands_out_for_a_moment_is_waited_for(
    tmp_path: Path, desk: Desk, key: rsa.RSAPrivateKey
) -> None:
    """Whenever one is asked for anew: a download that lasts longer than its token goes on."""

    def every_other(form: Mapping[str, str]) -> Answer:
        desk.forms.append(form)
        told = {"access_token": TOKEN, "expires_in": 1}
        return Answer(data=json.dumps(told).encode()) if len(desk.forms) % 2 else Answer(503)

    desk.account(key)
    desk.store.exchange = every_other
    source = desk_for(tmp_path, desk.store, "gs", maker=desk.tokens())
    await source.fetch("gs://models/tiny")
    assert source.content() == FILES


def test_a_token_is_used_until_shortly_before_its_end(desk: Desk, key: rsa.RSAPrivateKey) -> None:
    """And made anew then, after a refusal, and when another key is in the file."""
    desk.account(key)
    tokens = desk.tokens()
    assert tokens.token() == tokens.token() == TOKEN
    desk.time += LIFE_S - 400
    assert tokens.token() == TOKEN
    desk.time += 200
    assert tokens.token() == TOKEN + "x"
    tokens.refused()
    assert tokens.token() == TOKEN + "xx"
    desk.account(key, private_key_id="k2")
    assert tokens.token() == TOKEN + "xxx"


def test_states_are_shown_and_nothing_else(desk: Desk, key: rsa.RSAPrivateKey) -> None:
    """ACCEPTED and REFUSED as for any credential; who refuses a token has another one made."""
    desk.account(key)
    credentials = Credentials((), {}, {GS: desk.tokens()})
    credential = credentials.for_origin(GS)
    assert credential is not None
    assert credential.token == TOKEN
    for status, state in ((200, ACCEPTED), (401, REFUSED)):
        credential.answered(status)
        (known,) = credentials.known()
        assert (known.origin, known.kept_in, known.state) == (str(GS), str(desk.path), state)
    again = credentials.for_origin(GS)
    assert again is not None
    assert again.token != credential.token
    assert credentials.for_origin(Origin("https", "other.example", 443)) is None
    assert TOKEN not in repr(credentials.known()) + repr(credential)


@pytest.mark.parametrize(
    ("told", "why"),
    [
        ("", "no credential file"),
        ("[" * 100_000, "no credential file"),
        ('{"type": "external_account"}', "neither service_account nor"),
        ('{"type": ["service_account"]}', "neither service_account nor"),
        ('{"type": "service_account", "private_key": "canary_5e77e"}', "no client_email"),
        ('{"type": "authorized_user", "client_id": 1}', "no client_id"),
        (
            '{"type": "authorized_user", "client_id": "i", "client_secret": "\\ud800", "refresh_token": "canary_5e77e"}',
            "client_secret",
        ),
    ],
)
def test_a_file_that_cannot_be_used_is_named(desk: Desk, told: str, why: str) -> None:
    """AUTHENTICATION_REQUIRED before anybody is asked, with why; what it holds is not shown."""
    desk.write(told)
    refused(desk, why)
    assert desk.forms == []


def test_an_address_that_is_none_or_a_key_that_is_none_is_named(
    desk: Desk, key: rsa.RSAPrivateKey
) -> None:
    """As is a file that others can read."""
    desk.account(key, token_uri="file:///etc/passwd")
    refused(desk, "token_uri")
    desk.account(None)
    with pytest.raises(ModelhostError, match="private_key is none") as caught:
        desk.tokens().token()
    assert CANARY not in str(caught.value)
    desk.account(key)
    desk.path.chmod(0o644)
    refused(desk, "chmod 600")
    assert desk.forms == []


def refused(desk: Desk, why: str) -> None:
    """See that nothing comes of the file, and that this is shown."""
    credentials = Credentials((), {}, {GS: desk.tokens()})
    with pytest.raises(ModelhostError, match=why) as caught:
        credentials.for_origin(GS)
    assert caught.value.reason is Reason.AUTHENTICATION_REQUIRED
    (known,) = credentials.known()
    assert (known.kept_in, known.state) == (str(desk.path), UNUSABLE)
    assert CANARY not in str(caught.value) + repr(known)


@pytest.mark.parametrize(
    ("answer", "reason", "text"),
    [
        (Answer(400, b'{"error": "invalid_grant"}'), "AUTHENTICATION_REQUIRED", "invalid_grant"),
        (Answer(401, b"<canary_5e77e>"), "AUTHENTICATION_REQUIRED", "refused it"),
        (Answer(404, b"{}"), "SOURCE_NOT_FOUND", "an access token"),
        (Answer(200, b"{}"), "BAD_SOURCE_REPLY", "no access_token"),
        (Answer(200, b'{"access_token": "a\\nb"}'), "BAD_SOURCE_REPLY", "no access_token"),
        (
            Answer(200, b'{"access_token": "a", "expires_in": NaN}'),
            "BAD_SOURCE_REPLY",
            "expires_in",
        ),
        (Answer(200, b"x" * 100_000), "BAD_SOURCE_REPLY", "more than"),
        (Answer(307, b"", {"Location": "/elsewhere"}), "BAD_SOURCE_REPLY", ""),
        (Answer(503, b""), "NETWORK_ERROR", ""),
        (Answer(429, b""), "RATE_LIMITED", ""),
    ],
)
def test_an_endpoint_that_gives_no_token(
    desk: Desk, key: rsa.RSAPrivateKey, answer: Answer, reason: str, text: str
) -> None:
    """Permanent and passing failures are told apart; a redirect is not followed with what was sent."""
    desk.account(key)
    desk.answer = answer
    credentials = Credentials((), {}, {GS: desk.tokens()})
    with pytest.raises((ModelhostError, Transient)) as caught:
        credentials.for_origin(GS)
    passing = isinstance(caught.value, Transient)
    error = caught.value.error if isinstance(caught.value, Transient) else caught.value
    assert passing == (reason in {"NETWORK_ERROR", "RATE_LIMITED"})
    assert (error.reason.value, text in error.message) == (reason, True), error.message
    assert CANARY not in error.message
    (known,) = credentials.known()
    assert known.state == (REFUSED if reason == "AUTHENTICATION_REQUIRED" else "UNKNOWN")
    assert len(desk.forms) == 1
