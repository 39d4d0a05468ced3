"""URLs that must not be followed and names that must not become files, and what watches over both."""

import errno
import ipaddress
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from modelhostd.adapters import connections
from modelhostd.adapters.wire import Connection

URLS = [
    # this machine, in every spelling
    "http://127.0.0.1/", "https://127.0.0.1/", "https://127.1/", "https://127.0.1/", "https://0/",
    "https://0.0.0.0/", "https://0x7f000001/", "https://0x7f.1/", "https://0x7f.0.0.0x1/",
    "https://2130706433/", "https://017700000001/", "https://0177.0.0.1/", "https://127.0.0.1./",
    "https://127.255.255.254/", "https://localhost/", "https://LOCALHOST/", "https://localhost./",
    "https://localhost.localdomain/", "https://[::1]/", "https://[::]/", "https://[0:0:0:0:0:0:0:1]/",
    # forms of IPv6 that carry an IPv4 address
    "https://[::ffff:127.0.0.1]/", "https://[::ffff:7f00:1]/", "https://[::ffff:0:127.0.0.1]/",
    "https://[::127.0.0.1]/", "https://[64:ff9b::127.0.0.1]/", "https://[64:ff9b::a00:1]/",
    "https://[64:ff9b:1::7f00:1]/", "https://[2002:7f00:1::]/", "https://[2002:c0a8:101::1]/",
    "https://[2001:0:7f00:1::]/", "https://[::ffff:169.254.169.254]/",
    # private, link-local, shared, reserved, multicast
    "https://10.0.0.1/", "https://10.255.255.255/", "https://172.16.0.1/", "https://172.31.255.255/",
    "https://192.168.0.1/", "https://169.254.169.254/latest/meta-data/", "https://169.254.0.1/",
    "https://100.64.0.1/", "https://192.0.0.1/", "https://192.0.2.1/", "https://198.18.0.1/",
    "https://224.0.0.1/", "https://239.255.255.250/", "https://240.0.0.1/",
    "https://255.255.255.255/", "https://[fe80::1]/", "https://[fe80::1%25eth0]/",
    "https://[fc00::1]/", "https://[fd00:ec2::254]/", "https://[ff02::1]/", "https://[fec0::1]/",
    "https://[2001:db8::1]/", "https://[100::1]/",
    # names that lead there
    "https://metadata.google.internal/", "https://private.example/", "https://mixed.example/",
    "https://rebinding.example/", "https://mapped.example/", "https://ten.example/",
    # other schemes, users, tricks of parsers
    "http://public.example/", "http://public.example:443/", "file:///etc/passwd",
    "file://localhost/etc/passwd", "ftp://public.example/x", "gopher://127.0.0.1:25/",
    "dict://127.0.0.1:11211/", "data:,x", "javascript:alert(1)", "unix:///run/docker.sock",
    "https://user@public.example/", "https://public.example@127.0.0.1/",
    "https://127.0.0.1#@public.example/", "https://127.0.0.1\\@public.example/",
    "https://public.example:80@127.0.0.1/", "https://127.0.0.1%2f@public.example/",
    "https://public.example:0/", "https://public.example:99999/", "https://[::1", "https://]/",
    "https:///etc/passwd", "//127.0.0.1/", "https://127.0.0.1%00.public.example/",
    "https://public.example/\r\nHost: 127.0.0.1", "https://pub\tlic.example/", "https://\u2488\u0030/",
    "https://\u24db\u24de\u24d2\u24d0\u24db\u24d7\u24de\u24e2\u24e3/", "https://x y/",
]  # fmt: skip

HOME = "home.example"
"""The name of the one server that may be asked; it is on loopback."""

RESOLVED = {
    HOME: ["127.0.0.1"],
    "localhost": ["127.0.0.1", "::1"],
    "localhost.localdomain": ["127.0.0.1"],
    "metadata.google.internal": ["169.254.169.254"],
    "private.example": ["192.168.1.1"],
    "mixed.example": ["10.0.0.1", "93.184.216.34"],
    "mapped.example": ["::ffff:10.0.0.1"],
    "ten.example": ["10.1.2.3", "10.1.2.4"],
    "public.example": ["93.184.216.34"],
}
_PUBLIC = "93.184.216.34"

