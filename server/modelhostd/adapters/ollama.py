"""``ollama://`` sources: a manifest, and its layers as files, each named by its digest.

A registry may want a token for strangers too. It is asked for at the realm that the registry names, with
nothing of ours, and what comes is shown to the registry alone: a credential of the operator's never
goes to a realm.
"""

import hashlib
import threading

from modelhostd.adapters.cancel import Canceller
from modelhostd.adapters.connections import Connections, Credential, Response
from modelhostd.adapters.http_reader import HttpFile, HttpReader
from modelhostd.adapters.http_source import HttpSource, HttpSourceConfig
from modelhostd.adapters.wire import Transient, bad_reply
from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.ollama_manifest import (
    MANIFEST_BYTES_MAX,
    MEDIA_TYPE,
    BadManifest,
    OtherLayers,
    parse_challenge,
    parse_manifest,
    parse_token,
)
from modelhostd.core.origins import parse_target
from modelhostd.core.paths import printable
from modelhostd.core.resources import Source
from modelhostd.core.selection import select
from modelhostd.ports import RemoteFile, SourceFacts

PUBLIC_ENDPOINT = "https://registry.ollama.ai"
TOKEN_BYTES_MAX = 64 << 10
TOKENS_KEPT_MAX = 64
TOKENS_MAX = 3
"""Tokens asked for by one reader: one that lasts shorter than a file is renewed, and not for ever."""


class Ollama(HttpSource):
    """Models of one registry; satisfies ``source.SourceAdapter``."""

    def __init__(self, config: HttpSourceConfig, endpoint: str = PUBLIC_ENDPOINT) -> None:
        super().__init__(config)
        self._endpoint = endpoint.rstrip("/")
        self._policy = config.policy.with_endpoints(endpoint)
        self._home = parse_target(self._endpoint, endpoint).origin
        self._lock = threading.Lock()
        self._tokens: dict[str, Credential] = {}
        """What the realm gave, by repository: worth nothing elsewhere, and not kept on disk."""

    def connections(self, canceller: Canceller, source: Source) -> Connections:
        """Return the connections of one transfer."""
        return Connections(self._policy, self.config.transfer.limits, canceller, source.uri)

    def plan(
        self, connections: Connections, source: Source, *, allow_unsafe: bool = False
    ) -> SourceFacts:
        """Ask for the manifest; the revision is its digest."""
        data = self._manifest(connections, source)
        try:
            layers = parse_manifest(data, source.uri.rpartition("/")[2])
        except BadManifest as error:
            raise bad_reply(source.uri, str(error)) from None
        except OtherLayers as error:
            raise ModelhostError(
                Reason.UNSUPPORTED_MODEL,
                f"{source.uri}: its layers are not those of a GGUF model ({error}); use another tag, "
                "or a repository with safetensors",
                {"cause": f"layers of another kind: {error}"},
            ) from None
        files = {
            layer.path: RemoteFile(layer.path, layer.size_bytes, layer.sha256) for layer in layers
        }
        chosen = select(
            tuple(files),
            # The registry's model is exactly its layers: a second GGUF is no other precision of it.
            source.allow_patterns or ("*",),
            source.ignore_patterns,
            allow_unsafe=allow_unsafe,
            source=source.uri,
        )
        return SourceFacts(
            source=source,
            revision=hashlib.sha256(data).hexdigest(),
            files=tuple(files[path] for path in chosen.chosen),
            skipped=chosen.skipped,
        )

    def reader(
        self, connections: Connections, source: Source, revision: str, file: RemoteFile
    ) -> HttpReader:
        """Return the reader of one layer."""
        asked = [0]

        def refused(response: Response) -> Exception:
            what = f"the layer {printable(file.path)}"
            error = self._refused(response, source, what)
            if response.status == 401 and response.origin == self._home and asked[0] < TOKENS_MAX:
                asked[0] += 1
                if self._renew(connections, source, response):
                    assert isinstance(error, ModelhostError), error
                    return Transient(error, 0.0)
            return error

        return HttpReader(
            HttpFile(
                connections,
                file,
                lambda: f"{self._endpoint}/v2/{_repo(source)}/blobs/sha256:{file.sha256}",
                refused,
                credential=lambda: self._credential(source),
                headers=self.headers(),
                home=self._home,
            )
        )

    def _manifest(self, connections: Connections, source: Source) -> bytes:
        url = f"{self._endpoint}/v2/{_repo(source)}/manifests/{source.revision or 'latest'}"
        for renewals_left in (1, 0):
            response = connections.request(
                "GET", url, self.headers(MEDIA_TYPE), credential=self._credential(source)
            )
            if response.status == 200:
                return response.read_all(MANIFEST_BYTES_MAX)
            error = self._refused(response, source, "the model or its tag")
            response.skip()
            wanted = response.status == 401 and response.origin == self._home
            if not (renewals_left and wanted and self._renew(connections, source, response)):
                break
        raise error

    def _renew(self, connections: Connections, source: Source, response: Response) -> bool:
        """Get a token for strangers from the realm that the registry names; False where none helps."""
        realm = parse_challenge(response.headers.get("WWW-Authenticate", ""))
        if realm is None or self.credential(self._endpoint, source) is not None:
            return False
        answer = connections.request("GET", realm, self.headers("application/json"), redirects=0)
        if answer.status != 200:
            # Most realms want a signature for what is private: that is the registry's "no".
            answer.skip()
            return False
        try:
            token = parse_token(answer.read_all(TOKEN_BYTES_MAX))
        except BadManifest as error:
            raise bad_reply(source.uri, str(error)) from None
        with self._lock:
            while len(self._tokens) >= TOKENS_KEPT_MAX:
                self._tokens.pop(next(iter(self._tokens)))
            self._tokens[_repo(source)] = Credential(self._home, token)
        return True

    def _credential(self, source: Source) -> Credential | None:
        own = self.credential(self._endpoint, source)
        with self._lock:
            return own or self._tokens.get(_repo(source))

    def _refused(self, response: Response, source: Source, what: str) -> Exception:
        has_credential = self.credential(self._endpoint, source) is not None
        return self.refused(response, source, what, self._home, has_credential=has_credential)


def _repo(source: Source) -> str:
    """``ollama://name`` -> ``library/name``."""
    name = source.uri.removeprefix("ollama://")
    return name if "/" in name else f"library/{name}"
