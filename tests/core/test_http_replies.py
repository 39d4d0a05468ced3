"""What a plain HTTP source's refusals mean."""

import pytest

from modelhostd.core.errors import Reason
from modelhostd.core.http_replies import Asked, failure

ASKED = Asked("https://a.example/x", "the file 'x'")


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        (400, Reason.BAD_SOURCE_REPLY),
        (401, Reason.AUTHENTICATION_REQUIRED),
        (403, Reason.ACCESS_DENIED),
        (404, Reason.SOURCE_NOT_FOUND),
        (410, Reason.SOURCE_NOT_FOUND),
        (418, Reason.BAD_SOURCE_REPLY),
        (204, Reason.BAD_SOURCE_REPLY),
        (501, Reason.BAD_SOURCE_REPLY),
    ],
)
def test_a_final_status_has_its_reason(status: int, reason: Reason) -> None:
    """And names the source and what was asked for."""
    error, wait_s, passing = failure(ASKED, status, {}, 0.0)
    assert (error.reason, wait_s, passing) == (reason, None, False)
    assert "https://a.example/x" in error.message
    assert "the file 'x'" in error.message


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_a_status_that_may_pass_is_tried_again(status: int) -> None:
    """After what Retry-After asks for."""
    _, wait_s, passing = failure(ASKED, status, {"retry-after": "7"}, 0.0)
    assert (wait_s, passing) == (7.0, True)


@pytest.mark.parametrize(
    ("headers", "wait_s"),
    [
        ({"x-ratelimit-reset": "1060"}, 60.0),
        ({"x-ratelimit-reset": "900"}, 0.0),
        ({"x-ratelimit-reset": "soon"}, None),
        ({"x-ratelimit-reset": "9" * 50}, None),
        ({"retry-after": "3", "x-ratelimit-reset": "1060"}, 3.0),
        ({}, None),
    ],
)
@pytest.mark.parametrize("status", [403, 429])
def test_a_limit_that_is_used_up_says_when_it_is_not(
    status: int, headers: dict[str, str], wait_s: float | None
) -> None:
    """GitHub's way: 403 or 429, nothing left, and the moment of the reset."""
    told = {"x-ratelimit-remaining": "0", **headers}
    error, wait, passing = failure(ASKED, status, told, 1000.0)
    assert (error.reason, wait, passing) == (Reason.RATE_LIMITED, wait_s, True)


def test_a_hint_at_a_credential_is_for_those_without() -> None:
    """Who sent one is told that it was sent, never what it is."""
    without = failure(ASKED, 404, {}, 0.0)[0]
    having = failure(Asked("s", "x", has_credential=True), 404, {}, 0.0)[0]
    assert "credentials" in without.message
    assert "credentials" not in having.message
    assert "is set" in failure(Asked("s", "x", has_credential=True), 401, {}, 0.0)[0].message
