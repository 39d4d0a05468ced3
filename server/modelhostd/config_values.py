"""Values of the configuration as people write them, and the error that a wrong one gets."""

import ipaddress
import math
import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from modelhostd.core.values import dataclass

EXIT_CODE = 78
"""EX_CONFIG of sysexits.h: a service manager need not try again."""

UNIX_PATH_MAX = 107
"""Bytes of a unix socket's path on Linux (sun_path less its NUL)."""

_UNITS = {
    "": 1,
    "b": 1,
    **{f"{letter}ib": 1024**power for power, letter in enumerate("kmgt", start=1)},
    **{f"{letter}b": 1000**power for power, letter in enumerate("kmgt", start=1)},
}
_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([a-z]*)")
_HOST = re.compile(r"[a-z0-9*?_:-][a-z0-9*?._:-]{0,252}")
_TRUE = frozenset({"true", "yes", "on", "1"})
_FALSE = frozenset({"false", "no", "off", "0"})
_TOKEN_SHOWN = 60


class ConfigError(Exception):
    """A setting that the daemon cannot start with: which, what is wrong with it, what to do.

    ``key`` is dotted (``limits.max_connections``), ``origin`` where the value stands (a file and line,
    a variable, a flag). ``str()`` is one line. The process exits with ``exit_code``.
    """

    exit_code = EXIT_CODE

    def __init__(self, key: str, message: str, origin: str = "") -> None:
        self.key = key
        self.message = message
        self.origin = origin
        super().__init__(f"{origin}: {message}" if origin else message)


class Expected(Exception):
    """Raised by a parser: what the value should have been, in words that follow "expected"."""


@dataclass(frozen=True, slots=True)
class Secret:
    """Text that no log line, error or event shows."""

    value: str

    def __repr__(self) -> str:
        return "Secret(***)"

    __str__ = __repr__


@dataclass(frozen=True, slots=True)
class Address:
    """Where to listen: ``host`` and ``port``, or a unix socket's ``path``."""

    host: str = ""
    port: int = 0
    path: Path | None = None

    def __str__(self) -> str:
        if self.path is not None:
            return f"unix:{self.path}"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def shown(value: object) -> str:
    """Return ``value`` for an error message: quoted, at most 60 characters."""
    text = repr(value)
    return text if len(text) <= _TOKEN_SHOWN else text[: _TOKEN_SHOWN - 3] + "..."


def text(value: Any) -> str:
    """Return a text without control characters."""
    if not isinstance(value, str) or not value.isprintable():
        raise Expected("a text of printable characters")
    return value


def word(value: Any) -> str:
    """Return a text in lower case."""
    return text(value).lower()


def boolean(value: Any) -> bool:
    """Return true, yes, on, 1 or their opposites."""
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in _TRUE | _FALSE:
        return value.lower() in _TRUE
    raise Expected("true or false")


def whole(value: Any) -> int:
    """Return a whole number, from a number or its text."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str) and re.fullmatch(r"-?[0-9]{1,18}", value):
        return int(value)
    raise Expected("a whole number")


def seconds(value: Any) -> float:
    """Return a finite number of seconds, not negative."""
    if isinstance(value, str) and re.fullmatch(r"[0-9]{1,12}(\.[0-9]{1,9})?", value):
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise Expected("a number of seconds")
    if value < 0:
        raise Expected("a number of seconds, 0 or more")
    return float(value)


def seconds_or_never(value: Any) -> float | None:
    """Return seconds, or None for ``"never"``."""
    if value == "never":
        return None
    try:
        return seconds(value)
    except Expected as error:
        raise Expected(f'{error} or "never"') from None


def size_or_auto(value: Any) -> int | None:
    """Return bytes, or None for ``"auto"``."""
    if value == "auto":
        return None
    try:
        return size(value)
    except Expected as error:
        raise Expected(f'{error} or "auto"') from None


def size(value: Any) -> int:
    """Return bytes: a whole number, or a text such as ``4GiB``, ``512 MiB``, ``10GB``."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    match = _SIZE.fullmatch(value.strip().lower()) if isinstance(value, str) else None
    if match is None or match[2] not in _UNITS or len(match[1]) > 20:
        raise Expected("a number of bytes, or a text such as 4GiB, 512MiB or 10GB")
    return (
        int(float(match[1]) * _UNITS[match[2]])
        if "." in match[1]
        else (int(match[1]) * _UNITS[match[2]])
    )


def absolute(value: Any) -> Path:
    """Return an absolute path; ``~`` and ``~user`` at its beginning are replaced."""
    if not isinstance(value, str | os.PathLike) or not os.fspath(value):
        raise Expected("an absolute path")
    written = os.fspath(value)
    if not isinstance(written, str) or "\0" in written:
        raise Expected("an absolute path without a NUL")
    try:
        path = Path(written).expanduser()
    except RuntimeError:
        raise Expected("an absolute path; whose home that is cannot be told") from None
    if not path.is_absolute():
        raise Expected(f"an absolute path (perhaps {Path.cwd() / path})")
    return path