NAMES = [
    "..", ".", "/", "../x.json", "../../x.json", "a/../../x.json", "a/../b.json", "./x.json",
    "a/./x.json", "a//x.json", "/etc/cron.d/x", "//x.json", "/x.json", "a/", "..\\x.json",
    "a\\..\\..\\x.json", "C:\\x.json", "\\\\host\\share\\x.json", "x.json\x00.safetensors", "\x00",
    "a\nb.json", "a\r.json", "a\tb.json", "\x1b[2J.json", "a\x7f.json", "a\x85.json",
    "\u202egpj.json", "a\u200b.json", "a\u2028.json", "\ufeffa.json", "a\u00ad.json",
    "\ue000.json", "\U000e0041.json", " x.json", "x.json ", "x.json.", "a /x.json", "a./x.json",
    "con", "CON.json", "nul", "aux.json", "COM1.json", "lpt9.txt", "dir/prn.json",
    "x" * 241 + ".json", "\u00e9" * 130 + ".json", "/".join(["d"] * 33) + "/x.json",
    "/".join(["d" * 100] * 12) + "/x.json", "CONFIG.json", "Config.Json", "config.json/x.json",
    "model.safetensors/x.json", "MODEL.safetensors", "config\u002ejson\u200d", "con\ufb01g.json\u2060",
    "..../../x.json", "....//x.json", "a/..", "..;/x.json\\", "~/../x.json", "%2e%2e/../x.json",
    "a/\u2024\u2024/../x.json", "x.json/..", "x/\x01",
]  # fmt: skip
"""Hostile by themselves, or beside ``config.json`` and ``model.safetensors``."""


@dataclass
class Watch:
    """Stands where names are looked up and sockets are connected, and remembers."""

    allowed: set[tuple[str, int]] = field(default_factory=set)
    """Address and port that are really connected to."""
    looked_up: list[str] = field(default_factory=list)
    connected: list[tuple[str, int]] = field(default_factory=list)
    """Every address that somebody wanted a connection to, ``allowed`` ones left out."""

    def install(self, monkeypatch: pytest.MonkeyPatch) -> "Watch":
        """Take the places."""
        monkeypatch.setattr(connections.socket, "getaddrinfo", self.resolve)
        monkeypatch.setattr(connections, "Connection", self.connect)
        return self

    @property
    def forbidden(self) -> list[tuple[str, int]]:
        """The connections that should not have been wanted, by a judgement of its own."""
        return [(address, port) for address, port in self.connected if address != _PUBLIC]

    def resolve(self, host: str, port: int, **_: Any) -> Sequence[Any]:
        """Look a name up: here numbers in the system's own way, names by the table above."""
        self.looked_up.append(host)
        name = host.lower().rstrip(".")
        found = list(RESOLVED.get(name, ()))
        if name == "rebinding.example":
            # Public when it is judged, and of this machine when somebody asks again.
            found = [_PUBLIC] if self.looked_up.count(host) == 1 else ["127.0.0.1"]
        if not found:
            try:
                # `127.1` and `0x7f.1` are addresses to the C library, so they are to everybody.
                found = [socket.inet_ntoa(socket.inet_aton(name))]
            except OSError:
                try:
                    found = [str(ipaddress.ip_address(host))]
                except ValueError:
                    raise socket.gaierror(socket.EAI_NONAME, "no such name") from None
        return [
            (
                socket.AF_INET6 if ":" in address else socket.AF_INET,
                socket.SOCK_STREAM,
                6,
                "",
                (address, port),
            )
            for address in found
        ]

    def connect(
        self, canceller: Any, limits: Any, origin: Any, kind: Any, address: Any
    ) -> Connection:
        """Connect where it is allowed; remember and refuse everything else."""
        where = (str(address[0]), int(address[1]))
        if where in self.allowed:
            return Connection(canceller, limits, origin, kind, address)
        # The operator named this host, which allows all of its ports.
        if origin.host != HOME:
            self.connected.append(where)
        raise OSError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))
