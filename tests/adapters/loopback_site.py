"""Two web servers on 127.0.0.1, a home and a CDN on another port: files, ranges, tokens, a request log."""

import hashlib
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self


class _Server(ThreadingHTTPServer):
    def handle_error(self, *_: Any) -> None:
        """Say nothing of clients that went away: that is what they are tested for."""


@dataclass
class Page:
    """What is at one path. Change its fields and the next request sees it."""

    data: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    etag: str | None = None
    """None = one that goes with the data; empty = none."""
    modified: bool = False
    ranges: bool = True
    length: bool = True
    """False: chunked, and no word of its length."""
    token: str = ""
    """The Authorization that is wanted; anything else is a 401."""
    challenge: str = ""
    """The WWW-Authenticate of that 401."""


@dataclass(frozen=True)
class Seen:
    """One request."""

    where: str
    path: str
    headers: Mapping[str, str]
    status: int


class LoopbackSite:
    """Serves ``pages`` (the home's, by path with query) and ``cdn_pages``."""

    def __init__(self) -> None:
        self.pages: dict[str, Page] = {}
        self.cdn_pages: dict[str, Page] = {}
        self.requests: list[Seen] = []
        self.answer: Callable[[str, str], Page | None] = lambda _where, _path: None
        """Asked first; None = look among the pages."""
        self._lock = threading.Lock()
        self._servers = [self._server("home"), self._server("cdn")]

    @property
    def url(self) -> str:
        """Where the home is."""
        return f"http://127.0.0.1:{self._servers[0].server_address[1]}"

    @property
    def cdn(self) -> str:
        """Where the CDN is: another origin by its port."""
        return f"http://127.0.0.1:{self._servers[1].server_address[1]}"

    def seen(self, where: str, part: str = "") -> list[Seen]:
        """Return the requests to one of the servers whose path holds ``part``."""
        return [one for one in self.requests if one.where == where and part in one.path]

    def __enter__(self) -> Self:
        for server in self._servers:
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def _server(self, where: str) -> ThreadingHTTPServer:
        site = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                page = site.answer(where, self.path) or (
                    site.pages if where == "home" else site.cdn_pages
                ).get(self.path, Page(b"not here", 404))
                self.reply(page)

            def reply(self, page: Page) -> None:
                status, data, headers = page.status, page.data, dict(page.headers)
                if page.token and self.headers.get("Authorization", "") != page.token:
                    status, data = 401, b"who is that?"
                    if page.challenge:
                        headers["WWW-Authenticate"] = page.challenge
                etag = page.etag
                if etag is None:
                    etag = f'"{hashlib.md5(page.data).hexdigest()}"'
                if status == 200 and etag:
                    headers["ETag"] = etag
                if status == 200 and page.modified:
                    headers["Last-Modified"] = formatdate(10**9, usegmt=True)
                asked = self.headers.get("Range", "")
                condition = self.headers.get("If-Range", etag)
                if status == 200 and page.ranges and asked and condition == etag:
                    start, _, end = asked.removeprefix("bytes=").partition("-")
                    last = min(int(end or len(data)), len(data) - 1)
                    if int(start) >= len(data):
                        headers["Content-Range"] = f"bytes */{len(data)}"
                        status, data = 416, b""
                    else:
                        headers["Content-Range"] = f"bytes {start}-{last}/{len(data)}"
                        status, data = 206, data[int(start) : last + 1]
                with site._lock:
                    told = {name.lower(): value for name, value in self.headers.items()}
                    site.requests.append(Seen(where, self.path, told, status))
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                if page.length or status != 200:
                    self.send_header("Content-Length", str(len(data)))
                else:
                    self.send_header("Transfer-Encoding", "chunked")
                    data = b"%x\r\n%s\r\n0\r\n\r\n" % (len(data), data) if data else b"0\r\n\r\n"
                self.end_headers()
                try:
                    self.wfile.write(data)
                except OSError:
                    self.close_connection = True

            def log_message(self, *_: Any) -> None:
                pass

        server = _Server(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        return server