def texts(value: Any) -> tuple[str, ...]:
    """Return a list of texts; in a variable or flag they are separated by commas."""
    if isinstance(value, str):
        value = [part.strip() for part in value.split(",") if part.strip()]
    if not isinstance(value, list | tuple):
        raise Expected("a list of texts")
    return tuple(text(part) for part in value)


def absolutes(value: Any) -> tuple[Path, ...]:
    """Return a list of absolute paths; in a variable or flag they are separated by commas."""
    return tuple(absolute(part) for part in texts(value))


def hosts(value: Any) -> tuple[str, ...]:
    """Return a list of host names, addresses or patterns such as ``*.example.com``, in lower case."""
    found = tuple(part.lower().strip("[]") for part in texts(value))
    if not all(_HOST.fullmatch(part) for part in found):
        raise Expected(
            "host names or patterns such as *.example.com, without scheme, port and path"
        )
    return found


def host_names(value: Any) -> tuple[str, ...]:
    """Return a list of host names and addresses, in lower case: what opens a door names it in full."""
    found = hosts(value)
    if any(set(part) & set("*?") for part in found):
        raise Expected("whole host names, without patterns")
    return found


def endpoint(value: Any) -> str:
    """Return the URL of a service: scheme, host, perhaps port and path."""
    url = text(value).rstrip("/")
    try:
        parts = urlsplit(url)
        named = bool(parts.hostname) and parts.port != 0
    except ValueError:
        named = False
    if not named or parts.scheme not in {"http", "https"} or "@" in url or set(url) & set("?# \\"):
        raise Expected("a URL such as https://host or https://host:port/path")
    return url


def endpoints(value: Any) -> tuple[str, ...]:
    """Return a list of URLs of services; in a variable or flag they are separated by commas."""
    return tuple(endpoint(part) for part in texts(value))


def sizes_by_name(value: Any) -> dict[str, int]:
    """Return name -> bytes; in a variable or flag ``cpu=8GiB,cuda-0=20GiB``."""
    if isinstance(value, str):
        parts = [part.partition("=") for part in value.split(",") if part.strip()]
        value = {name.strip(): number for name, _, number in parts}
    if not isinstance(value, dict):
        raise Expected("a table of sizes by device")
    found = {}
    for name, number in value.items():
        if not re.fullmatch(r"cpu|(cuda|sim)-\d{1,3}|(GPU|MIG)-[0-9a-f-]{8,64}", name):
            raise Expected(f"a device (cpu, cuda-0, sim-0, GPU-uuid), not {shown(name)}")
        found[name] = size(number)
        if not found[name]:
            raise Expected(f"at least 1 byte for {name}")
    return found


def address(value: Any) -> Address:
    """Return ``HOST:PORT``, ``[IPV6]:PORT`` or ``unix:/PATH`` as an address.

    Anything but loopback is refused: there is no TLS and no authentication yet.
    """
    if not isinstance(value, str):
        raise Expected("HOST:PORT or unix:/PATH")
    if value.startswith("unix:"):
        return Address(path=socket_path(re.sub(r"\A//+(?=/)", "", value.removeprefix("unix:"))))
    host, separator, port = value.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise Expected("HOST:PORT, an IPv6 address in brackets: [::1]:7411")
    if not separator or not host or not re.fullmatch(r"[0-9]{1,5}", port) or int(port) > 65535:
        raise Expected("HOST:PORT with a port from 0 to 65535, or unix:/PATH")
    if not is_loopback(host):
        raise Expected(
            "a loopback address or a unix socket: without TLS and authentication, which this version "
            "does not have, nothing else is served (from another machine: ssh -L "
            "7411:127.0.0.1:7411)"
        )
    return Address(host=host, port=int(port))


def http_address(value: Any) -> str:
    """Return ``HOST:PORT`` where HTTP is served, or an empty text (also for ``"off"``) for nowhere."""
    if value in ("", "off"):
        return ""
    if isinstance(value, str) and value.startswith("unix:"):
        raise Expected('HOST:PORT, or "off"')
    return str(address(value))


def is_loopback(host: str) -> bool:
    """Tell whether a host is this machine only: a loopback address or ``localhost``."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def socket_path(value: Any) -> Path:
    """Return the absolute path of a unix socket, which may have at most 107 bytes."""
    path = absolute(value)
    length = len(os.fsencode(path))
    if length > UNIX_PATH_MAX:
        raise Expected(
            f"a unix path of at most {UNIX_PATH_MAX} bytes, and {path} has {length}; a shorter "
            "runtime_dir or home makes it shorter"
        )
    return path
