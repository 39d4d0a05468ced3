"""What the sources that speak plain HTTP share: policy, credentials, small answers, refusals."""

import hashlib
import time
from collections.abc import Iterable, Mapping
from dataclasses import field

from modelhostd.adapters.cancel import Canceller
from modelhostd.adapters.connections import Connections, Credential, Response
from modelhostd.adapters.credentials import Credentials
from modelhostd.adapters.source import TransferConfig
from modelhostd.adapters.wire import Transient
from modelhostd.core.http_replies import Asked, failure
from modelhostd.core.origins import Origin, OriginPolicy, parse_target
from modelhostd.core.resources import Source
from modelhostd.core.transfer import RetryPolicy
from modelhostd.core.values import dataclass
from modelhostd.ports import RemoteFile


@dataclass(frozen=True, slots=True)
class HttpSourceConfig:
    """Who may be asked, with which credentials, and how patiently."""

    policy: OriginPolicy = field(default_factory=OriginPolicy)
    credentials: Credentials = field(default_factory=Credentials)
    transfer: TransferConfig = field(default_factory=TransferConfig)


class HttpSource:
    """The common half of ``source.SourceAdapter``."""

    def __init__(self, config: HttpSourceConfig) -> None:
        self.config = config

    @property
    def retry(self) -> RetryPolicy:
        """How often and how long it is tried again."""
        return self.config.transfer.retry

    @property
    def files_at_once(self) -> int:
        """Files of one download that are fetched side by side."""
        return self.config.transfer.files_at_once

    def connections(self, canceller: Canceller, source: Source) -> Connections:
        """Return the connections of one transfer."""
        return Connections(self.config.policy, self.config.transfer.limits, canceller, source.uri)

    def credential(self, url: str, source: Source) -> Credential | None:
        """Return what the origin of a URL wants to see, as it is now."""
        return self.config.credentials.for_origin(parse_target(url, source.uri).origin)

    def headers(self, accept: str = "*/*") -> dict[str, str]:
        """Return what every request says."""
        return {"User-Agent": self.config.transfer.user_agent, "Accept": accept}

    def refused(
        self,
        response: Response,
        source: Source,
        what: str,
        home: Origin,
        *,
        has_credential: bool,
    ) -> Exception:
        """Return the error of a status that is no answer: a ModelhostError, or Transient.

        A 401 or 403 of another origin than ``home`` says nothing about limits or logins of ours.
        """
        asked = Asked(source.uri, what, has_credential=has_credential)
        elsewhere = response.status in {401, 403} and response.origin != home
        told = {} if elsewhere else lower(response)
        error, wait_s, passing = failure(asked, response.status, told, time.time())
        return Transient(error, wait_s) if passing else error

    def small(
        self,
        connections: Connections,
        source: Source,
        url: str,
        what: str,
        limit: int,
        *,
        accept: str = "*/*",
        credential: Credential | None = None,
    ) -> bytes:
        """Return a short answer whole. Raises Transient, the refusal, or BAD_SOURCE_REPLY beyond
        ``limit`` bytes.
        """
        response = connections.request("GET", url, self.headers(accept), credential=credential)
        if response.status != 200:
            home = parse_target(url, source.uri).origin
            has_credential = credential is not None
            error = self.refused(response, source, what, home, has_credential=has_credential)
            response.skip()
            raise error
        return response.read_all(limit)


def revision_of(files: Iterable[RemoteFile]) -> str:
    """Return a digest of what is told of files, where the source has no revisions of its own.

    Where a digest of a file is known its validator does not count: the nodes of a CDN may differ in it,
    and what is uploaded again gets another one.
    """
    told = [
        (f.path, f.size_bytes, f.sha256, f.checksum, "" if _known(f) else f.validator)
        for f in files
    ]
    return hashlib.sha256(repr(sorted(told)).encode()).hexdigest()


def _known(file: RemoteFile) -> bool:
    return bool(file.sha256) or file.checksum.startswith(("sha1:", "md5:"))


def lower(response: Response) -> Mapping[str, str]:
    """Return an answer's headers by lower-case name; the first of several."""
    found: dict[str, str] = {}
    for name, value in response.headers.items():
        found.setdefault(name.lower(), value)
    return found
