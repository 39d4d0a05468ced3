"""What the sources in object storage share: fsspec plans, the bytes are ours.

A library of fsspec's (``s3fs``, ``gcsfs``; extras) asks what there is, with our own connections as its
wires: one policy for addresses, redirects, credentials and limits. It is run in the caller's thread, in
a loop of its own that ends with the question, so that nothing of it is left running.
"""

import asyncio
import importlib
import logging
import time
from abc import abstractmethod
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import replace
from glob import escape
from typing import Any, TypeVar
from urllib.parse import unquote

from modelhostd.adapters.blobs import Stopped
from modelhostd.adapters.cancel import Canceller
from modelhostd.adapters.connections import Connections, Credential, Response
from modelhostd.adapters.http_reader import HttpFile, HttpReader
from modelhostd.adapters.http_source import HttpSource, HttpSourceConfig, lower, revision_of
from modelhostd.adapters.source import LISTED_FILES_MAX
from modelhostd.adapters.wire import Transient, bad_reply
from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.http_replies import Asked, failure
from modelhostd.core.object_facts import below
from modelhostd.core.origins import parse_target
from modelhostd.core.paths import check_path, printable
from modelhostd.core.resources import Source
from modelhostd.core.selection import select
from modelhostd.core.sources import scheme_of
from modelhostd.core.values import dataclass
from modelhostd.ports import RemoteFile, SourceFacts

PAGE_BYTES_MAX = 16 << 20
"""A page of a listing has at most a thousand objects, of a kilobyte each."""
REQUESTS_MAX = 2_000
"""Requests of one plan: pages, and one question for each file."""
SIZE_MAX = 1 << 50
ONE_OBJECT = "object-"
"""What the revision begins with where a source names one object, and no folder of them."""

_LIBRARIES = ("aiobotocore", "botocore", "fsspec", "gcsfs", "google", "s3fs", "urllib3")
# Ours to set, or bound to one connection.
_NOT_SENT = frozenset({"host", "connection", "accept-encoding", "content-length", "user-agent"})

T = TypeVar("T")


class Elsewhere(Exception):
    """A bucket is in another region than it was asked for in: ``args[0]``."""


@dataclass(frozen=True, slots=True)
class Listed:
    """One object of a listing. ``name`` is ``bucket/key``."""

    name: str
    size_bytes: int
    facts: Mapping[str, Any]
    """What else the library tells of it."""


@dataclass
class Wires:
    """Sends the requests that a library makes for one question."""

    store: "ObjectStore"
    connections: Connections
    source: Source
    credential: Credential | None
    """Shown to its origin; None where the library signs the requests itself."""
    signed: Credential | None = None
    """What the library signs with: told how it did."""
    requests_left: int = REQUESTS_MAX

    async def send(
        self, method: str, url: str, headers: Mapping[str, str]
    ) -> tuple[Response, bytes]:
        """Send one request and return its answer, read up. Raises Transient or the refusal."""
        self.requests_left -= 1
        if self.requests_left < 0:
            raise bad_reply(self.source.uri, f"a listing of more than {REQUESTS_MAX} requests")
        return await asyncio.to_thread(self._send, method, url, headers)

    def _send(self, method: str, url: str, headers: Mapping[str, str]) -> tuple[Response, bytes]:
        out = {name: value for name, value in headers.items() if name.lower() not in _NOT_SENT}
        out |= {"User-Agent": self.store.config.transfer.user_agent}
        # A signature is for one URL, and what else goes along for one origin: no redirects.
        response = self.connections.request(
            method, url, out, credential=self.credential, redirects=0
        )
        body = response.read_all(PAGE_BYTES_MAX)
        status = self.store.judged(response, body)
        if self.signed is not None:
            self.signed.answered(status)
        if status not in {200, 206}:
            shown = (self.credential or self.signed) is not None
            asked = Asked(self.source.uri, "what it names", has_credential=shown)
            error, wait_s, passing = failure(asked, status, lower(response), time.time())
            raise Transient(error, wait_s) if passing else error
        return response, body


