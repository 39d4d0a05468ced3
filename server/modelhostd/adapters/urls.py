"""``https://`` sources: one file, several by a URL each, or a list of files with their checksums.

A file is asked for its first byte to learn its size: unlike HEAD that works where a URL is signed for
GET. What has neither a digest nor a strong validator is fetched in one stream, because nothing would
tell that two ranges are of the same version.
"""

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from glob import escape
from urllib.parse import urldefrag

from modelhostd.adapters.connections import Connections, Response
from modelhostd.adapters.http_reader import HttpFile, HttpReader
from modelhostd.adapters.http_source import HttpSource, revision_of
from modelhostd.adapters.wire import bad_reply
from modelhostd.core.errors import ModelhostError
from modelhostd.core.origins import parse_target
from modelhostd.core.paths import check_path, check_tree, printable, unsafe_path
from modelhostd.core.resources import Source
from modelhostd.core.selection import Selection, select
from modelhostd.core.url_files import (
    LIST_BYTES_MAX,
    BadList,
    beside,
    is_list,
    name_of,
    parse_list,
)
from modelhostd.core.values import dataclass
from modelhostd.ports import RemoteFile, SourceFacts

MEASURED_BYTES_MAX = 64 << 20
"""A body without a length is read once to learn it; beyond this somebody should say it."""
SIZE_MAX = 1 << 50


@dataclass(frozen=True, slots=True)
class _Probe:
    """What the first byte of a file told."""

    size_bytes: int
    validator: str
    name: str


class Urls(HttpSource):
    """Sources of the ``https`` and ``http`` schemes; satisfies ``source.SourceAdapter``."""

    def plan(
        self, connections: Connections, source: Source, *, allow_unsafe: bool = False
    ) -> SourceFacts:
        """Ask for the file, or for the list and each of its files that is chosen.

        One attempt; the revision is a digest of what is told of the files.
        """
        parse_target(source.uri, source.uri)
        url, fragment = urldefrag(source.uri)
        checksum = fragment.replace("=", ":")
        if source.more_uris:
            files, chosen = self._each(connections, source, allow_unsafe=allow_unsafe)
        elif is_list(_last(url)):
            named, chosen = self._listed(connections, source, url, checksum, allow_unsafe)
            files = self._measured_files(connections, source, lambda path: beside(url, path), named)
        else:
            probe = self._probe(connections, source, url)
            file = _with_checksum(RemoteFile(check_path(probe.name, source.uri), 0), checksum)
            chosen = _chosen((file.path,), source, allow_unsafe=allow_unsafe, named=True)
            files = (_as_found(file, probe),)
        return SourceFacts(
            source=source,
            revision=revision_of(files),
            files=files,
            skipped=chosen.skipped,
        )

    def reader(
        self, connections: Connections, source: Source, revision: str, file: RemoteFile
    ) -> HttpReader:
        """Return the reader of one file."""
        base = urldefrag(source.uri).url
        url = beside(base, file.path) if is_list(_last(base)) else base
        if source.more_uris:
            url = _by_name(source)[file.path][0]
        home = parse_target(url, source.uri).origin
        etag = file.validator if file.validator.startswith('"') else ""
        digest = file.sha256 or file.checksum

        def changed(response: Response) -> ModelhostError | None:
            found = _validator(response)
            if digest or not file.validator or found in {"", file.validator}:
                return None
            cause = f"{printable(file.path)} changed since the download began"
            return bad_reply(source.uri, cause)

        def refused(response: Response) -> Exception:
            has_credential = self.credential(url, source) is not None
            what = f"the file {printable(file.path)}"
            return self.refused(response, source, what, home, has_credential=has_credential)

        return HttpReader(
            HttpFile(
                connections,
                file,
                lambda: url,
                refused,
                credential=lambda: self.credential(url, source),
                headers=self.headers(),
                home=home,
                changed=changed,
                if_range=etag,
                ranges=bool(digest or etag),
            )
        )

    def _each(
        self, connections: Connections, source: Source, *, allow_unsafe: bool
    ) -> tuple[tuple[RemoteFile, ...], Selection]:
        """Return the files of several URLs, each under the last segment of its own."""
        named = _by_name(source)
        chosen = _chosen(tuple(named), source, allow_unsafe=allow_unsafe, named=True)
        files = [_with_checksum(RemoteFile(path, 0), named[path][1]) for path in chosen.chosen]
        urls = {path: url for path, (url, _) in named.items()}
        return self._measured_files(connections, source, urls.__getitem__, files), chosen

    def _listed(
        self,
        connections: Connections,
        source: Source,
        url: str,
        checksum: str,
        allow_unsafe: bool,
    ) -> tuple[Sequence[RemoteFile], Selection]:
        """Return the files of a list that are chosen, and why the others are not."""
        data = self.small(
            connections,
            source,
            url,
            "the list",
            LIST_BYTES_MAX,
            credential=self.credential(url, source),
        )
        kind, _, digits = checksum.partition(":")
        if checksum and hashlib.new(kind, data, usedforsecurity=False).hexdigest() != digits:
            raise bad_reply(source.uri, f"the list has another {kind} than the source names")
        try:
            listed = parse_list(_last(url), data.decode("utf-8"))
        except UnicodeDecodeError:
            raise bad_reply(source.uri, "a list that is no text") from None
        except BadList as error:
            raise bad_reply(source.uri, f"a list with {error}") from None
        checksums = {check_path(file.path, source.uri): file.checksum for file in listed}
        chosen = _chosen(tuple(checksums), source, allow_unsafe=allow_unsafe, named=False)
        files = [_with_checksum(RemoteFile(path, 0), checksums[path]) for path in chosen.chosen]
        return files, chosen

    def _measured_files(
        self,
        connections: Connections,
        source: Source,
        locate: Callable[[str], str],
        named: Sequence[RemoteFile],
    ) -> tuple[RemoteFile, ...]:
        """Return the files with their sizes: asked side by side, since each costs a round trip."""

        def measured(file: RemoteFile) -> RemoteFile:
            return _as_found(file, self._probe(connections, source, locate(file.path)))

        pool = ThreadPoolExecutor(self.files_at_once, thread_name_prefix="probe")
        try:
            return tuple(pool.map(measured, named))
        finally:
            # The first failure is the answer: what was not asked yet is not asked.
            pool.shutdown(cancel_futures=True)

    def _probe(self, connections: Connections, source: Source, url: str) -> _Probe:
        """Ask for a file's first byte, or for all of it where its size is not told otherwise."""
        credential = self.credential(url, source)
        response = connections.request(
            "GET", url, {**self.headers(), "Range": "bytes=0-0"}, credential=credential
        )
        size = _size(response)
        if size is None and response.status not in {200, 206, 416}:
            what = f"the file {printable(_last(url))}"
            home = parse_target(url, source.uri).origin
            has_credential = credential is not None
            error = self.refused(response, source, what, home, has_credential=has_credential)
            response.skip()
            raise error
        if size is None and response.status == 200:
            size = _measured(response, source)
        else:
            response.skip()
        if size is None or not 0 <= size < SIZE_MAX:
            raise bad_reply(source.uri, "an answer that does not say how long the file is")
        disposition = response.headers.get("Content-Disposition", "")
        return _Probe(size, _validator(response), name_of(url, disposition, response.url))


