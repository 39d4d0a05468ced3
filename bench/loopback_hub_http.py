"""The request handlers of ``loopback_hub``: what the Hub and its CDN answer, header by header.

Source: the replies that huggingface_hub 2.4 reads, and https://huggingface.co/docs/hub/api.
"""

import json
import re
import socket
import struct
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar
from urllib.parse import parse_qs, quote, unquote, urlsplit

from bench.loopback_repo import Fault, HubFile, LoggedRequest, Repo

if TYPE_CHECKING:
    from bench.loopback_hub import LoopbackHub

CHUNK_BYTES = 256 << 10
STALL_S_MAX = 120.0


class Handler(BaseHTTPRequestHandler):
    """What both listeners share: faults, ranges, the log, bodies at a rate."""

    hub: ClassVar["LoopbackHub"]
    where: ClassVar[str] = ""
    protocol_version = "HTTP/1.1"
    wbufsize = 0
    disable_nagle_algorithm = True

    def setup(self) -> None:
        """Register the connection, so that stopping the hub ends it."""
        super().setup()
        self.hub.track(self.connection, opened=True)

    def finish(self) -> None:
        """Forget the connection."""
        self.hub.track(self.connection, opened=False)
        try:
            super().finish()
        except OSError:
            self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        """Keep quiet: the log is ``LoopbackHub.requests``."""

    def do_GET(self) -> None:
        """Log the request, then answer it: a client that has its answer finds itself in the log."""
        headers = {key.lower(): value for key, value in self.headers.items()}
        self.logged = LoggedRequest(self.where, self.command, self.path, headers)
        self.hub.log(self.logged)
        try:
            self._answer_with_faults()
        except OSError:
            self.close_connection = True

    do_HEAD = do_GET  # noqa: N815 -- the names http.server calls
    do_POST = do_GET  # noqa: N815

    def answer(self, fault: Fault | None) -> None:
        """Answer one request; subclasses."""
        raise NotImplementedError

    def _answer_with_faults(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(length) if length else b""
        path = unquote(urlsplit(self.path).path)
        fault = self.hub.take_fault(self.where, self.command, path)
        if fault is not None:
            fault.reached.set()
            if fault.gate is not None:
                fault.gate.wait(STALL_S_MAX)
            if fault.delay_s:
                self.hub.stopping.wait(fault.delay_s)
            if fault.drop:
                self._close(reset=fault.reset)
                return
            if fault.status:
                self.reply(fault.status, fault.body or b"", fault.headers)
                return
        self.answer(fault)

    @contextmanager
    def _counted(self, size: int) -> Iterator[None]:
        """Count body bytes before they are sent, and no more when they were not."""
        self.logged.sent += size
        try:
            yield
        except OSError:
            self.logged.sent -= size
            raise

    def _close(self, *, reset: bool) -> None:
        if reset:
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.connection.close()
        else:
            self.connection.shutdown(socket.SHUT_RDWR)
        self.close_connection = True

    def reply(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        """Send a small answer whole."""
        self.logged.status = status
        self.send_response(status)
        names = {name.lower() for name in headers}
        for name, value in headers.items():
            self.send_header(name, value)
        if "content-length" not in names and "transfer-encoding" not in names:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD" and body:
            with self._counted(len(body)):
                self.wfile.write(body)

    def reply_json(self, value: Any, headers: Mapping[str, str] | None = None) -> None:
        """Send JSON."""
        body = json.dumps(value).encode()
        self.reply(200, body, {"Content-Type": "application/json", **(headers or {})})

    def reply_file(self, file: HubFile, headers: Mapping[str, str], fault: Fault | None) -> None:
        """Send a file or the range that was asked for, at the rate and with the fault of the hour."""
        start, end, status = 0, file.size, 200
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if asked and not (fault and fault.ignore_range):
            start = int(asked[1])
            end = min(file.size, int(asked[2]) + 1) if asked[2] else file.size
            status = 206
            if start >= file.size or end <= start:
                self.reply(416, b"", {"Content-Range": f"bytes */{file.size}"})
                return
        out = {"Accept-Ranges": "bytes", "Content-Type": "application/octet-stream", **headers}
        if status == 206:
            out["Content-Range"] = f"bytes {start}-{end - 1}/{file.size}"
        if fault:
            out.update(fault.headers)
            if fault.content_range and status == 206:
                out["Content-Range"] = fault.content_range
            if fault.content_encoding:
                out["Content-Encoding"] = fault.content_encoding
        chunked = bool(fault and fault.chunked)
        out |= {"Transfer-Encoding": "chunked"} if chunked else {"Content-Length": str(end - start)}
        self.logged.status = status
        self.send_response(status)
        for name, value in out.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self._send_body(file, start, end, fault, chunked=chunked)

    def _send_body(
        self, file: HubFile, start: int, end: int, fault: Fault | None, *, chunked: bool
    ) -> None:
        if fault is None and not self.hub.rate and isinstance(file.content, Path):
            with file.content.open("rb") as source, self._counted(end - start):
                self.connection.sendfile(source, start, end - start)
            return
        rate = (fault.rate if fault else 0) or self.hub.rate
        step = max(1, min(CHUNK_BYTES, rate // 20)) if rate else CHUNK_BYTES
        for offset, data in _pieces(file, start, end, step, fault):
            if fault and fault.stall_after is not None and offset - start >= fault.stall_after:
                self._stall()
                return
            if fault and fault.cut_after is not None and offset - start >= fault.cut_after:
                self._close(reset=fault.reset)
                return
            with self._counted(len(data)):
                self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data) if chunked else data)
            if rate:
                self.hub.stopping.wait(len(data) / rate)
        if chunked:
            self.wfile.write(b"0\r\n\r\n")

    def _stall(self) -> None:
        """Say nothing more until the client goes away or the hub stops."""
        deadline = time.monotonic() + STALL_S_MAX
        self.connection.settimeout(0.05)
        while not self.hub.stopping.is_set() and time.monotonic() < deadline:
            try:
                if not self.connection.recv(1):
                    break
            except TimeoutError:
                continue
        self.close_connection = True


def _pieces(
    file: HubFile, start: int, end: int, step: int, fault: Fault | None
) -> Iterator[tuple[int, bytes]]:
    """Yield (offset, bytes), ending exactly where a fault cuts or stalls, and once more there."""
    stop = end
    for limit in (fault.cut_after, fault.stall_after) if fault else ():
        if limit is not None:
            stop = min(stop, start + limit)
    handle = file.content.open("rb") if isinstance(file.content, Path) else None
    try:
        offset = start
        while offset < stop:
            size = min(step, stop - offset)
            if isinstance(file.content, bytes):
                data = file.content[offset : offset + size]
            else:
                assert handle is not None
                handle.seek(offset)
                data = handle.read(size)
            if fault and fault.corrupt_at is not None and 0 <= fault.corrupt_at - offset < size:
                changed = bytearray(data)
                changed[fault.corrupt_at - offset] ^= 1
                data = bytes(changed)
            yield offset, data
            offset += size
        if stop < end:
            yield offset, b""
    finally:
        if handle is not None:
            handle.close()


class CdnHandler(Handler):
    """Bytes by digest behind a signed URL; knows no tokens."""

    where = "cdn"

    def answer(self, fault: Fault | None) -> None:
        """Send a blob, or 403 when the signature has expired."""
        parts = urlsplit(self.path)
        file = self.hub.find_blob(parts.path.strip("/"))
        if file is None:
            self.reply(404, b"", {})
        elif parse_qs(parts.query).get("signature") != [str(self.hub.signature)]:
            self.reply(403, b"<Error><Code>AccessDenied</Code></Error>", {})
        else:
            self.reply_file(file, {"ETag": f'"{file.sha256}"'}, fault)


class HubHandler(Handler):
    """The API and ``resolve``."""

    where = "hub"

    def answer(self, fault: Fault | None) -> None:
        """Route one request."""
        path = unquote(urlsplit(self.path).path)
        if self._token() and self._token() not in self.hub.tokens:
            message = "Invalid credentials in Authorization header"
            self.reply(401, b"", {"X-Error-Message": message})
        elif path == "/api/whoami-v2":
            self.reply_json({"name": "reader", "type": "user"})
        elif match := re.fullmatch(r"/api/models/([^/]+(?:/[^/]+)?)", path):
            self._info(match[1], "main")
        elif match := re.fullmatch(r"/api/models/([^/]+(?:/[^/]+)?)/revision/(.+)", path):
            self._info(match[1], match[2])
        elif match := re.fullmatch(r"/api/models/([^/]+(?:/[^/]+)?)/tree/([^/]+)/?", path):
            self._tree(match[1], match[2])
        elif match := re.fullmatch(r"/([^/]+(?:/[^/]+)?)/resolve/([^/]+)/(.+)", path):
            self._resolve(match[1], match[2], match[3], fault)
        else:
            self.reply(404, b"", {"X-Error-Message": "no such route"})

    def _token(self) -> str:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ")

    def _fail(self, status: int, code: str, message: str, **headers: str) -> None:
        extra = {name.replace("_", "-"): value for name, value in headers.items()}
        self.reply(status, b"", {"X-Error-Code": code, "X-Error-Message": message, **extra})

    def _repo(self, name: str) -> Repo | None:
        """Return a repository that the caller may see, or answer and return None."""
        if (new := self.hub.renames.get(name)) is not None:
            location = self.path.replace(name, new, 1)
            self.reply(307, b"", {"Location": location})
            return None
        repo = self.hub.repos.get(name)
        token = self._token()
        if repo is None or (repo.private and token not in repo.readers):
            self._fail(404 if token else 401, "RepoNotFound", "Repository not found")
            return None
        if repo.disabled:
            self.reply(403, b"", {"X-Error-Message": "Access to this resource is disabled."})
            return None
        return repo

    def _commit(self, repo: Repo, revision: str) -> str | None:
        commit = repo.resolve(revision)
        if commit is None:
            self._fail(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    def _info(self, name: str, revision: str) -> None:
        repo = self._repo(name)
        if repo is None or (commit := self._commit(repo, revision)) is None:
            return
        info = {
            "id": name,
            "modelId": name,
            "sha": commit,
            "private": repo.private,
            "gated": "manual" if repo.gated else False,
            "disabled": False,
            "tags": list(repo.tags),
            "downloads": 1,
            "likes": 0,
            "lastModified": "2026-01-01T00:00:00.000Z",
            "createdAt": "2026-01-01T00:00:00.000Z",
            "cardData": {"license": repo.licence} if repo.licence else {},
            "siblings": [{"rfilename": path} for path in repo.commits[commit]],
        }
        if repo.pipeline_tag:
            info["pipeline_tag"] = repo.pipeline_tag
        self.reply_json(info)

    def _tree(self, name: str, revision: str) -> None:
        repo = self._repo(name)
        if repo is None or (commit := self._commit(repo, revision)) is None:
            return
        query = parse_qs(urlsplit(self.path).query)
        begin = int(query.get("cursor", ["0"])[0])
        files = list(repo.commits[commit].values())
        page = files[begin : begin + self.hub.page_size]
        headers = {}
        if self.hub.next_link:
            headers["Link"] = f'<{self.hub.next_link}>; rel="next"'
        elif begin + len(page) < len(files):
            following = f"{self.hub.endpoint}/api/models/{name}/tree/{quote(revision, safe='')}"
            cursor = begin + len(page)
            headers["Link"] = f'<{following}?recursive=true&cursor={cursor}>; rel="next"'
        self.reply_json([_tree_entry(file) for file in page], headers)

    def _resolve(self, name: str, revision: str, path: str, fault: Fault | None) -> None:
        repo = self._repo(name)
        if repo is None:
            return
        if repo.gated and self._token() not in repo.readers:
            message = f"Access to model {name} is restricted."
            self._fail(403 if self._token() else 401, "GatedRepo", message)
            return
        commit = self._commit(repo, revision)
        if commit is None:
            return
        file = repo.commits[commit].get(path)
        if file is None:
            self._fail(404, "EntryNotFound", "Entry not found", X_Repo_Commit=commit)
            return
        headers = {"X-Repo-Commit": commit}
        if not file.lfs:
            self.reply_file(file, {**headers, "ETag": f'"{file.oid}"'}, fault)
            return
        location = f"{self.hub.cdn}/{file.sha256}?signature={self.hub.signature}"
        linked = {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(file.size)}
        extra = dict(fault.headers) if fault else {}
        self.reply(302, b"", {**headers, **linked, "Location": location, **extra})


def _tree_entry(file: HubFile) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "type": "file",
        "path": file.path,
        "size": file.size,
        "oid": file.oid,
    }
    if file.lfs:
        pointer = {"oid": file.sha256, "size": file.size, "pointerSize": file.pointer_size}
        entry["lfs"] = pointer
    return entry
