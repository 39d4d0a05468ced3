"""Where a download may connect to: addresses, URLs and origins, judged without a socket."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.origins import (
    Origin,
    OriginPolicy,
    is_public,
    join_url,
    parse_target,
    redacted,
)
from tests.core.attempt import attempt

FORBIDDEN_ADDRESSES = [
    "127.0.0.1", "127.1.2.3", "0.0.0.0", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254",
    "100.64.0.1", "192.0.2.1", "198.18.0.1", "224.0.0.1", "239.1.1.1", "240.0.0.1", "255.255.255.255",
    "::1", "::", "fe80::1", "fe80::1%eth0", "fc00::1", "fd00::1", "ff02::1", "2001:db8::1",
    "::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::7f00:1", "64:ff9b:1::1", "2002:7f00:1::",
    "2001:0:7f00:1::", "::127.0.0.1", "fec0::1", "not an address", "", "1.2.3", "0x7f.1",
]  # fmt: skip
PUBLIC_ADDRESSES = ["8.8.8.8", "1.1.1.1", "2606:4700::1111", "::ffff:8.8.8.8"]

FORBIDDEN_URLS = [
    "file:///etc/passwd", "ftp://host/x", "gopher://x/", "data:text/plain,x", "javascript:alert(1)",
    "//host/x", "host/x", "", "http://", "https:///x", "https://user@host/x", "https://u:p@host/x",
    "https://host:0/x", "https://host:99999/x", "https://host:x/", "https://host /x",
    "https://ho\nst/x", "https://host/x\r\nHost: evil", "https://host/\x00", "https://h\u00f6st/",
    "https://evil%2ehost/", "https://a\\@b/", "https://[::1", "https://" + "a" * 20_000,
    "http+unix://x/", "HTTPS ://x/",
]  # fmt: skip


@pytest.mark.parametrize("address", FORBIDDEN_ADDRESSES)
def test_an_address_that_is_not_public_is_refused(address: str) -> None:
    """Loopback, private, link-local, multicast, mapped and tunnelled forms, and garbage."""
    assert not is_public(address)
    with pytest.raises(ModelhostError) as caught:
        OriginPolicy().with_endpoints("https://huggingface.co").check_address(
            "cdn.example", address, "hf://o/x"
        )
    assert caught.value.reason is Reason.SOURCE_NOT_ALLOWED


@pytest.mark.parametrize("address", PUBLIC_ADDRESSES)
def test_a_public_address_is_allowed(address: str) -> None:
    """For any host."""
    OriginPolicy().with_endpoints("https://huggingface.co").check_address(
        "cdn.example", address, "hf://o/x"
    )


@pytest.mark.parametrize("url", FORBIDDEN_URLS, ids=lambda url: ascii(url[:30]))
def test_a_url_that_is_not_plain_http_is_refused(url: str) -> None:
    """Before a name is looked up."""
    with pytest.raises(ModelhostError) as caught:
        parse_target(url, "hf://o/x")
    assert caught.value.reason is Reason.SOURCE_NOT_ALLOWED
    assert caught.value.message.isprintable()


def test_origins_have_scheme_host_and_port() -> None:
    """What a token is bound to; default ports are filled in, case does not matter."""
    assert parse_target("https://Hub.example/a?b=c", "x").origin == Origin(
        "https", "hub.example", 443
    )
    assert parse_target("http://127.0.0.1:8080", "x").path == "/"
    assert parse_target("https://[2606:4700::1]:8443/x", "x").origin.host == "2606:4700::1"
    assert str(Origin("https", "2606:4700::1", 8443)) == "https://[2606:4700::1]:8443"


def test_the_operators_endpoint_is_allowed_on_any_port_and_nothing_else() -> None:
    """http only if the endpoint is http; the public Hub gets no exception."""
    policy = OriginPolicy().with_endpoints("http://127.0.0.1:8080")
    policy.check_target(parse_target("http://127.0.0.1:9", "x"), "x")
    policy.check_address("127.0.0.1", "127.0.0.1", "x")
    for url in ("http://localhost/x", "http://127.0.0.2/x", "http://example.com/x"):
        with pytest.raises(ModelhostError):
            policy.check_target(parse_target(url, "x"), "x")
    with pytest.raises(ModelhostError):
        policy.check_address("localhost", "127.0.0.1", "x")
    mirror = OriginPolicy().with_endpoints("https://mirror.lan")
    mirror.check_address("mirror.lan", "10.0.0.1", "x")
    with pytest.raises(ModelhostError):
        mirror.check_target(parse_target("http://mirror.lan/x", "x"), "x")
    with pytest.raises(ModelhostError):
        OriginPolicy().with_endpoints("https://huggingface.co").check_address(
            "huggingface.co", "10.0.0.1", "x"
        )


def test_redirects_are_joined_or_refused() -> None:
    """Relative ones stay on their origin; malformed ones are a typed error."""
    assert join_url("https://a/b/c", "/d", "x") == "https://a/d"
    with pytest.raises(ModelhostError) as caught:
        join_url("https://a/b", "http://[", "x")
    assert caught.value.reason is Reason.SOURCE_NOT_ALLOWED


def test_messages_carry_no_signature() -> None:
    """Query, user and fragment are cut from a URL that is shown."""
    shown = redacted("https://user:pass@cdn.example/a/b?signature=SECRET#x")
    assert shown == "https://cdn.example/a/b"


@given(st.text(max_size=100), st.text(max_size=100))
def test_any_text_is_a_target_or_not_allowed(url: str, location: str) -> None:
    """Nothing but SOURCE_NOT_ALLOWED, also behind a redirect."""
    for make in (
        lambda: url,
        lambda: f"https://{url}",
        lambda: join_url("https://a/b", location, "x"),
    ):
        target = attempt(lambda make=make: parse_target(make(), "x"))
        if isinstance(target, ModelhostError):
            assert target.reason is Reason.SOURCE_NOT_ALLOWED
            continue
        assert target.path[0] in "/?"
        assert "\r" not in target.path
        assert " " not in target.path
    redacted(url)
