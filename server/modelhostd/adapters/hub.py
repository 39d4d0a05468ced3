"""Planning on the Hugging Face Hub: commit, tree, digests, gating and locations by huggingface_hub.

Blocking. One attempt each: the retries are ours, because the library's cannot be interrupted.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import field
from typing import Any

from modelhostd.adapters.cancel import Canceller
from modelhostd.adapters.connections import Connections, Credential, Response
from modelhostd.adapters.http_reader import HttpFile, HttpReader
from modelhostd.adapters.hub_library import CURRENT, Exchange, invalid_url, transient
from modelhostd.adapters.hub_library import library as hub_library
from modelhostd.adapters.wire import Limits, Transient, bad_reply
from modelhostd.core import hub_replies
from modelhostd.core.errors import ModelhostError, Reason, invalid
from modelhostd.core.hub_replies import Asked
from modelhostd.core.origins import Origin, OriginPolicy, join_url, parse_target
from modelhostd.core.resources import Source
from modelhostd.core.selection import select
from modelhostd.core.sources import hub_repo
from modelhostd.core.transfer import RetryPolicy
from modelhostd.core.values import dataclass
from modelhostd.ports import RemoteFile, SourceFacts

PUBLIC_ENDPOINT = "https://huggingface.co"
LISTED_FILES_MAX = 100_000
LISTED_PATH_CHARS_MAX = 4096
TEXT_CHARS_MAX = 256
TAGS_MAX = 200

_COMMIT = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SHA1 = re.compile(r"[0-9a-f]{40}")


def nobody(_: Origin) -> Credential | None:
    """Return no credential."""
    return None


@dataclass(frozen=True, slots=True)
class HubConfig:
    """Where the Hub is and how patient to be with it."""

    endpoint: str = PUBLIC_ENDPOINT
    """HF_ENDPOINT: this host is allowed on any port, whatever its address; http only if it says so."""
    credential: Callable[[Origin], Credential | None] = nobody
    """Returns the endpoint's token; asked for each request, so that it can be changed."""
    limits: Limits = field(default_factory=Limits)
    retry: RetryPolicy = field(default_factory=RetryPolicy)
    files_at_once: int = 8
    """Files of one download that are fetched side by side."""
    policy: OriginPolicy = field(default_factory=OriginPolicy)
    """What the operator allows besides the endpoint."""
    version: str = "0"
    """modelhost's version, for the user agent."""


class Hub:
    """One endpoint. Thread-safe; holds no connection itself."""

    def __init__(self, config: HubConfig) -> None:
        self.config = config
        self._endpoint = config.endpoint.rstrip("/")
        self.origin: Origin = parse_target(self._endpoint, "HF_ENDPOINT").origin
        self._policy = config.policy.with_endpoints(self._endpoint)

    @property
    def retry(self) -> RetryPolicy:
        """How often and how long the Hub is tried again."""
        return self.config.retry

    @property
    def files_at_once(self) -> int:
        """Files of one download that are fetched side by side."""
        return self.config.files_at_once

    def connections(self, canceller: Canceller, source: Source) -> Connections:
        """Return the connections for one transfer from the Hub."""
        return Connections(self._policy, self.config.limits, canceller, source.uri)

    def credential(self) -> Credential | None:
        """Return the token as it is now, bound to the endpoint's origin."""
        return self.config.credential(self.origin)

    def asked(self, source: Source, file: str = "") -> Asked:
        """Return what the error messages need to know."""
        page = f"{self._endpoint}/{hub_repo(source)}"
        return Asked(
            source.uri, page, source.revision, file, has_token=self.credential() is not None
        )

    def resolve_url(self, source: Source, commit: str, path: str) -> str:
        """Return the address of one file of a commit at the endpoint."""
        named: object = hub_library().hf_hub_url(
            hub_repo(source), path, revision=commit, endpoint=self._endpoint
        )
        return str(named)

    def plan(
        self, connections: Connections, source: Source, *, allow_unsafe: bool = False
    ) -> SourceFacts:
        """Ask for the commit, its tree and what the card says, and choose the files.

        One attempt: raises Transient for what may pass, else the reasons of ``hub_replies`` and of
        ``selection.select``.
        """
        library = hub_library()
        credential = self.credential()
        repo = hub_repo(source)
        with self._exchange(connections, source, credential):
            api = library.HfApi(
                endpoint=self._endpoint,
                token=credential.token if credential else False,
                library_name="modelhost",
                library_version=self.config.version,
            )
            info = api.model_info(repo, revision=source.revision or None)
            commit = info.sha
            if not isinstance(commit, str) or _COMMIT.fullmatch(commit) is None:
                raise bad_reply(source.uri, "no commit in the repository's facts")
            tree = api.list_repo_tree(repo, revision=commit, recursive=True)
            files = _listed(tree, source)
        chosen = select(
            tuple(files),
            source.allow_patterns,
            source.ignore_patterns,
            allow_unsafe=allow_unsafe,
            source=source.uri,
        )
        return SourceFacts(
            source=source,
            revision=commit,
            files=tuple(files[path] for path in chosen.chosen),
            skipped=chosen.skipped,
            task=_text(info.pipeline_tag),
            licence=_licence(info),
            tags=tuple(_text(tag) for tag in _tags(info)),
            gated=bool(info.gated),
            private=bool(info.private),
        )

    def locate(
        self, connections: Connections, source: Source, commit: str, file: RemoteFile
    ) -> str:
        """Return where the bytes of an LFS file are now: mostly a signed URL of another origin.

        Raises BAD_SOURCE_REPLY when the Hub names another commit, digest or size than it listed.
        """
        library = hub_library()
        credential = self.credential()
        url = self.resolve_url(source, commit, file.path)
        with self._exchange(connections, source, credential, file.path):
            found = library.get_hf_file_metadata(
                url,
                token=credential.token if credential else False,
                endpoint=self._endpoint,
                library_name="modelhost",
                library_version=self.config.version,
                headers={"X-HF-Download-Counter": "1"},
            )
        if found.commit_hash != commit:
            raise bad_reply(source.uri, "a file's answer names another commit, or none")
        if found.etag != file.sha256 or found.size not in {None, file.size_bytes}:
            raise bad_reply(
                source.uri, f"{ascii(file.path)[:200]} changed digest or size on the way"
            )
        return join_url(url, str(found.location), source.uri)

    def reader(
        self, connections: Connections, source: Source, revision: str, file: RemoteFile
    ) -> HttpReader:
        """Return the reader of one file. Of LFS files the Hub is asked first where they are, which
        also tells of gating.
        """

        def locate() -> str:
            if file.sha256:
                return self.locate(connections, source, revision, file)
            return self.resolve_url(source, revision, file.path)

        def refused(response: Response) -> Exception:
            asked, headers = self.asked(source, file.path), response.headers
            if response.status in hub_replies.TRANSIENT_STATUSES:
                return transient(asked, response.status, headers)
            code, message = headers.get("X-Error-Code"), headers.get("X-Error-Message")
            return hub_replies.refusal(asked, response.status, code or "", message or "")

        return HttpReader(
            HttpFile(
                connections,
                file,
                locate,
                refused,
                credential=self.credential,
                headers={
                    "User-Agent": f"modelhost/{self.config.version}",
                    "X-HF-Download-Counter": "1",
                },
                home=self.origin,
            )
        )

    @contextmanager
    def _exchange(
        self,
        connections: Connections,
        source: Source,
        credential: Credential | None,
        file: str = "",
    ) -> Iterator[None]:
        """Let the library's requests of this thread go through ``connections``; map its errors."""
        library = hub_library()
        if library.constants.is_offline_mode():
            raise ModelhostError(
                Reason.OFFLINE,
                f"{source.uri}: HF_HUB_OFFLINE is set; unset it to download",
                {"source": source.uri},
            )
        asked = self.asked(source, file)
        token = CURRENT.set(Exchange(connections, credential, asked))
        try:
            yield
        except (ModelhostError, Transient):
            raise
        except library.errors.HfHubHTTPError as error:
            raise _refused(library, asked, error) from error
        except library.errors.HFValidationError as error:
            raise invalid("source.uri", "a valid repository id of the Hub", asked.source) from error
        except (library.errors.HTTPError, invalid_url()) as error:
            raise bad_reply(source.uri, type(error).__name__) from error
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise bad_reply(source.uri, f"not the Hub's JSON ({type(error).__name__})") from error
        finally:
            CURRENT.reset(token)


