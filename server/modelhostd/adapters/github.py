"""``github://`` sources: the assets of a release, each with the digest that GitHub tells.

Without a token an asset with a digest comes from the release's page, which no limit of the API counts;
one without a digest comes by its id, because another can be put under the same name.
"""

from glob import escape
from urllib.parse import quote, unquote, urlsplit

from modelhostd.adapters.cancel import Canceller
from modelhostd.adapters.connections import Connections, Credential, Response
from modelhostd.adapters.http_reader import HttpFile, HttpReader
from modelhostd.adapters.http_source import HttpSource, HttpSourceConfig
from modelhostd.adapters.wire import bad_reply
from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.github_release import (
    RELEASE_BYTES_MAX,
    BadRelease,
    parse_release,
    tag_of,
)
from modelhostd.core.origins import join_url, parse_target
from modelhostd.core.paths import printable
from modelhostd.core.resources import Source
from modelhostd.core.selection import select
from modelhostd.core.values import dataclass
from modelhostd.ports import RemoteFile, SourceFacts

PUBLIC_ENDPOINT = "https://api.github.com"

_JSON = "application/vnd.github+json"
_BYTES = "application/octet-stream"


@dataclass(frozen=True, slots=True)
class _Place:
    """A source taken apart; ``asset`` is empty for all of a release."""

    repo: str
    asset: str


class GitHub(HttpSource):
    """Releases of one GitHub; satisfies ``source.SourceAdapter``."""

    def __init__(self, config: HttpSourceConfig, endpoint: str = PUBLIC_ENDPOINT) -> None:
        """``endpoint``: the API's URL, ``https://host/api/v3`` for a GitHub of one's own."""
        super().__init__(config)
        self._endpoint = endpoint.rstrip("/")
        self._policy = config.policy.with_endpoints(endpoint)
        self._home = parse_target(self._endpoint, endpoint).origin

    def connections(self, canceller: Canceller, source: Source) -> Connections:
        """Return the connections of one transfer."""
        return Connections(self._policy, self.config.transfer.limits, canceller, source.uri)

    def plan(
        self, connections: Connections, source: Source, *, allow_unsafe: bool = False
    ) -> SourceFacts:
        """Ask for the release and choose among its assets."""
        place = _place(source)
        which = f"tags/{quote(source.revision, safe='')}" if source.revision else "latest"
        data = self.small(
            connections,
            source,
            f"{self._endpoint}/repos/{place.repo}/releases/{which}",
            f"release {source.revision or 'latest'}",
            RELEASE_BYTES_MAX,
            accept=_JSON,
            credential=self._credential(source),
        )
        try:
            release = parse_release(data)
        except BadRelease as error:
            raise bad_reply(source.uri, f"a release with {error}") from None
        files = {
            asset.name: RemoteFile(
                asset.name, asset.size_bytes, asset.sha256, validator=str(asset.id)
            )
            for asset in release.assets
        }
        if place.asset and place.asset not in files:
            raise ModelhostError(
                Reason.SOURCE_NOT_FOUND,
                f"{source.uri}: release {release.tag} has {len(files)} assets, and none of them is "
                f"{printable(place.asset)}; check the spelling",
                {"source": source.uri, "missing": "file"},
            )
        chosen = select(
            (place.asset,) if place.asset else tuple(files),
            source.allow_patterns or ((escape(place.asset),) if place.asset else ()),
            source.ignore_patterns,
            allow_unsafe=allow_unsafe,
            source=source.uri,
        )
        return SourceFacts(
            source=source,
            revision=release.revision,
            files=tuple(files[name] for name in chosen.chosen),
            skipped=chosen.skipped,
        )

    def reader(
        self, connections: Connections, source: Source, revision: str, file: RemoteFile
    ) -> HttpReader:
        """Return the reader of one asset."""
        repo = _place(source).repo

        def locate() -> str:
            credential = self._credential(source)
            if credential is None and file.sha256:
                tag, name = quote(tag_of(revision), safe=""), quote(file.path, safe="")
                return f"{self._pages()}/{repo}/releases/download/{tag}/{name}"
            return self._signed(connections, source, repo, file, credential)

        def refused(response: Response) -> Exception:
            has_credential = self._credential(source) is not None
            what = f"the asset {printable(file.path)}"
            return self.refused(response, source, what, self._home, has_credential=has_credential)

        return HttpReader(
            HttpFile(
                connections,
                file,
                locate,
                refused,
                credential=lambda: self._credential(source),
                headers=self.headers(_BYTES),
                home=self._home,
                ranges=True,
            )
        )

    def _signed(
        self,
        connections: Connections,
        source: Source,
        repo: str,
        file: RemoteFile,
        credential: Credential | None,
    ) -> str:
        """Return where an asset's bytes are now: asked once, not for each range."""
        url = f"{self._endpoint}/repos/{repo}/releases/assets/{file.validator}"
        response = connections.request(
            "GET", url, self.headers(_BYTES), credential=credential, redirects=0
        )
        location, status = response.headers.get("Location"), response.status
        if status == 200:
            # GitHub may send the bytes itself; then this is where they are.
            response.close()
            return url
        if location is None or status not in {301, 302, 303, 307, 308}:
            what, has_credential = f"the asset {printable(file.path)}", credential is not None
            error = self.refused(response, source, what, self._home, has_credential=has_credential)
            response.skip()
            raise error
        response.skip()
        return join_url(url, location, source.uri)

    def _credential(self, source: Source) -> Credential | None:
        return self.credential(self._endpoint, source)

    def _pages(self) -> str:
        """Return where people look at repositories: the API's host less what makes it the API's."""
        parts = urlsplit(self._endpoint)
        host = "github.com" if parts.netloc == "api.github.com" else parts.netloc
        return f"{parts.scheme}://{host}"


def _place(source: Source) -> _Place:
    owner, repo, *asset = source.uri.removeprefix("github://").split("/")
    return _Place(f"{owner}/{repo}", unquote(asset[0]) if asset else "")
