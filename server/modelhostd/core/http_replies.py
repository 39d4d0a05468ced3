"""What a plain HTTP source's refusals mean: status and headers -> a reason, a sentence, what to do next.

For sources without a protocol of their own for errors; the Hub's are in ``hub_replies``.
"""

from collections.abc import Mapping

from modelhostd.core import hub_replies
from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.values import dataclass

TRANSIENT_STATUSES = hub_replies.TRANSIENT_STATUSES


@dataclass(frozen=True, slots=True)
class Asked:
    """What was asked for, for the messages."""

    source: str
    what: str
    """In a few words, with a name that is printable: ``the file 'a.gguf'``."""
    has_credential: bool = False
    """Whether a token went with the question; never which."""
    credential_hint: str = "give a credential in downloads.credentials"
    """How a token is given for this source."""


def failure(
    asked: Asked, status: int, headers: Mapping[str, str], now: float
) -> tuple[ModelhostError, float | None, bool]:
    """Return the error of a status that is no answer, the seconds to wait, and whether it may pass.

    ``headers`` have lower-case names; ``now`` is seconds since the epoch.
    """
    limited = status in {403, 429} and headers.get("x-ratelimit-remaining", "").strip() == "0"
    if limited or status in TRANSIENT_STATUSES:
        wait = headers.get("retry-after")
        if limited and wait is None:
            wait = _until(headers.get("x-ratelimit-reset", ""), now)
        told = hub_replies.Asked(asked.source, "", has_token=True)
        error, wait_s = hub_replies.transient_error(
            told, 429 if limited else status, wait, headers.get("ratelimit"), now
        )
        return error, wait_s, True
    return _refusal(asked, status), None, False


def _until(reset: str, now: float) -> str | None:
    """Return the seconds to a moment given in seconds since the epoch, as a Retry-After has them."""
    reset = reset.strip()
    if not (reset.isascii() and reset.isdigit() and len(reset) < 12):
        return None
    return str(max(0, int(reset) - int(now)))


def _refusal(asked: Asked, status: int) -> ModelhostError:
    source = asked.source
    credential = "a credential is set" if asked.has_credential else "no credential is set"
    if status in {404, 410}:
        return ModelhostError(
            Reason.SOURCE_NOT_FOUND,
            f"{source}: {asked.what} is not there; check the spelling"
            + ("" if asked.has_credential else f"; if it is private, {asked.credential_hint}"),
            {"source": source, "missing": "file"},
        )
    if status == 401:
        return ModelhostError(
            Reason.AUTHENTICATION_REQUIRED,
            f"{source} needs a login for {asked.what} ({credential}); {asked.credential_hint}",
            {"source": source, "credential": credential},
        )
    if status == 403:
        return ModelhostError(
            Reason.ACCESS_DENIED,
            f"{source}: access to {asked.what} is denied by the source ({credential})",
            {"source": source},
        )
    return ModelhostError(
        Reason.BAD_SOURCE_REPLY,
        f"{source}: unusable answer: status {status} for {asked.what}; a proxy or mirror may be in "
        "the way, check the endpoint",
        {"source": source, "cause": f"status {status}"},
    )
