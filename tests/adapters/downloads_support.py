"""Repositories, a home and the real adapters around a loopback Hub, for tests of downloads."""

import asyncio
import hashlib
import json
import os
import random
import struct
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from bench.loopback_hub import LoopbackHub
from modelhostd.adapters.blobs import BlobStore, StoreConfig
from modelhostd.adapters.connections import Credential
from modelhostd.adapters.credentials import Credentials
from modelhostd.adapters.downloads import HubDownloads
from modelhostd.adapters.files import FileStore
from modelhostd.adapters.hub import HubConfig
from modelhostd.adapters.parts import kept_spans
from modelhostd.adapters.transfer import StreamConfig
from modelhostd.adapters.trees import TreeStore
from modelhostd.adapters.wire import Limits
from modelhostd.core.errors import ModelhostError
from modelhostd.core.origins import Origin
from modelhostd.core.resources import Phase, Progress
from modelhostd.core.sources import parse_source
from modelhostd.core.transfer import RetryPolicy
from modelhostd.ports import DownloadJob, Fetched
from tests.support import wait_until

ROOT = Path(__file__).resolve().parents[2]
URI = "hf://org/tiny"
PATIENT = RetryPolicy(tries=4, base_s=0.001, cap_s=0.002)
"""Several tries, next to no waiting between them."""


def safetensors(data_bytes: int, seed: int = 0) -> bytes:
    """Return a valid safetensors file with one tensor of so many random bytes."""
    entry = {"dtype": "U8", "shape": [data_bytes], "data_offsets": [0, data_bytes]}
    header = json.dumps({"w": entry}).encode()
    return struct.pack("<Q", len(header)) + header + random.Random(seed).randbytes(data_bytes)


def tiny(data_bytes: int = 1000, seed: int = 0) -> dict[str, bytes]:
    """Return the files of a small repository."""
    return {
        "config.json": b'{"model_type": "bert"}',
        "model.safetensors": safetensors(data_bytes, seed),
        "nested/vocab.txt": b"a\nb\n",
        "empty.txt": b"",
    }


RANGED = StreamConfig(
    connections=4,
    connections_first=4,
    ranged_bytes=200_000,
    piece_bytes_min=150_000,
    piece_bytes_max=150_000,
)
"""Several connections at once for files of a few hundred kilobytes."""

SIZE = 2_000_000
FILES = tiny(SIZE)
"""A repository of two megabytes, nearly all of it in one LFS file."""
WEIGHTS = FILES["model.safetensors"]
SHA256 = hashlib.sha256(WEIGHTS).hexdigest()
CDN_PATH = f"/{SHA256}"
"""Where the loopback CDN has the weights."""


@dataclass
class Site:
    """One home directory with its adapters, talking to one hub."""

    home: Path
    hub: LoopbackHub
    token: str | None = None
    retry: RetryPolicy = PATIENT
    limits: Limits = field(default_factory=Limits)
    free_bytes: Callable[[], tuple[int, int]] | None = None
    sync_bytes: int = 1 << 20
    endpoint: str = ""
    streams: StreamConfig | None = None

    def __post_init__(self) -> None:
        config = StoreConfig(
            self.home,
            sync_bytes=self.sync_bytes,
            reserve_bytes=0,
            free_bytes=self.free_bytes,
        )
        self.store = BlobStore(config)
        self.trees = TreeStore(self.store)
        self.files = FileStore(self.store, self.trees)
        self.downloads = HubDownloads(
            HubConfig(
                endpoint=self.endpoint or self.hub.endpoint,
                credential=self.credential,
                retry=self.retry,
                limits=self.limits,
            ),
            self.store,
            self.trees,
            streams=self.streams,
        )
        self.reports: list[Progress] = []

    def credential(self, origin: Origin) -> Credential | None:
        """Return the token as it is now."""
        variables = {origin: ("HF_TOKEN", self.token)} if self.token else {}
        return Credentials((), variables).for_origin(origin)

    async def fetch(
        self,
        uri: str = URI,
        model: str = "tiny",
        version: int = 1,
        *,
        manifest: Mapping[str, object] | None = None,
        allow_unsafe: bool = False,
        report: Callable[[Progress], None] = lambda _: None,
        **patterns: tuple[str, ...],
    ) -> Fetched:
        """Run one download; its progress is in ``reports``."""
        self.reports = []

        def both(progress: Progress) -> None:
            self.reports.append(progress)
            report(progress)

        job = DownloadJob(
            operation=f"op-{model}-{version}",
            model=model,
            version=version,
            source=parse_source(uri, **patterns),
            manifest=manifest or {},
            allow_unsafe=allow_unsafe,
        )
        return await self.downloads.fetch(job, both)

    def content(self, model: str = "tiny", version: int = 1) -> dict[str, bytes]:
        """Return what a reader of the model's directory sees."""
        root = self.files.model_dir(model, version)
        return {
            str(path.relative_to(root)): path.read_bytes()
            for path in sorted(root.rglob("*"))
            if path.is_file()
        }

    def visible(self) -> list[str]:
        """Return the artifacts that are there, as model/version."""
        return sorted(
            str(path.relative_to(self.home / "models")) for path in self.home.glob("models/*/*")
        )

    def parts(self) -> list[Path]:
        """Return what is kept of unfinished files."""
        return sorted(self.home.glob("staging/parts/*.part"))

    def quarantined(self) -> list[Path]:
        """Return what is in quarantine, notes left out."""
        return [p for p in sorted(self.home.glob("quarantine/*")) if p.suffix != ".json"]

    @property
    def phases(self) -> list[Phase]:
        """The phases of the last download, each once, in order."""
        seen: list[Phase] = []
        for report in self.reports:
            if not seen or seen[-1] is not report.phase:
                seen.append(report.phase)
        return seen


def start_child(site: Site, *arguments: object, **environment: str) -> "subprocess.Popen[bytes]":
    """Start a process that downloads into the home; see ``download_child``."""
    path = os.pathsep.join(str(ROOT / part) for part in ("server", "client", "."))
    child = ROOT / "tests" / "adapters" / "download_child.py"
    return subprocess.Popen(
        [sys.executable, str(child), str(site.home), site.hub.endpoint, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": path, **environment},
        stdout=subprocess.PIPE,
    )


async def failure(site: Site, uri: str = URI) -> ModelhostError:
    """Return how fetching fails; nothing may be visible or left behind after it."""
    with pytest.raises(ModelhostError) as caught:
        await site.fetch(uri)
    assert site.visible() == []
    assert await site.files.check({}, deep=True, repair=False) == ()
    return caught.value


def cdn_ranges(hub: LoopbackHub) -> list[str]:
    """Return the Range headers that the CDN saw, in order ("" = none)."""
    return [r.headers.get("range", "") for r in hub.requests if r.where == "cdn"]


async def weights_at(site: Site, count: int) -> None:
    """Wait until exactly so many bytes of the weights are on disk, and in the journal."""
    await asyncio.to_thread(
        wait_until, lambda: kept_spans(site.store.home, SHA256, len(WEIGHTS)).total == count
    )
