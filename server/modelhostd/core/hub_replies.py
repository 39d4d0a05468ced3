"""What the Hub's refusals mean: status and ``X-Error-Code`` -> a reason, a sentence, what to do next.

The Hub answers 401 to anonymous callers for missing and for private repositories alike, so the message
names both. Statuses that may pass by themselves come back as transient.
"""

import re

from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.transfer import retry_after_seconds
from modelhostd.core.values import dataclass

TRANSIENT_STATUSES = frozenset({408, 429, 500, 502, 503, 504})
BAD_TOKEN = "Invalid credentials in Authorization header"  # noqa: S105 -- a message, no secret
DISABLED = "Access to this resource is disabled."

_RESET = re.compile(r";\s*t=(\d{1,9})")


@dataclass(frozen=True, slots=True)
class Asked:
    """What was asked for, for the messages. ``page`` is where a person can look at the repository."""

    source: str
    page: str
    revision: str = ""
    file: str = ""
    has_token: bool = False

    @property
    def credential(self) -> str:
        """Whether a token was sent; never which."""
        return "HF_TOKEN is set" if self.has_token else "HF_TOKEN is not set"


def transient_error(
    asked: Asked, status: int, retry_after: str | None, rate_limit: str | None, now: float
) -> tuple[ModelhostError, float | None]:
    """Return the error of a status in ``TRANSIENT_STATUSES``, and the seconds the server asks for.

    ``rate_limit`` is the Hub's ``RateLimit`` header: ``"api";r=0;t=55`` (r left, t seconds to reset).
    """
    wait_s = retry_after_seconds(retry_after, now)
    if wait_s is None and status == 429 and rate_limit and (match := _RESET.search(rate_limit)):
        wait_s = float(match[1])
    if status == 429:
        told = f"in {wait_s:g} s" if wait_s is not None else "later"
        return (
            ModelhostError(
                Reason.RATE_LIMITED,
                f"{asked.source}: the source limits requests; try again {told}"
                + ("" if asked.has_token else ", or set HF_TOKEN for a higher limit"),
                {"source": asked.source}
                | ({"retryAfterSeconds": f"{wait_s:g}"} if wait_s is not None else {}),
                retry_delay_s=wait_s,
            ),
            wait_s,
        )
    return (
        ModelhostError(
            Reason.NETWORK_ERROR,
            f"{asked.source}: the source answered {status}; it may pass, download again later, what "
            "was fetched is kept",
            {"source": asked.source, "cause": "server error", "status": str(status)},
            retry_delay_s=wait_s,
        ),
        wait_s,
    )


def refusal(asked: Asked, status: int, code: str, message: str) -> ModelhostError:
    """Return the error of a final 4xx; ``code`` and ``message`` are the Hub's own headers."""
    source = asked.source
    credential = {"source": source, "credential": asked.credential}
    if code == "GatedRepo":
        return ModelhostError(
            Reason.GATED,
            f"{source} is gated: ask for access at {asked.page}, then set HF_TOKEN to a token of that "
            f"account ({asked.credential})",
            credential,
        )
    if message == DISABLED:
        return ModelhostError(
            Reason.ACCESS_DENIED,
            f"{source} is disabled by the Hub; see {asked.page}",
            {"source": source},
        )
    if message == BAD_TOKEN:
        return ModelhostError(
            Reason.AUTHENTICATION_REQUIRED,
            f"{source}: the Hub does not know the token in HF_TOKEN; make a new one or unset it",
            credential,
        )
    if code == "RevisionNotFound":
        return _missing(source, "revision", f"revision '{asked.revision or 'main'}'")
    if code == "EntryNotFound":
        return _missing(source, "file", f"file {ascii(asked.file)[:200]}")
    if code == "RepoNotFound":
        hint = "" if asked.has_token else "; if it is private, set HF_TOKEN"
        return _missing(source, "repository", "the repository", hint)
    if status == 404:
        return _missing(source, "file" if asked.file else "repository", "what was asked for")
    if status == 401:
        return ModelhostError(
            Reason.AUTHENTICATION_REQUIRED,
            f"{source} needs a login: set HF_TOKEN ({asked.credential})",
            credential,
        )
    if status == 403:
        return ModelhostError(
            Reason.ACCESS_DENIED,
            f"{source}: access denied by the source ({asked.credential}); see {asked.page}",
            {"source": source},
        )
    return ModelhostError(
        Reason.BAD_SOURCE_REPLY,
        f"{source}: unusable answer: status {status}; a proxy or mirror may be in the way, check "
        "HF_ENDPOINT",
        {"source": source, "cause": f"status {status}"},
    )


def _missing(source: str, missing: str, what: str, hint: str = "") -> ModelhostError:
    return ModelhostError(
        Reason.SOURCE_NOT_FOUND,
        f"{source}: {what} is not there; check the spelling{hint}",
        {"source": source, "missing": missing},
    )
