"""``gs://`` sources: what there is by gcsfs, over our connections; the bytes by the same API, by our pump.

An object is asked for in the generation that the plan names: one that was overwritten meanwhile is the
old one still, or gone. The token, if there is one, goes to the endpoint's own origin only.
"""

import json
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlencode

from modelhostd.adapters.connections import Connections
from modelhostd.adapters.http_source import HttpSourceConfig
from modelhostd.adapters.objects import (
    Listed,
    ObjectStore,
    Wires,
    answered,
    library,
    place_of,
    with_digest,
)
from modelhostd.adapters.wire import bad_reply
from modelhostd.core.object_facts import gs_digest
from modelhostd.core.resources import Source
from modelhostd.ports import RemoteFile

PUBLIC_ENDPOINT = "https://storage.googleapis.com"


class GoogleStorage(ObjectStore):
    """Buckets of Google Cloud Storage; satisfies ``source.SourceAdapter``."""

    def __init__(self, config: HttpSourceConfig, endpoint: str = PUBLIC_ENDPOINT) -> None:
        super().__init__(config, endpoint)

    def listed(self, connections: Connections, source: Source) -> Sequence[Listed]:
        """List page by page."""
        wires = Wires(self, connections, source, self.shown(source))
        files = self._file_system(source, _Session(wires))

        async def ask() -> Mapping[str, Any]:
            found: Mapping[str, Any] = await files._find(place_of(source), detail=True)  # noqa: SLF001
            return found

        found = answered(source, ask())
        return [Listed(name, facts["size"], facts) for name, facts in found.items()]

    def described(
        self, connections: Connections, source: Source, wanted: Mapping[str, Listed]
    ) -> Sequence[RemoteFile]:
        """Return what the listing told."""
        files = []
        for path, listed in wanted.items():
            generation = str(listed.facts.get("generation", ""))
            if not (generation.isascii() and generation.isdigit()):
                raise bad_reply(source.uri, f"no generation of {listed.name!a}")
            file = RemoteFile(path, listed.size_bytes, validator=generation)
            files.append(with_digest(file, gs_digest(listed.facts)))
        return files

    def locate(self, source: Source, name: str, file: RemoteFile) -> str:
        """Return the URL of an object's generation."""
        files = self._file_system(source, None)
        return str(files.url(name, generation=file.validator))

    def _file_system(self, source: Source, session: "_Session | None") -> Any:
        """Return a gcsfs that sends by ``session``, and knows no token of its own."""
        # The plain one: the other looks at a bucket's kind by gRPC first.
        files = library("gcsfs.core", source).GCSFileSystem(
            asynchronous=True,
            skip_instance_cache=True,
            token="anon",  # noqa: S106 - the name of having none
            endpoint_url=self.endpoint,
        )
        files._session = session  # noqa: SLF001 - it makes one of its own otherwise
        return files


class _Session:
    """What gcsfs takes for its HTTP session: of aiohttp's it uses these few."""

    closed = True

    def __init__(self, wires: Wires) -> None:
        self._wires = wires

    def request(
        self,
        *,
        method: str,
        url: str,
        params: Mapping[str, Any],
        headers: Mapping[str, str],
        **_: Any,
    ) -> "_Request":
        """Return one request, sent when it is entered."""
        query = urlencode({name: str(value) for name, value in params.items()})
        return _Request(self._wires, method, f"{url}?{query}" if query else url, headers)


class _Request:
    """One request, then its answer."""

    request_info = None

    def __init__(self, wires: Wires, method: str, url: str, headers: Mapping[str, str]) -> None:
        self._asked = (method, url, headers)
        self._wires = wires
        self.status = 0
        self.headers: Mapping[str, str] = {}
        self._body = b""

    async def __aenter__(self) -> Self:
        response, self._body = await self._wires.send(*self._asked)
        self.status, self.headers = response.status, dict(response.headers.items())
        try:
            json.loads(self._body)
        except ValueError:
            raise bad_reply(self._wires.source.uri, "a listing that is no JSON") from None
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        pass

    async def read(self) -> bytes:
        """Return the body."""
        return self._body
