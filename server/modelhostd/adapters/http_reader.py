"""One file over HTTP: asked for by ranges, and only an answer that is exactly what was asked for counts."""

import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import field

from modelhostd.adapters.connections import Connections, Credential, Response
from modelhostd.adapters.source import Changed, mismatch
from modelhostd.adapters.wire import Transient, bad_reply
from modelhostd.core.origins import Origin
from modelhostd.core.paths import printable
from modelhostd.core.values import dataclass
from modelhostd.ports import RemoteFile

RENEWALS_MAX = 3
"""Fresh locations in a row that refuse us before the refusal is believed."""

# Digits that int() takes, whatever the server sends.
_CONTENT_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19})")


def no_credential() -> Credential | None:
    """Return no credential."""
    return None


@dataclass(frozen=True, slots=True)
class HttpFile:
    """What a source says of how one of its files is asked for."""

    connections: Connections
    file: RemoteFile
    locate: Callable[[], str]
    """Returns the URL to ask; called again when a location was refused."""
    refused: Callable[[Response], Exception]
    """Returns the error of a status that is no answer: a ModelhostError, or Transient."""
    credential: Callable[[], Credential | None] = no_credential
    """Returns the token as it is now."""
    headers: Mapping[str, str] = field(default_factory=dict)
    home: Origin | None = None
    """Whose refusals are believed at once: a 401 or 403 of another may be a location run out."""
    signed: bool = False
    """Whether a location runs out at home, too."""
    changed: Callable[[Response], Exception | None] = lambda _: None
    """Returns an error when an answer belongs to another version of the file than was planned."""
    if_range: str = ""
    """A strong validator for If-Range; empty where the digest decides."""
    ranges: bool = True
    """False where nothing would tell that two ranges are of the same version."""


class HttpBody:
    """An answer whose first byte is known to be the file's byte ``start``, and its end ``end``."""

    def __init__(self, response: Response, start: int, end: int) -> None:
        self.start = start
        self.end = end
        self._response = response

    def read_into(self, buffer: memoryview) -> int:
        """Read what is there, at most ``len(buffer)``; 0 at the end. Raises Transient."""
        return self._response.read_into(buffer)

    def close(self) -> None:
        """End the connection."""
        self._response.close()


class HttpReader:
    """The attempts at one file; satisfies ``source.Reader``. Thread-safe."""

    def __init__(self, asked: HttpFile) -> None:
        self._asked = asked
        self._lock = threading.Lock()
        self._url = ""
        self._renewals = 0
        self._ranges = asked.ranges
        self._etag = ""

    def open(self, start: int, end: int) -> HttpBody:
        """Ask for the bytes from ``start`` to before ``end``; see ``source.Reader``."""
        asked = self._asked
        url = self._located()
        if not self._ranges:
            start, end = 0, asked.file.size_bytes
        headers = dict(asked.headers)
        part = start > 0 or end < asked.file.size_bytes
        if part:
            headers["Range"] = f"bytes={start}-" + (
                "" if end == asked.file.size_bytes else str(end - 1)
            )
            if asked.if_range:
                headers["If-Range"] = asked.if_range
        response = asked.connections.request("GET", url, headers, credential=asked.credential())
        try:
            ranged = self._judge(response, start, end, url, part=part)
        except BaseException:
            response.close()
            raise
        with self._lock:
            self._renewals = 0
        return HttpBody(response, *((start, end) if ranged else (0, asked.file.size_bytes)))

    def _located(self) -> str:
        """Return the URL to ask; one thread looks it up, the others wait for that."""
        with self._lock:
            if not self._url:
                self._url = self._asked.locate()
            return self._url

    def _judge(self, response: Response, start: int, end: int, url: str, *, part: bool) -> bool:
        """Return whether the body is the range that was asked for (else it is the whole file)."""
        status, file, source = response.status, self._asked.file, self._asked.connections.source
        if status in {200, 206}:
            if (error := self._asked.changed(response)) is not None:
                raise error
            self._same_version(response)
        if status == 206 and part:
            found = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", "").strip())
            got = tuple(map(int, found.groups())) if found else ()
            if got == (start, end - 1, file.size_bytes) and response.length in {None, end - start}:
                return True
            self._ranges = False
            raise Transient(bad_reply(source, "a range that was not asked for"), 0.0)
        if status == 200:
            if response.length not in {None, file.size_bytes}:
                raise mismatch(file, f"{file.size_bytes} bytes", f"{response.length} bytes")
            return False
        if status == 416 and part:
            self._ranges = False
            raise Transient(bad_reply(source, "a range refused that should be there"), 0.0)
        if status == 206:
            raise bad_reply(source, f"a part of {printable(file.path)} where all was asked for")
        error = self._asked.refused(response)
        elsewhere = self._asked.signed or response.origin != (self._asked.home or response.origin)
        if status in {401, 403} and elsewhere and self._run_out(url):
            # A signed location has run out: a fresh one is asked for.
            assert not isinstance(error, Transient), error
            raise Transient(error, 0.0)  # type: ignore[arg-type]
        raise error

    def _run_out(self, url: str) -> bool:
        """Forget a location that was refused; return False when its successors were refused as well.

        Several ranges are refused together when a location runs out: that is one refusal.
        """
        with self._lock:
            if self._url == url:
                if self._renewals >= RENEWALS_MAX:
                    return False
                self._renewals += 1
                self._url = ""
            return True

    def _same_version(self, response: Response) -> None:
        """Raise Changed for an answer whose strong ETag is not that of the answers before.

        Where a digest is known it decides: the nodes of a CDN may have ETags of their own.
        """
        file, etag = self._asked.file, response.headers.get("ETag", "").strip()
        if file.sha256 or file.git_sha1 or file.checksum or not etag.startswith('"'):
            return
        with self._lock:
            changed = self._etag not in {"", etag}
            # After a change the first answer of the new start says which version it is of: this one may
            # have been the odd one out.
            self._etag = "" if changed else etag
        if changed:
            raise Changed
