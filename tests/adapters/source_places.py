"""Where each kind of source keeps its models: what the contract of the sources is held against."""

import hashlib
import itertools
import json
import os
import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Protocol

import pytest

from bench.loopback_hub import LoopbackHub, Repo
from modelhostd.adapters.credentials import Credentials
from modelhostd.adapters.github import GitHub
from modelhostd.adapters.gs import GoogleStorage
from modelhostd.adapters.http_source import HttpSourceConfig
from modelhostd.adapters.hub import Hub, HubConfig
from modelhostd.adapters.local_files import LocalConfig, LocalFiles
from modelhostd.adapters.ollama import Ollama
from modelhostd.adapters.s3 import S3
from modelhostd.adapters.source import SourceAdapter
from modelhostd.adapters.urls import Urls
from modelhostd.core.origins import OriginPolicy, parse_target
from tests import gguf
from tests.adapters.downloads_support import tiny
from tests.adapters.loopback_objects import LoopbackObjects
from tests.adapters.loopback_site import LoopbackSite, Page


class Place(Protocol):
    """Where one kind of source keeps its models."""

    adapter: SourceAdapter

    def sample(self, data_bytes: int = 1000, seed: int = 0) -> dict[str, bytes]:
        """Return the files of a small model, of names that this source can have."""

    def put(self, name: str, files: Mapping[str, bytes]) -> str:
        """Put exactly these files there, as a new revision; return the source's URI."""

    def missing(self) -> str:
        """Return the URI of a source that is not there."""


class AnyNames:
    """Sources whose files have the names that somebody gave them."""

    def sample(self, data_bytes: int = 1000, seed: int = 0) -> dict[str, bytes]:
        return tiny(data_bytes, seed)


class HubPlace(AnyNames):
    def __init__(self, hub: LoopbackHub) -> None:
        self.hub = hub
        self.adapter: SourceAdapter = Hub(HubConfig(endpoint=hub.endpoint))

    def put(self, name: str, files: Mapping[str, bytes]) -> str:
        if (repo := self.hub.repos.get(f"org/{name}")) is not None:
            repo.commit(files)
        else:
            self.hub.repos[f"org/{name}"] = Repo(files)
        return f"hf://org/{name}"

    def missing(self) -> str:
        return "hf://org/missing"


class LocalPlace(AnyNames):
    def __init__(self, root: Path) -> None:
        self.root = root
        self.stamp = 10**18
        self.adapter: SourceAdapter = LocalFiles(LocalConfig((root,)))

    def put(self, name: str, files: Mapping[str, bytes]) -> str:
        folder = self.root / name
        shutil.rmtree(folder, ignore_errors=True)
        self.stamp += 1
        for path, data in files.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(data)
            os.utime(folder / path, ns=(self.stamp, self.stamp))
        return f"file://{folder}"

    def missing(self) -> str:
        return f"file://{self.root}/missing"


class UrlPlace(AnyNames):
    """A list with checksums, and its files behind a redirect to a CDN."""

    def __init__(self, site: LoopbackSite) -> None:
        self.site = site
        self.adapter: SourceAdapter = Urls(
            HttpSourceConfig(OriginPolicy().with_endpoints(site.url))
        )

    def put(self, name: str, files: Mapping[str, bytes]) -> str:
        lines = [f"{hashlib.sha256(data).hexdigest()}  {path}\n" for path, data in files.items()]
        self.site.pages[f"/{name}/SHA256SUMS"] = Page("".join(lines).encode())
        for path, data in files.items():
            at = f"/{name}/{path}"
            self.site.pages[at] = Page(
                b"", 302, {"Location": f"{self.site.cdn}{at}?signed"}, etag=""
            )
            self.site.cdn_pages[f"{at}?signed"] = Page(data)
        return f"{self.site.url}/{name}/SHA256SUMS"

    def missing(self) -> str:
        return f"{self.site.url}/missing/SHA256SUMS"


