"""From the configuration to the sources: which there are, under which policy, with which credentials.

A part of the composition root; see ``daemon``.
"""

import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from modelhostd._version import __version__
from modelhostd.adapters.credentials import Credentials, Maker
from modelhostd.adapters.github import GitHub
from modelhostd.adapters.google_tokens import GoogleTokens
from modelhostd.adapters.gs import GoogleStorage
from modelhostd.adapters.http_source import HttpSourceConfig
from modelhostd.adapters.hub import Hub, HubConfig
from modelhostd.adapters.hub_endpoints import HubEndpoints
from modelhostd.adapters.local_files import LocalConfig, LocalFiles
from modelhostd.adapters.not_allowed import NotAllowed
from modelhostd.adapters.ollama import Ollama
from modelhostd.adapters.s3 import S3
from modelhostd.adapters.secret_files import Place
from modelhostd.adapters.source import SourceAdapter, TransferConfig
from modelhostd.adapters.urls import Urls
from modelhostd.adapters.wire import Limits
from modelhostd.config import SOURCES, DownloadConfig
from modelhostd.core.origins import Origin, OriginPolicy, parse_target
from modelhostd.core.transfer import RetryPolicy

SERVICE_CREDENTIAL = "modelhost"
"""The name under which the service manager may hand over a file of credentials."""

EXTRAS = {"s3": "s3fs", "gs": "gcsfs"}
"""What the sources in object storage need, by scheme."""


class SourceSetup:
    """The sources of one daemon."""

    def __init__(
        self, config: DownloadConfig, environment: Mapping[str, str] | None = None
    ) -> None:
        self._config = config
        self._policy = OriginPolicy(
            trusted_hosts=frozenset(config.private_hosts),
            http_hosts=frozenset(config.http_hosts),
            hosts=config.hosts,
        )
        self._limits = Limits(connect_s=config.connect_timeout_s, stall_s=config.read_timeout_s)
        self.credentials = self._credentials(os.environ if environment is None else environment)
        self.adapters = self._adapters()
        """By scheme; those that the operator left out refuse."""

    @property
    def offered(self) -> Mapping[str, str]:
        """What may be used: scheme -> where it is asked, empty for schemes without one place."""
        config = self._config
        places = {
            "hf": config.endpoint,
            "https": "",
            "github": config.github_endpoint,
            "ollama": config.ollama_endpoint,
            "file": "",
            "s3": config.s3_endpoint,
            "gs": config.gs_endpoint,
        }
        offered = {scheme: place for scheme, place in places.items() if scheme in config.sources}
        if not config.file_roots:
            offered.pop("file", None)
        for scheme, library in EXTRAS.items():
            if find_spec(library) is None:
                offered.pop(scheme, None)
        return offered

    def has_credential(self, scheme: str) -> bool:
        """Tell whether there is a token for a scheme's endpoint; for ``https``, for any other host."""
        places = {name: str(_origin(place)) for name, place in self.offered.items() if place}
        known = {known.origin for known in self.credentials.known() if known.origin}
        if scheme == "https":
            return bool(known - set(places.values()))
        return places.get(scheme) in known

    def _adapters(self) -> Mapping[str, SourceAdapter]:
        config = self._config
        policy = self._policy
        transfer = TransferConfig(
            limits=self._limits,
            retry=RetryPolicy(tries=config.attempts),
            version=__version__,
        )
        plain = HttpSourceConfig(policy, self.credentials, transfer)
        urls = Urls(plain)
        every: dict[str, SourceAdapter] = {
            "hf": self._hub(policy, transfer),
            "https": urls,
            "github": GitHub(plain, config.github_endpoint),
            "ollama": Ollama(plain, config.ollama_endpoint),
            "file": LocalFiles(LocalConfig(config.file_roots, transfer)),
            "s3": S3(plain, config.s3_endpoint, config.s3_region, _session(config)),
            "gs": GoogleStorage(plain, config.gs_endpoint),
        }
        chosen = {
            scheme: every[scheme] if scheme in config.sources else NotAllowed("downloads.sources")
            for scheme in SOURCES
        }
        return {**chosen, "http": chosen["https"]}

    def _hub(self, policy: OriginPolicy, transfer: TransferConfig) -> SourceAdapter:
        hubs = [
            Hub(
                HubConfig(
                    endpoint=endpoint,
                    credential=self.credentials.for_origin,
                    limits=transfer.limits,
                    retry=transfer.retry,
                    policy=policy,
                    version=transfer.version,
                )
            )
            for endpoint in (self._config.endpoint, *self._config.mirrors)
        ]
        return HubEndpoints(hubs) if len(hubs) > 1 else hubs[0]

    def _credentials(self, environment: Mapping[str, str]) -> Credentials:
        config = self._config
        places = [Place(config.credentials)] if config.credentials is not None else []
        # systemd guards these itself, and shows the mode of their access list.
        service = Path(environment.get("CREDENTIALS_DIRECTORY", ""))
        if service.is_absolute():
            places.append(Place(service / SERVICE_CREDENTIAL, guarded=True, required=False))
        variables: dict[Origin, tuple[str, ...]] = {}
        if config.token is not None:
            variables[_origin(config.endpoint)] = ("HF_TOKEN", config.token.value)
        if config.github_token is not None:
            variables[_origin(config.github_endpoint)] = ("GITHUB_TOKEN", config.github_token.value)
        if config.s3_secret is not None:
            login = ("AWS_SECRET_ACCESS_KEY", config.s3_secret.value, config.s3_key)
            variables[_origin(config.s3_endpoint)] = login
        if config.gs_token is not None:
            token = ("GOOGLE_OAUTH_ACCESS_TOKEN", config.gs_token.value)
            variables[_origin(config.gs_endpoint)] = token
        makers: dict[Origin, Maker] = {}
        if (key := config.gs_credentials) is not None:
            place = Place(key, guarded=key.parent == service)
            makers[_origin(config.gs_endpoint)] = GoogleTokens(place, self._policy, self._limits)
        return Credentials(places, variables, makers)


def _session(config: DownloadConfig) -> tuple[str, str]:
    """Return the access key that was lent for a time, and the token that goes with it; both empty = none was."""
    given = config.s3_session
    return (config.s3_key, given.value) if given is not None else ("", "")


def _origin(endpoint: str) -> Origin:
    return parse_target(endpoint, endpoint).origin