def _refused(library: Any, asked: Asked, error: Any) -> ModelhostError:
    errors = library.errors
    # The order matters: a gated repository is a kind of missing one to the library.
    codes = (
        (errors.GatedRepoError, "GatedRepo"),
        (errors.RepositoryNotFoundError, "RepoNotFound"),
        (errors.RevisionNotFoundError, "RevisionNotFound"),
        (errors.RemoteEntryNotFoundError, "EntryNotFound"),
    )
    code = next((code for kind, code in codes if isinstance(error, kind)), "")
    message = error.response.headers.get("X-Error-Message") or ""
    return hub_replies.refusal(asked, error.response.status_code, code, message)


def _listed(tree: Iterable[Any], source: Source) -> dict[str, RemoteFile]:
    files: dict[str, RemoteFile] = {}
    for entry in tree:
        blob = getattr(entry, "blob_id", None)
        if blob is None:
            continue
        if len(files) >= LISTED_FILES_MAX:
            raise bad_reply(source.uri, f"more than {LISTED_FILES_MAX} files")
        path, size = entry.path, entry.size
        sha256 = entry.lfs.sha256 if entry.lfs else ""
        git_sha1 = "" if entry.lfs else blob
        if not isinstance(path, str) or len(path) > LISTED_PATH_CHARS_MAX or path in files:
            raise bad_reply(source.uri, "a file listed twice, or without a usable path")
        if type(size) is not int or not 0 <= size < 1 << 50:
            raise bad_reply(source.uri, f"a size of {ascii(size)[:40]} for {ascii(path)[:200]}")
        digests = (_SHA256.fullmatch(sha256) if sha256 else True) and (
            _SHA1.fullmatch(git_sha1) if git_sha1 else True
        )
        if not digests:
            raise bad_reply(source.uri, f"a malformed digest for {ascii(path)[:200]}")
        files[path] = RemoteFile(path, size, sha256, git_sha1)
    return files


def _text(value: Any) -> str:
    """Return a short clean text for whatever a model card says."""
    if not isinstance(value, str):
        return ""
    clean = value.encode("utf-8", "replace").decode("utf-8")
    return "".join(c for c in clean if c.isprintable())[:TEXT_CHARS_MAX]


def _tags(info: Any) -> list[Any]:
    return info.tags[:TAGS_MAX] if isinstance(info.tags, list) else []


def _licence(info: Any) -> str:
    data = info.card_data
    named = data.get("license") if hasattr(data, "get") else None
    if isinstance(named, list):
        named = next((item for item in named if isinstance(item, str)), None)
    if isinstance(named, str):
        return _text(named)
    tags = (tag for tag in _tags(info) if isinstance(tag, str))
    return _text(next((tag[8:] for tag in tags if tag.startswith("license:")), ""))