class ObjectStore(HttpSource):
    """The common half of ``source.SourceAdapter`` for one store."""

    def __init__(self, config: HttpSourceConfig, endpoint: str) -> None:
        super().__init__(config)
        self.endpoint = endpoint.rstrip("/")
        self._policy = config.policy.with_endpoints(endpoint)
        self.home = parse_target(self.endpoint, endpoint).origin

    def connections(self, canceller: Canceller, source: Source) -> Connections:
        """Return the connections of one transfer."""
        return Connections(self._policy, self.config.transfer.limits, canceller, source.uri)

    def plan(
        self, connections: Connections, source: Source, *, allow_unsafe: bool = False
    ) -> SourceFacts:
        """List what is below the prefix, or the one object; the revision is a digest of what is told."""
        name = place_of(source)
        found: dict[str, Listed] = {}
        for listed in self.listed(connections, source):
            if path := below(listed.name, name):
                found[check_path(path, source.uri)] = listed
            if len(found) > LISTED_FILES_MAX:
                raise bad_reply(source.uri, f"more than {LISTED_FILES_MAX} files")
        if not found:
            raise ModelhostError(
                Reason.SOURCE_NOT_FOUND,
                f"{source.uri}: there is no object of this name and none below it; check the spelling",
                {"source": source.uri, "missing": "file"},
            )
        one = {listed.name for listed in found.values()} == {name}
        chosen = select(
            tuple(found),
            # Who names one object means that one, of whatever kind; what is unsafe is still refused.
            source.allow_patterns or (tuple(map(escape, found)) if one else ()),
            source.ignore_patterns,
            allow_unsafe=allow_unsafe,
            source=source.uri,
        )
        wanted = {path: found[path] for path in chosen.chosen}
        for path, listed in wanted.items():
            if not 0 <= listed.size_bytes < SIZE_MAX:
                raise bad_reply(source.uri, f"a size of {printable(path)} that nothing has")
        files = self.described(connections, source, wanted)
        return SourceFacts(
            source=source,
            revision=(ONE_OBJECT if one else "") + revision_of(files),
            files=tuple(files),
            skipped=chosen.skipped,
        )

    @abstractmethod
    def listed(self, connections: Connections, source: Source) -> Sequence[Listed]:
        """Return the objects below a source's prefix, or the one of its name."""

    @abstractmethod
    def described(
        self, connections: Connections, source: Source, wanted: Mapping[str, Listed]
    ) -> Sequence[RemoteFile]:
        """Return what the store tells of the objects that are wanted, by path."""

    @abstractmethod
    def locate(self, source: Source, name: str, file: RemoteFile) -> str:
        """Return the URL of an object's bytes; a fresh one each time where it is signed."""

    def judged(self, response: Response, body: bytes) -> int:
        """Return the status of an answer, as it is to be understood."""
        return response.status

    def shown(self, source: Source) -> Credential | None:
        """Return what goes with a request for bytes; None where the URL is signed."""
        return self.credential(self.endpoint, source)

    def signs(self, source: Source) -> bool:
        """Whether the URLs of objects are signed, and run out."""
        return False

    def reader(
        self, connections: Connections, source: Source, revision: str, file: RemoteFile
    ) -> HttpReader:
        """Return the reader of one object; no token is asked for before its first request."""
        etag = file.validator if file.validator.startswith('"') else ""
        digest = file.sha256 or file.checksum

        def changed(response: Response) -> ModelhostError | None:
            found = response.headers.get("ETag", "").strip()
            if digest or not etag or found in {"", etag}:
                return None
            cause = f"{printable(file.path)} changed since the download began"
            return bad_reply(source.uri, cause)

        def refused(response: Response) -> Exception:
            has_credential = self.credential(self.endpoint, source) is not None
            what = f"the object {printable(file.path)}"
            return self.refused(
                response, source, what, response.origin, has_credential=has_credential
            )

        return HttpReader(
            HttpFile(
                connections,
                file,
                lambda: self.locate(source, object_name(source, revision, file), file),
                refused,
                credential=lambda: self.shown(source),
                headers=self.headers(),
                home=self.home,
                signed=self.signs(source),
                changed=changed,
                if_range=etag,
                ranges=bool(digest or file.validator),
            )
        )


def answered(source: Source, question: Coroutine[Any, Any, T]) -> T:
    """Return what a library's coroutine returns. Raises what the wires raised, else BAD_SOURCE_REPLY."""
    try:
        return asyncio.run(question)
    except (ModelhostError, Transient, Stopped, Elsewhere):
        raise
    except Exception as error:
        # The library's own words may hold what it was sent.
        raise bad_reply(source.uri, f"it makes no sense ({type(error).__name__})") from None


def place_of(source: Source) -> str:
    """``s3://bucket/a%20b`` -> ``bucket/a b``."""
    return unquote(source.uri.partition("://")[2])


def object_name(source: Source, revision: str, file: RemoteFile) -> str:
    """Return the ``bucket/key`` of a file of a plan: below the prefix, or the one object itself."""
    place = place_of(source)
    return place if revision.startswith(ONE_OBJECT) else f"{place}/{file.path}"


def with_digest(file: RemoteFile, digest: str) -> RemoteFile:
    """Return a file with the digest that its store tells, ``kind:digits`` or nothing."""
    if digest.startswith("sha256:"):
        return replace(file, sha256=digest.removeprefix("sha256:"))
    return replace(file, checksum=digest)


def library(name: str, source: Source) -> Any:
    """Import a library of an extra and keep it quiet. Raises UNIMPLEMENTED where it is not installed."""
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        scheme = scheme_of(source)
        raise ModelhostError(
            Reason.UNIMPLEMENTED,
            f"{source.uri}: {scheme}:// needs {error.name or name}, which is not installed; run "
            f"`pip install 'modelhost[server,{scheme}]'` in the daemon's environment and restart it",
            {"method": "DownloadModel"},
        ) from None
    for noisy in _LIBRARIES:
        # At DEBUG they write headers, with what is in them.
        logging.getLogger(noisy).setLevel(logging.ERROR)
    return module
