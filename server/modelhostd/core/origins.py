"""Where a download may connect to: URLs, origins and addresses, judged without a socket.

Two rules. A token belongs to one origin (scheme, host, port) and goes nowhere else. Everything but an
endpoint that the operator set is https to a public address: names are resolved once, each address is
judged here, and the judged address is the one that is connected to.
"""

import ipaddress
from dataclasses import dataclass, field
from urllib.parse import urljoin, urlsplit

from modelhostd.core.errors import ModelhostError, Reason

URL_CHARS_MAX = 16_384
"""Signed CDN URLs are long; headers of more are refused by the HTTP parser anyway."""

_DEFAULT_PORTS = {"http": 80, "https": 443}
# is_global calls these global, and each can carry a private address inside.
_TUNNELS = tuple(
    ipaddress.ip_network(net)
    for net in ("64:ff9b::/96", "64:ff9b:1::/48", "2002::/16", "2001::/32", "::/96", "fec0::/10")
)


@dataclass(frozen=True, slots=True)
class Origin:
    """Scheme, host and port: what a token is bound to. The host is lower-case, without brackets."""

    scheme: str
    host: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        port = "" if self.port == _DEFAULT_PORTS[self.scheme] else f":{self.port}"
        return f"{self.scheme}://{host}{port}"


@dataclass(frozen=True, slots=True)
class Target:
    """A URL to ask: its origin, and path with query as they go into the request line."""

    origin: Origin
    path: str


@dataclass(frozen=True, slots=True)
class OriginPolicy:
    """Which hosts may be asked. ``trusted_hosts`` are those the operator set: any port, any address;
    http only where ``http_hosts`` has them too.
    """

    trusted_hosts: frozenset[str] = field(default_factory=frozenset)
    http_hosts: frozenset[str] = field(default_factory=frozenset)

    def check_target(self, target: Target, source: str) -> None:
        """Raise SOURCE_NOT_ALLOWED for http to a host that the operator did not allow."""
        origin = target.origin
        if origin.scheme != "https" and origin.host not in self.http_hosts:
            raise not_allowed(source, f"plain http to {origin.host}")

    def check_address(self, host: str, address: str, source: str) -> None:
        """Raise SOURCE_NOT_ALLOWED for an address that is not public, unless the host is trusted."""
        if host not in self.trusted_hosts and not is_public(address):
            raise not_allowed(source, f"{host} at {address}, which is not a public address")


def policy_for(endpoint: str, http_hosts: frozenset[str] = frozenset()) -> OriginPolicy:
    """Return the policy with an endpoint of the operator's: its host, any port; http if it is http.

    The public Hub gets no exception: its names must resolve to public addresses like all others.
    """
    origin = parse_target(endpoint, endpoint).origin
    hosts = frozenset({origin.host}) if origin.host != "huggingface.co" else frozenset()
    plain = hosts if origin.scheme == "http" else frozenset()
    return OriginPolicy(trusted_hosts=hosts | http_hosts, http_hosts=plain | http_hosts)


def parse_target(url: str, source: str) -> Target:
    """Take a URL from outside apart. Raises SOURCE_NOT_ALLOWED for anything but plain http(s)."""
    if len(url) > URL_CHARS_MAX or not url.isascii() or any(c <= " " or c == "\x7f" for c in url):
        raise not_allowed(source, "a URL with spaces, control or non-ASCII characters, or too long")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise not_allowed(source, "a malformed URL") from None
    host = (parts.hostname or "").lower()
    if parts.scheme not in _DEFAULT_PORTS or not host:
        raise not_allowed(source, f"a URL of scheme {parts.scheme[:20]!r}")
    if "@" in parts.netloc or "\\" in url or "%" in parts.netloc:
        raise not_allowed(source, "a URL with a user name, an escape or a backslash in its host")
    if port == 0:
        raise not_allowed(source, "a URL with port 0")
    path = parts.path or "/"
    query = f"?{parts.query}" if parts.query else ""
    return Target(Origin(parts.scheme, host, port or _DEFAULT_PORTS[parts.scheme]), path + query)


def join_url(url: str, location: str, source: str) -> str:
    """Return where a redirect of ``url`` leads. Raises SOURCE_NOT_ALLOWED for a malformed one."""
    try:
        return urljoin(url, location)
    except ValueError:
        raise not_allowed(source, "a malformed redirect") from None


def is_public(address: str) -> bool:
    """Tell whether an IP address is global unicast, looking into mapped and tunnelled forms."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(parsed, ipaddress.IPv6Address):
        if parsed.ipv4_mapped is not None:
            return is_public(str(parsed.ipv4_mapped))
        if parsed.scope_id or any(parsed in net for net in _TUNNELS):
            return False
    return parsed.is_global and not parsed.is_multicast and not parsed.is_reserved


def redacted(url: str) -> str:
    """Return a URL without user, query and fragment, cut, for messages: signatures are secrets."""
    try:
        parts = urlsplit(url)
        shown = f"{parts.scheme}://{parts.hostname or ''}{parts.path}"
    except ValueError:
        return "(malformed URL)"
    shown = ascii(shown)[1:-1]
    return shown if len(shown) <= 200 else shown[:197] + "..."


def not_allowed(source: str, what: str) -> ModelhostError:
    """Return SOURCE_NOT_ALLOWED: a connection that the policy forbids, and the setting behind it."""
    return ModelhostError(
        Reason.SOURCE_NOT_ALLOWED,
        f"{source}: refused to follow {what}; only https to public addresses is allowed, and the "
        "endpoint that the operator sets (HF_ENDPOINT)",
        {"source": source, "setting": "HF_ENDPOINT"},
    )
