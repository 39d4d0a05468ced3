"""Object storage on 127.0.0.1, S3's protocol and Google's JSON API: pages, heads, ranges, keys, a request log.

The S3 half holds each signature (version 4, in headers and in URLs) against one that it computes itself.
"""

import base64
import hashlib
import hmac
import json
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qs, parse_qsl, quote, unquote, urlsplit
from xml.sax.saxutils import escape

EMPTY = hashlib.sha256(b"").hexdigest()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: Any) -> None:
        """Say nothing of clients that went away."""


@dataclass
class Stored:
    """One object. What the store tells of its content is ``headers`` (S3) or ``facts`` (Google)."""

    data: bytes
    etag: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    generation: int = 1
    on_get: Callable[[], None] = lambda: None

    def __post_init__(self) -> None:
        self.etag = self.etag or f'"{hashlib.md5(self.data).hexdigest()}"'


@dataclass(frozen=True)
class Seen:
    """One request, and what became of it."""

    method: str
    path: str
    headers: Mapping[str, str]
    status: int


@dataclass
class Answer:
    """What is sent back."""

    status: int = 200
    data: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


class LoopbackObjects:
    """``objects`` are named ``bucket/key``; with a ``secret`` all is private (S3), with a ``token`` (Google)."""

    def __init__(
        self, *, secret: str = "", access_key: str = "AKIACANARY", token: str = ""
    ) -> None:
        self.objects: dict[str, Stored] = {}
        self.secret, self.access_key, self.token = secret, access_key, token
        self.page_size = 1000
        self.region = "us-east-1"
        self.may_list = True
        self.cuts: list[int] = []
        """The next bodies longer than this are cut after so many bytes."""
        self.requests: list[Seen] = []
        self.answer: Callable[[str, str], Answer | None] = lambda _method, _path: None
        """Asked first; None = serve what is there."""
        self.exchange: Callable[[Mapping[str, str]], Answer] = lambda _form: Answer(404)
        """Answers the forms that are posted: whoever hands out Google's tokens."""
        self._lock = threading.Lock()
        self._server = self._made()

    @property
    def url(self) -> str:
        """Where it is."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def put(self, name: str, data: bytes, **told: Any) -> None:
        """Store an object; Google's tells its MD5 and a generation of its own."""
        before = self.objects.get(name)
        stored = Stored(data, generation=before.generation + 1 if before else 1, **told)
        md5 = base64.b64encode(hashlib.md5(data).digest()).decode()
        stored.facts = {"md5Hash": md5, **stored.facts}
        self.objects[name] = stored

    def seen(self, method: str, part: str = "") -> list[Seen]:
        """Return the requests of one method whose path holds ``part``."""
        return [one for one in self.requests if one.method == method and part in one.path]

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    # --- S3 -------------------------------------------------------------------------------------

    def _s3(self, method: str, path: str, headers: Mapping[str, str]) -> Answer:
        parts = urlsplit(path)
        bucket, _, key = unquote(parts.path[1:]).partition("/")
        query = dict(parse_qsl(parts.query, keep_blank_values=True))
        if (code := self._refusal(method, parts.path, parts.query, headers)) is not None:
            return Answer(403, f"<Error><Code>{code}</Code></Error>".encode())
        if not any(name.startswith(f"{bucket}/") for name in self.objects):
            return Answer(404, b"<Error><Code>NoSuchBucket</Code></Error>")
        if "list-type" in query:
            if not self.may_list:
                return Answer(403, b"<Error><Code>AccessDenied</Code></Error>")
            return Answer(data=self._s3_page(bucket, query), headers={"Content-Type": "text/xml"})
        stored = self.objects.get(f"{bucket}/{key}")
        if stored is None:
            return Answer(404, b"<Error><Code>NoSuchKey</Code></Error>")
        checked = {} if headers.get("x-amz-checksum-mode") != "ENABLED" else stored.headers
        return self._content(stored, headers, checked)

    def _s3_page(self, bucket: str, query: Mapping[str, str]) -> bytes:
        prefix, after = f"{bucket}/{query.get('prefix', '')}", query.get("continuation-token", "")
        names = sorted(n for n in self.objects if n.startswith(prefix) and n > after)
        page = names[: self.page_size]
        entries = "".join(
            f"<Contents><Key>{escape(quote(name.partition('/')[2]))}</Key>"
            f"<LastModified>2026-01-01T00:00:00.000Z</LastModified>"
            f"<ETag>{escape(self.objects[name].etag)}</ETag>"
            f"<Size>{len(self.objects[name].data)}</Size></Contents>"
            for name in page
        )
        more = len(names) > len(page)
        token = f"<NextContinuationToken>{escape(page[-1])}</NextContinuationToken>" if more else ""
        return (
            f"<ListBucketResult><Name>{bucket}</Name><EncodingType>url</EncodingType>"
            f"<IsTruncated>{str(more).lower()}</IsTruncated>{token}{entries}</ListBucketResult>"
        ).encode()

    def _refusal(
        self, method: str, path: str, query: str, headers: Mapping[str, str]
    ) -> str | None:
        """Return the code of what is wrong with a signature; None where nothing is."""
        if not self.secret:
            return None
        asked = {
            name: values[0] for name, values in parse_qs(query, keep_blank_values=True).items()
        }
        scheme = headers.get("authorization", "")
        if scheme.startswith("AWS4-HMAC-SHA256 "):
            told = dict(part.strip().split("=", 1) for part in scheme[17:].split(","))
            signature, credential = told["Signature"], told["Credential"]
            signed, stamp = told["SignedHeaders"], headers["x-amz-date"]
            payload = headers["x-amz-content-sha256"]
        elif "X-Amz-Signature" in asked:
            signature, credential = asked.pop("X-Amz-Signature"), asked["X-Amz-Credential"]
            signed, stamp = asked["X-Amz-SignedHeaders"], asked["X-Amz-Date"]
            payload = "UNSIGNED-PAYLOAD"
        else:
            return "AccessDenied"
        if credential.split("/")[0] != self.access_key:
            return "InvalidAccessKeyId"
        if credential.split("/")[2] != self.region:
            return "AuthorizationHeaderMalformed"
        pairs = sorted((quote(k, safe="-_.~"), quote(v, safe="-_.~")) for k, v in asked.items())
        lines = [method, path, "&".join(f"{k}={v}" for k, v in pairs)]
        lines += [f"{name}:{headers.get(name, '').strip()}" for name in signed.split(";")]
        canonical = "\n".join([*lines, "", signed, payload])
        scope = credential.partition("/")[2]
        digest = hashlib.sha256(canonical.encode()).hexdigest()
        key = f"AWS4{self.secret}".encode()
        for word in scope.split("/"):
            key = hmac.digest(key, word.encode(), "sha256")
        text = f"AWS4-HMAC-SHA256\n{stamp}\n{scope}\n{digest}".encode()
        right = hmac.digest(key, text, "sha256").hex()
        return None if hmac.compare_digest(right, signature) else "SignatureDoesNotMatch"

    # --- Google ----------------------------------------------------------------------------------

    def _google(self, path: str, headers: Mapping[str, str]) -> Answer:
        if self.token and headers.get("authorization") != f"Bearer {self.token}":
            return Answer(401, b'{"error": {"code": 401, "message": "who is that?"}}')
        parts = urlsplit(path)
        query = dict(parse_qsl(parts.query))
        bucket, _, key = parts.path.partition("/storage/v1/b/")[2].partition("/o")
        if not any(name.startswith(f"{bucket}/") for name in self.objects):
            return Answer(404, b'{"error": {"code": 404, "message": "no such bucket"}}')
        if not key:
            page = self._google_page(bucket, query)
            return Answer(
                data=json.dumps(page).encode(), headers={"Content-Type": "application/json"}
            )
        stored = self.objects.get(f"{bucket}/{unquote(key[1:])}")
        if stored is None or query.get("generation", "") not in {"", str(stored.generation)}:
            return Answer(404, b"No such object")
        return self._content(stored, headers, {})

    def _google_page(self, bucket: str, query: Mapping[str, str]) -> dict[str, Any]:
        prefix, after = f"{bucket}/{query.get('prefix', '')}", query.get("pageToken", "")
        names = sorted(n for n in self.objects if n.startswith(prefix) and n > after)
        page = names[: self.page_size]
        items = [
            {
                "kind": "storage#object",
                "name": name.partition("/")[2],
                "bucket": bucket,
                "size": str(len(stored.data)),
                "generation": str(stored.generation),
                **stored.facts,
            }
            for name, stored in ((name, self.objects[name]) for name in page)
        ]
        more = {"nextPageToken": page[-1]} if len(names) > len(page) else {}
        return {"kind": "storage#objects", "items": items, **more}

    # --- both ------------------------------------------------------------------------------------

    def _content(
        self, stored: Stored, headers: Mapping[str, str], told: Mapping[str, str]
    ) -> Answer:
        stored.on_get()
        data, out = stored.data, {"ETag": stored.etag, **told}
        asked = headers.get("range", "")
        if not asked or headers.get("if-range", stored.etag) != stored.etag:
            return Answer(200, data, out)
        start, _, end = asked.removeprefix("bytes=").partition("-")
        last = min(int(end or len(data)), len(data) - 1)
        if int(start) >= len(data):
            return Answer(416, b"", {**out, "Content-Range": f"bytes */{len(data)}"})
        out["Content-Range"] = f"bytes {start}-{last}/{len(data)}"
        return Answer(206, data[int(start) : last + 1], out)

    def _made(self) -> ThreadingHTTPServer:
        store = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def do_GET(self) -> None:
                self.reply("GET")

            def do_HEAD(self) -> None:
                self.reply("HEAD")

            def do_POST(self) -> None:
                sent = self.rfile.read(int(self.headers["Content-Length"]))
                self.reply("POST", store.exchange(dict(parse_qsl(sent.decode()))))

            def reply(self, method: str, answer: Answer | None = None) -> None:
                headers = {name.lower(): value for name, value in self.headers.items()}
                answer = answer or store.answer(method, self.path)
                if answer is None and "/storage/v1/b/" in self.path:
                    answer = store._google(self.path, headers)
                elif answer is None:
                    answer = store._s3(method, self.path, headers)
                with store._lock:
                    store.requests.append(Seen(method, self.path, headers, answer.status))
                self.send_response(answer.status)
                for name, value in answer.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(answer.data)))
                self.end_headers()
                try:
                    data = b"" if method == "HEAD" else answer.data
                    if store.cuts and len(data) > store.cuts[0]:
                        data = data[: store.cuts.pop(0)]
                        self.close_connection = True
                    self.wfile.write(data)
                except OSError:
                    self.close_connection = True

            def log_message(self, *_: Any) -> None:
                pass

        return _Server(("127.0.0.1", 0), Handler)
