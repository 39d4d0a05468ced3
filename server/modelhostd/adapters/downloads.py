"""The Downloads port: plan, fetch, verify, publish; one artifact at a time becomes visible as a whole."""

import asyncio
import contextlib
import os
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from modelhostd.adapters.blobs import BlobStore
from modelhostd.adapters.cancel import Canceller
from modelhostd.adapters.connections import Connections
from modelhostd.adapters.contacts import Contact, Contacts
from modelhostd.adapters.formats import check_file
from modelhostd.adapters.hub import Hub, HubConfig
from modelhostd.adapters.hub_cache import HubCache
from modelhostd.adapters.hub_publish import HubPublisher
from modelhostd.adapters.layout import disk_errors
from modelhostd.adapters.parts import kept_spans
from modelhostd.adapters.progress import Meter
from modelhostd.adapters.publishing import publish
from modelhostd.adapters.pump import fetch_file, kept_whole, part_key
from modelhostd.adapters.remote_headers import predict
from modelhostd.adapters.retries import Patience, with_retries
from modelhostd.adapters.sampling import enter, ticking
from modelhostd.adapters.source import SourceAdapter
from modelhostd.adapters.threads import cancellable, first_failure
from modelhostd.adapters.throttle import Tap, Throttle
from modelhostd.adapters.transfer import Places, StreamConfig, Transfer
from modelhostd.adapters.trees import TreeStore
from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.manifest import Manifest
from modelhostd.core.resources import ModelFile, Phase, Progress, Source
from modelhostd.core.safetensors_header import Header, predicted_bytes
from modelhostd.core.sources import not_implemented, offered_as, scheme_of
from modelhostd.ports import DownloadJob, Fetched, FileProgress, RemoteFile, SourceFacts


