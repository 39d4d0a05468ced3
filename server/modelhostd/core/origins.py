"""Where a download may connect to: URLs, origins and addresses, judged without a socket.

Two rules. A token belongs to one origin (scheme, host, port) and goes nowhere else. Everything but what
the operator named is https to a public address of a host on the operator's list: names are resolved
once, each address is judged here, and the judged address is the one that is connected to.
"""

import ipaddress
import re
from dataclasses import field, replace
from fnmatch import fnmatchcase
from urllib.parse import urljoin, urlsplit

from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.values import dataclass

URL_CHARS_MAX = 16_384
"""Signed CDN URLs are long; headers of more are refused by the HTTP parser anyway."""

HOSTS_SETTING = "downloads.hosts"
HTTP_SETTING = "downloads.http_hosts"
PRIVATE_SETTING = "downloads.private_hosts"

PUBLIC_ENDPOINTS = frozenset(
    {
        "huggingface.co",
        "api.github.com",
        "oauth2.googleapis.com",
        "registry.ollama.ai",
        "s3.amazonaws.com",
        "storage.googleapis.com",
    }
)
"""Hosts that are nobody's own: their names must resolve to public addresses like all others."""

_DEFAULT_PORTS = {"http": 80, "https": 443}
_NAME = re.compile(r"[a-z0-9_-]([a-z0-9._-]{0,251}[a-z0-9_-])?\.?")
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
    """Which hosts may be asked, each hop of a redirect too. Names are lower-case, without brackets."""

    trusted_hosts: frozenset[str] = field(default_factory=frozenset)
    """May be at any address; the operator's endpoints are among them."""
    http_hosts: frozenset[str] = field(default_factory=frozenset)
    """May be asked without TLS."""
    hosts: tuple[str, ...] = ("*",)
    """Patterns of a shell (``*.example.com``) for all that may be asked; trusted hosts need none."""

    def check_target(self, target: Target, source: str) -> None:
        """Raise SOURCE_NOT_ALLOWED for a host or a scheme that the operator did not allow."""
        origin = target.origin
        listed = origin.host in self.trusted_hosts or origin.host in self.http_hosts
        if not listed and not any(fnmatchcase(origin.host, pattern) for pattern in self.hosts):
            raise not_allowed(source, f"to {origin.host}", HOSTS_SETTING)
        if origin.scheme != "https" and origin.host not in self.http_hosts:
            raise not_allowed(source, f"to {origin.host} without TLS", HTTP_SETTING)

    def check_address(self, host: str, address: str, source: str) -> None:
        """Raise SOURCE_NOT_ALLOWED for an address that is not public, unless the host is trusted."""
        if host not in self.trusted_hosts and not is_public(address):
            what = f"to {host} at {address}, which is not a public address"
            raise not_allowed(source, what, PRIVATE_SETTING)

    def with_endpoints(self, *endpoints: str) -> "OriginPolicy":
        """Return the policy with endpoints of the operator's: their hosts, any port and address; http
        where the endpoint is http. The well-known public ones get no exception for their addresses.
        """
        origins = [parse_target(endpoint, endpoint).origin for endpoint in endpoints]
        own = frozenset(origin.host for origin in origins) - PUBLIC_ENDPOINTS
        plain = frozenset(origin.host for origin in origins if origin.scheme == "http") & own
        return replace(
            self, trusted_hosts=self.trusted_hosts | own, http_hosts=self.http_hosts | plain
        )


def parse_target(url: str, source: str) -> Target:
    """Take a URL from outside apart. Raises SOURCE_NOT_ALLOWED for anything but plain http(s)."""
    if len(url) > URL_CHARS_MAX or not url.isascii() or any(c <= " " or c == "\x7f" for c in url):
        raise not_allowed(
            source, "by a URL with spaces, control or non-ASCII characters, or too long"
        )
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise not_allowed(source, "by a malformed URL") from None
    host = (parts.hostname or "").lower()
    if parts.scheme not in _DEFAULT_PORTS or not host:
        raise not_allowed(source, f"by a URL of scheme {parts.scheme[:20]!r}")
    if "@" in parts.netloc or "\\" in url or "%" in parts.netloc:
        raise not_allowed(source, "by a URL with a user name, an escape or a backslash in its host")
    if port == 0:
        raise not_allowed(source, "by a URL with port 0")
    if not _is_host(host, bracketed="[" in parts.netloc):
        raise not_allowed(source, "by a URL whose host is no name and no address")
    path = parts.path or "/"
    query = f"?{parts.query}" if parts.query else ""
    return Target(Origin(parts.scheme, host, port or _DEFAULT_PORTS[parts.scheme]), path + query)


def _is_host(host: str, *, bracketed: bool) -> bool:
    if not bracketed:
        return _NAME.fullmatch(host) is not None
    try:
        return ipaddress.ip_address(host).version == 6
    except ValueError:
        return False


def join_url(url: str, location: str, source: str) -> str:
    """Return where a redirect of ``url`` leads. Raises SOURCE_NOT_ALLOWED for a malformed one."""
    try:
        return urljoin(url, location)
    except ValueError:
        raise not_allowed(source, "by a malformed redirect") from None


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


def not_allowed(source: str, what: str, setting: str = HOSTS_SETTING) -> ModelhostError:
    """Return SOURCE_NOT_ALLOWED: a connection that the policy forbids, and the setting behind it."""
    return ModelhostError(
        Reason.SOURCE_NOT_ALLOWED,
        f"{source}: refused to connect {what}; only https to public addresses of listed hosts is "
        f"allowed, and what the operator adds ({setting})",
        {"source": source, "setting": setting},
    )