class GitHubPlace(AnyNames):
    """A release; its assets are named without folders."""

    def __init__(self, site: LoopbackSite) -> None:
        self.site = site
        self.ids = itertools.count(1)
        self.adapter: SourceAdapter = GitHub(HttpSourceConfig(), site.url)

    def put(self, name: str, files: Mapping[str, bytes]) -> str:
        assets = []
        for path, data in files.items():
            flat, number = path.replace("/", "-"), next(self.ids)
            told = hashlib.sha256(data).hexdigest() if number % 2 else None
            assets.append(
                {
                    "id": number,
                    "name": flat,
                    "size": len(data),
                    "state": "uploaded",
                    "digest": told and f"sha256:{told}",
                }
            )
            moved = Page(b"", 302, {"Location": f"{self.site.cdn}/{number}"}, etag="")
            self.site.pages[f"/org/{name}/releases/download/v1/{flat}"] = moved
            self.site.pages[f"/repos/org/{name}/releases/assets/{number}"] = moved
            self.site.cdn_pages[f"/{number}"] = Page(data)
        answer = json.dumps({"tag_name": "v1", "assets": assets}).encode()
        self.site.pages[f"/repos/org/{name}/releases/latest"] = Page(answer)
        return f"github://org/{name}"

    def sample(self, data_bytes: int = 1000, seed: int = 0) -> dict[str, bytes]:
        # Assets have no folders.
        return {path.replace("/", "-"): data for path, data in tiny(data_bytes, seed).items()}

    def missing(self) -> str:
        return "github://org/missing"


class OllamaPlace:
    """A manifest and layers; files are named for what they are."""

    KINDS: ClassVar = {"tiny.gguf": "model", "template.txt": "template", "params.json": "params"}

    def __init__(self, site: LoopbackSite) -> None:
        self.site = site
        self.adapter: SourceAdapter = Ollama(HttpSourceConfig(), site.url)

    def sample(self, data_bytes: int = 1000, seed: int = 0) -> dict[str, bytes]:
        weights = gguf.model(random.Random(seed).randbytes(data_bytes))
        return {"tiny.gguf": weights, "template.txt": b"{{ .Prompt }}", "params.json": b"{}"}

    def put(self, name: str, files: Mapping[str, bytes]) -> str:
        layers = []
        for path, data in files.items():
            if path not in self.KINDS:
                pytest.skip("a registry names its files itself")
            digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
            media = f"application/vnd.ollama.image.{self.KINDS[path]}"
            layers.append({"mediaType": media, "digest": digest, "size": len(data)})
            at = f"/v2/library/{name}/blobs/{digest}"
            self.site.pages[at] = Page(b"", 307, {"Location": f"{self.site.cdn}/{digest}"}, etag="")
            self.site.cdn_pages[f"/{digest}"] = Page(data)
        answer = json.dumps({"schemaVersion": 2, "layers": layers}).encode()
        self.site.pages[f"/v2/library/{name}/manifests/latest"] = Page(answer)
        return f"ollama://{name}"

    def missing(self) -> str:
        return "ollama://missing"


class ObjectPlace(AnyNames):
    """A prefix of a private bucket, listed two objects a page."""

    def __init__(self, store: LoopbackObjects, scheme: str) -> None:
        self.store, self.scheme = store, scheme
        origin = parse_target(store.url, store.url).origin
        store.page_size = 2
        if scheme == "s3":
            store.secret = "s3_canary"
            known = {origin: ("KEY", store.secret, store.access_key)}
            config = HttpSourceConfig(credentials=Credentials((), known))
            self.adapter: SourceAdapter = S3(config, store.url)
        else:
            store.token = "gs_canary"
            config = HttpSourceConfig(credentials=Credentials((), {origin: ("T", store.token)}))
            self.adapter = GoogleStorage(config, store.url)
        store.put("models/other/x.txt", b"x")

    def put(self, name: str, files: Mapping[str, bytes]) -> str:
        prefix = f"models/{name}/"
        for old in [old for old in self.store.objects if old.startswith(prefix)]:
            if old.removeprefix(prefix) not in files:
                del self.store.objects[old]
        for path, data in files.items():
            self.store.put(prefix + path, data)
        self.store.put(prefix, b"")
        return f"{self.scheme}://models/{name}"

    def missing(self) -> str:
        return f"{self.scheme}://models/missing"