def _by_name(source: Source) -> dict[str, tuple[str, str]]:
    """Return name -> (URL, checksum) of a source of several URLs. Raises UNSAFE_FILE."""
    named: dict[str, tuple[str, str]] = {}
    for uri in (source.uri, *source.more_uris):
        url, fragment = urldefrag(uri)
        name = check_path(name_of(url, "", url), source.uri)
        if name in named:
            raise unsafe_path(name, "two of the URLs end with it", source.uri)
        named[name] = (url, fragment.replace("=", ":"))
    check_tree(named, source.uri)
    return named


def _chosen(
    paths: tuple[str, ...], source: Source, *, allow_unsafe: bool, named: bool
) -> Selection:
    # Who names one file means that file, of whatever kind; only what is unsafe is still refused.
    allow = source.allow_patterns or (tuple(map(escape, paths)) if named else ())
    return select(
        paths, allow, source.ignore_patterns, allow_unsafe=allow_unsafe, source=source.uri
    )


def _last(url: str) -> str:
    return url.partition("?")[0].rsplit("/", 1)[-1]


def _with_checksum(file: RemoteFile, checksum: str) -> RemoteFile:
    if checksum.startswith("sha256:"):
        return replace(file, sha256=checksum.removeprefix("sha256:"))
    return replace(file, checksum=checksum)


def _as_found(file: RemoteFile, probe: _Probe) -> RemoteFile:
    return replace(file, size_bytes=probe.size_bytes, validator=probe.validator)


def _size(response: Response) -> int | None:
    """Return the whole size that an answer tells, if it does."""
    if response.status in {206, 416}:
        total = response.headers.get("Content-Range", "").rpartition("/")[2].strip()
        known = total.isascii() and total.isdigit() and len(total) < 20
        return int(total) if known else None
    return response.length if response.status == 200 else None


def _measured(response: Response, source: Source) -> int:
    buffer = memoryview(bytearray(256 << 10))
    size = 0
    while count := response.read_into(buffer):
        size += count
        if size > MEASURED_BYTES_MAX:
            response.close()
            raise bad_reply(
                source.uri,
                f"a body of more than {MEASURED_BYTES_MAX >> 20} MiB that does not say how long it is",
            )
    return size


def _validator(response: Response) -> str:
    """Return a strong ETag, else the time of the last change, else nothing."""
    etag = response.headers.get("ETag", "").strip()
    strong = etag.startswith('"') and etag.endswith('"') and len(etag) in range(3, 200)
    modified = response.headers.get("Last-Modified", "").strip()
    return etag if strong else modified[:100]