class SourceDownloads:
    """Sources of every scheme in ``adapters``, and the way of their bytes; satisfies ``ports.Downloads``.

    A source of any other scheme is UNIMPLEMENTED.
    """

    def __init__(
        self,
        adapters: Mapping[str, SourceAdapter],
        store: BlobStore,
        trees: TreeStore,
        *,
        streams: StreamConfig | None = None,
        deadline_s: float = 0.0,
        cache: HubCache | None = None,
        publisher: HubPublisher | None = None,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._adapters = dict(adapters)
        self._store = store
        self._trees = trees
        self._streams = streams or StreamConfig()
        self._deadline_s = deadline_s
        self._cache = cache
        self._publisher = publisher
        self._now = now
        self._throttle = Throttle()
        self._contacts = Contacts(now)
        self._meters: dict[str, Meter] = {}

    def limit(self, rate: int) -> None:
        """Let all downloads together fetch ``rate`` bytes a second; 0 = no limit."""
        self._throttle.limit(rate)

    def limit_one(self, operation: str, rate: int) -> None:
        """The same for one download, if it is being fetched."""
        self._throttle.limit_one(operation, rate)

    def file_progress(self, operation: str) -> Sequence[FileProgress]:
        """Return how far each file of a running fetch is, by path."""
        meter = self._meters.get(operation)
        return meter.files() if meter is not None else ()

    def contact_with(self, scheme: str) -> Contact:
        """Return what became of the last question to a source of a scheme."""
        return self._contacts.get(scheme)

    async def inspect(self, source: Source, *, allow_unsafe: bool = False) -> SourceFacts:
        """Ask a source what it has: files, sizes, licence, task, and the weights' memory by headers."""
        canceller = Canceller()
        adapter = self._adapter(source)
        connections = adapter.connections(canceller, source)

        def ask() -> SourceFacts:
            # Whoever asks waits for the answer: no network is one, too.
            patience = Patience(adapter.retry, canceller, lambda _: None, offline_waits=False)
            facts = with_retries(
                lambda: adapter.plan(connections, source, allow_unsafe=allow_unsafe), patience
            )
            return predict(adapter, connections, facts)

        async with ticking(canceller, connections, None, None):
            return await self._contacts.asking(offered_as(source), cancellable(canceller, ask))

    async def fetch(self, job: DownloadJob, report: Callable[[Progress], None]) -> Fetched:
        """Plan, fetch what is missing, check, publish; all of it before the deadline, if there is one."""
        scheme = offered_as(job.source)

        def told(progress: Progress) -> None:
            self._contacts.progressed(scheme, progress)
            report(progress)

        try:
            async with asyncio.timeout(self._deadline_s or None):
                fetched = await self._fetched(job, told)
        except TimeoutError:
            raise ModelhostError(
                Reason.NETWORK_ERROR,
                f"{job.source.uri}: not there after {self._deadline_s:g} s; what was fetched is kept: "
                "download again, or raise downloads.deadline_s",
                {"source": job.source.uri, "cause": "deadline"},
            ) from None
        self._contacts.reached(scheme)
        return fetched

    async def _fetched(self, job: DownloadJob, report: Callable[[Progress], None]) -> Fetched:
        canceller = Canceller()
        adapter = self._adapter(job.source)
        connections = adapter.connections(canceller, job.source)
        meter = Meter()

        def ask() -> SourceFacts:
            return with_retries(
                lambda: adapter.plan(connections, job.source, allow_unsafe=job.allow_unsafe),
                Patience(adapter.retry, canceller, lambda retry: meter.retrying("", retry)),
            )

        with contextlib.ExitStack() as held:
            tap = held.enter_context(self._throttle.open(job.operation, job.rate_limit))
            self._meters[job.operation] = meter
            held.callback(self._meters.pop, job.operation, None)
            async with ticking(canceller, connections, meter, report):
                facts = await self._contacts.asking(
                    offered_as(job.source), cancellable(canceller, ask)
                )
                digests = (file.sha256 for file in facts.files if file.sha256)
                held.enter_context(self._store.hold(digests))
                held.callback(self._store.space.release, job.operation)
                manifest = await self._fetch(job, facts, connections, tap, meter, report)
            # The last wait of all: cancelled in it the artifact is taken back, after it nothing is.
            await publish(self._trees, manifest, canceller)
        return Fetched(facts, manifest.files, meter.reused_bytes, manifest.predicted_bytes)

    def _adapter(self, source: Source) -> SourceAdapter:
        adapter = self._adapters.get(scheme_of(source))
        if adapter is None:
            raise not_implemented(source, self._adapters)
        return adapter

    async def _fetch(
        self,
        job: DownloadJob,
        facts: SourceFacts,
        connections: Connections,
        tap: Tap,
        meter: Meter,
        report: Callable[[Progress], None],
    ) -> Manifest:
        canceller = connections.canceller
        adapter = self._adapter(job.source)
        meter.begin({file.path: file.size_bytes for file in facts.files})
        kept = await cancellable(canceller, partial(self._kept, facts, meter))
        missing = sorted(
            (file for file in facts.files if file.path not in kept),
            key=lambda file: (-file.size_bytes, file.path),
        )
        enter(meter, Phase.DOWNLOADING, report)
        # All that is missing, before its first byte.
        promise = partial(
            self._store.space.promise, job.operation, meter.left_bytes, canceller.is_cancelled
        )
        written = await cancellable(canceller, promise)
        transfer = Transfer(
            adapter,
            connections,
            self._store,
            meter,
            facts.source,
            facts.revision,
            job.model,
            written,
            tap,
            self._streams,
            Places(self._streams.connections_more),
        )
        digests = {**kept, **await self._fetch_files(transfer, missing)}
        self._store.space.release(job.operation)
        enter(meter, Phase.VERIFYING, report)
        headers = await cancellable(
            canceller, lambda: self._check(facts, digests, canceller, job.allow_unsafe)
        )
        files = tuple(
            ModelFile(file.path, file.size_bytes, digests[file.path])
            for file in sorted(facts.files, key=lambda file: file.path)
        )
        predicted = predicted_bytes(headers)
        enter(meter, Phase.COMMITTING, report)
        if self._publisher is not None:
            # Before our own commit, behind which nothing may wait: these files are verified.
            tell = partial(self._publisher.publish, facts, digests, canceller)
            await cancellable(canceller, tell)
        return self._manifest(job, facts, files, predicted)

    def _kept(self, facts: SourceFacts, meter: Meter) -> dict[str, str]:
        """Return path -> sha256 of what is here already; count it, and the parts to go on with."""
        kept: dict[str, str] = {}
        with disk_errors(self._store.home.path):
            verified = self._store.verified()
            for file in facts.files:
                key = part_key(file, facts.source, facts.revision)
                whole = kept_whole(self._store, file, key, verified)
                if whole is not None:
                    kept[file.path] = whole
                    meter.reuse(file.path, file.size_bytes)
                    meter.finish(file.path)
                else:
                    spans = kept_spans(self._store.home, key, file.size_bytes)
                    meter.reuse(file.path, spans.total)
        return kept

    async def _fetch_files(
        self, transfer: Transfer, missing: list[RemoteFile]
    ) -> Mapping[str, str]:
        """Fetch files side by side, the largest first; the first failure ends the others."""
        digests: dict[str, str] = {}
        queue = deque(missing)

        async def fetch_some() -> None:
            while queue:
                file = queue.popleft()
                digests[file.path] = await cancellable(
                    transfer.canceller, partial(self._fetch_one, transfer, file)
                )

        workers = min(transfer.adapter.files_at_once, len(missing))
        tasks = [asyncio.create_task(fetch_some()) for _ in range(workers)]
        if tasks:
            await first_failure(tasks, transfer.canceller)
        return digests

    def _fetch_one(self, transfer: Transfer, file: RemoteFile) -> str:
        """Return the SHA-256 of a file that is among the verified ones now."""
        if self._cache is not None:
            self._cache.take(transfer, file)
        return fetch_file(transfer, file)

    def _check(
        self,
        facts: SourceFacts,
        digests: Mapping[str, str],
        canceller: Canceller,
        allow_unsafe: bool,
    ) -> list[Header]:
        headers: list[Header] = []
        with disk_errors(self._store.home.path):
            names = self._store.verified_names()
            for file in facts.files:
                canceller.check()
                sha256 = digests[file.path]
                fd = self._store.open_content(sha256, names)
                try:
                    header = check_file(fd, file.path, facts.source.uri, allow_unsafe=allow_unsafe)
                except ModelhostError:
                    self._store.drop_verified(sha256)
                    raise
                finally:
                    os.close(fd)
                if header is not None:
                    headers.append(header)
        return headers

    def _manifest(
        self,
        job: DownloadJob,
        facts: SourceFacts,
        files: tuple[ModelFile, ...],
        predicted: int,
    ) -> Manifest:
        return Manifest(
            model=job.model,
            version=job.version,
            source=facts.source,
            revision=facts.revision,
            files=files,
            predicted_bytes=predicted,
            create_time=self._now(),
            source_task=facts.task,
            licence=facts.licence,
            tags=tuple(facts.tags),
            entry=job.manifest,
        )


class HubDownloads(SourceDownloads):
    """The Hugging Face Hub alone."""

    def __init__(
        self,
        config: HubConfig,
        store: BlobStore,
        trees: TreeStore,
        *,
        streams: StreamConfig | None = None,
        deadline_s: float = 0.0,
        now: Callable[[], float] = time.time,
    ) -> None:
        super().__init__(
            {"hf": Hub(config)}, store, trees, streams=streams, deadline_s=deadline_s, now=now
        )

    @property
    def contact(self) -> Contact:
        """What became of the last question to the Hub."""
        return self.contact_with("hf")
