"""One kind of source, the real downloads and a real store: what tests of a source ask and look at."""

from pathlib import Path

import pytest

from modelhostd.adapters.blobs import BlobStore, StoreConfig
from modelhostd.adapters.downloads import SourceDownloads
from modelhostd.adapters.files import FileStore
from modelhostd.adapters.source import SourceAdapter
from modelhostd.adapters.trees import TreeStore
from modelhostd.core.errors import ModelhostError
from modelhostd.core.resources import Progress, Source
from modelhostd.core.sources import parse_source
from modelhostd.ports import DownloadJob, Fetched, SourceFacts


class SourceDesk:
    """A home whose downloads know one adapter, under whatever scheme is asked for."""

    def __init__(self, home: Path, adapter: SourceAdapter) -> None:
        self.home = home
        store = BlobStore(StoreConfig(home, reserve_bytes=0))
        trees = TreeStore(store)
        self.files = FileStore(store, trees)
        schemes = ("hf", "https", "http", "github", "ollama", "file", "s3", "gs")
        self.downloads = SourceDownloads(dict.fromkeys(schemes, adapter), store, trees)
        self.reports: list[Progress] = []

    async def inspect(self, uri: str) -> SourceFacts:
        """Return what a source has."""
        return await self.downloads.inspect(parse_source(uri))

    async def fetch(self, source: str | Source, version: int = 1) -> Fetched:
        """Run one download of the model ``tiny``."""
        source = parse_source(source) if isinstance(source, str) else source
        job = DownloadJob("op", "tiny", version, source, {})
        return await self.downloads.fetch(job, self.reports.append)

    async def refused(self, uri: str, version: int = 1) -> ModelhostError:
        """Return how fetching fails: nothing of it may be visible, and the message is plain."""
        before = list(self.home.glob("models/*/*"))
        with pytest.raises(ModelhostError) as caught:
            await self.fetch(uri, version)
        assert list(self.home.glob("models/*/*")) == before
        assert caught.value.message.isprintable()
        return caught.value

    def content(self, version: int = 1) -> dict[str, bytes]:
        """Return what a reader of the model's directory sees."""
        root = self.files.model_dir("tiny", version)
        found = sorted(path for path in root.rglob("*") if path.is_file())
        return {str(path.relative_to(root)): path.read_bytes() for path in found}
