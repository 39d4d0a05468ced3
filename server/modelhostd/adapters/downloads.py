"""The Downloads port: plan, fetch, verify, publish; one artifact at a time becomes visible as a whole."""

import asyncio
import contextlib
import os
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial

from modelhostd.adapters.blobs import BlobStore
from modelhostd.adapters.cancel import Canceller
from modelhostd.adapters.connections import Connections
from modelhostd.adapters.formats import check_file
from modelhostd.adapters.hub import Hub, HubConfig
from modelhostd.adapters.layout import disk_errors
from modelhostd.adapters.parts import kept_bytes
from modelhostd.adapters.progress import Meter
from modelhostd.adapters.pump import Transfer, fetch_file, kept_whole, part_key, with_retries
from modelhostd.adapters.remote_headers import predict
from modelhostd.adapters.threads import cancellable, in_thread, to_the_end
from modelhostd.adapters.trees import TreeStore
from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.manifest import Manifest
from modelhostd.core.resources import ModelFile, Phase, Progress, Source
from modelhostd.core.safetensors_header import Header, predicted_bytes
from modelhostd.core.sources import not_implemented, scheme_of
from modelhostd.core.tasks import task_of
from modelhostd.ports import DownloadJob, Fetched, RemoteFile, SourceFacts

TICK_S = 0.1
"""How often progress is sampled and standing connections are looked for."""


@dataclass(frozen=True, slots=True)
class Contact:
    """What became of the last question to a source: UNKNOWN, REACHABLE, UNREACHABLE or OFFLINE."""

    state: str = "UNKNOWN"
    message: str = ""
    time: float = 0.0


class HubDownloads:
    """Sources of the ``hf`` scheme and the way of their bytes; satisfies ``ports.Downloads``."""

    def __init__(
        self,
        config: HubConfig,
        store: BlobStore,
        trees: TreeStore,
        *,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._hub = Hub(config)
        self._store = store
        self._trees = trees
        self._now = now
        self.contact = Contact()

    async def inspect(self, source: Source) -> SourceFacts:
        """Ask the Hub what it has: files, sizes, licence, task, and the weights' memory by headers."""
        canceller = Canceller()
        connections = self._connect(canceller, source)

        def ask() -> SourceFacts:
            facts = with_retries(
                lambda: self._hub.plan(connections, source),
                self._hub.config.retry,
                canceller,
                lambda _: None,
            )
            return predict(self._hub, connections, facts)

        async with _ticking(canceller, connections, None, None):
            return await self._noted(cancellable(canceller, ask))

    async def fetch(self, job: DownloadJob, report: Callable[[Progress], None]) -> Fetched:
        """Plan, fetch what is missing, check, publish."""
        canceller = Canceller()
        connections = self._connect(canceller, job.source)
        meter = Meter()

        def ask() -> SourceFacts:
            return with_retries(
                lambda: self._hub.plan(connections, job.source, allow_unsafe=job.allow_unsafe),
                self._hub.config.retry,
                canceller,
                lambda attempt: meter.retrying("", attempt),
            )

        with contextlib.ExitStack() as held:
            async with _ticking(canceller, connections, meter, report):
                facts = await self._noted(cancellable(canceller, ask))
                digests = (file.sha256 for file in facts.files if file.sha256)
                held.enter_context(self._store.hold(digests))
                manifest = await self._fetch(job, facts, connections, meter, report)
            # The last wait of all: cancelled in it the artifact is taken back, after it nothing is.
            await self._publish(manifest, canceller)
        return Fetched(facts, manifest.files, meter.reused_bytes, manifest.predicted_bytes)

    async def _noted(self, asking: Awaitable[SourceFacts]) -> SourceFacts:
        """Return the source's facts, and note whether it could be reached."""
        state, message = "REACHABLE", ""
        try:
            return await asking
        except ModelhostError as error:
            if error.reason in (Reason.NETWORK_ERROR, Reason.OFFLINE):
                state = "OFFLINE" if error.reason is Reason.OFFLINE else "UNREACHABLE"
                message = error.message
            raise
        except asyncio.CancelledError:
            state, message = self.contact.state, self.contact.message
            raise
        finally:
            self.contact = Contact(state, message, self._now())

    def _connect(self, canceller: Canceller, source: Source) -> Connections:
        if scheme_of(source) != "hf":
            raise not_implemented(source)
        return self._hub.connections(canceller, source)

    async def _fetch(
        self,
        job: DownloadJob,
        facts: SourceFacts,
        connections: Connections,
        meter: Meter,
        report: Callable[[Progress], None],
    ) -> Manifest:
        canceller = connections.canceller
        meter.begin({file.path: file.size_bytes for file in facts.files})
        kept = await cancellable(canceller, partial(self._kept, facts, meter))
        missing = sorted(
            (file for file in facts.files if file.path not in kept),
            key=lambda file: (-file.size_bytes, file.path),
        )
        _enter(meter, Phase.DOWNLOADING, report)
        with self._store.reserve(job.operation, meter.left_bytes) as written:
            transfer = Transfer(
                self._hub,
                connections,
                self._store,
                meter,
                facts.source,
                facts.revision,
                job.model,
                written,
            )
            digests = {**kept, **await self._fetch_files(transfer, missing)}
        _enter(meter, Phase.VERIFYING, report)
        headers = await cancellable(
            canceller, lambda: self._check(facts, digests, canceller, job.allow_unsafe)
        )
        files = tuple(
            ModelFile(file.path, file.size_bytes, digests[file.path])
            for file in sorted(facts.files, key=lambda file: file.path)
        )
        predicted = predicted_bytes(headers)
        _enter(meter, Phase.COMMITTING, report)
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
                    meter.reuse(file.path, kept_bytes(self._store.home, key, file.size_bytes))
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
                    transfer.canceller, partial(fetch_file, transfer, file)
                )

        workers = min(self._hub.config.files_at_once, len(missing))
        tasks = [asyncio.create_task(fetch_some()) for _ in range(workers)]
        try:
            await asyncio.gather(*tasks)
        except BaseException:
            transfer.canceller.cancel()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            raise
        return digests

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
            task=task_of(facts.task, facts.tags),
            licence=facts.licence,
            tags=tuple(facts.tags),
            entry=job.manifest,
        )

    async def _publish(self, manifest: Manifest, canceller: Canceller) -> None:
        """Publish to the end: cancelled before the rename nothing happened, after it is undone."""
        future = in_thread(partial(self._trees.publish, manifest, canceller.is_cancelled))
        try:
            await asyncio.shield(future)
        except asyncio.CancelledError:
            canceller.cancel()
            await to_the_end(future)
            if future.exception() is None:
                await to_the_end(
                    in_thread(partial(self._trees.remove, manifest.model, manifest.version))
                )
            raise


def _enter(meter: Meter, phase: Phase, report: Callable[[Progress], None]) -> None:
    """Go to the next phase and say so at once: a phase may be over before the next sample."""
    meter.enter(phase)
    report(meter.snapshot(time.monotonic()))


@asynccontextmanager
async def _ticking(
    canceller: Canceller,
    connections: Connections,
    meter: Meter | None,
    report: Callable[[Progress], None] | None,
) -> AsyncIterator[None]:
    """Sample progress and end standing connections while the body runs; close everything after it."""

    async def tick() -> None:
        last: Progress | None = None
        while True:
            now = time.monotonic()
            canceller.expire(now)
            if meter is not None and report is not None:
                sample = meter.snapshot(now)
                if sample != last:
                    report(sample)
                    last = sample
            await asyncio.sleep(TICK_S)

    ticker = asyncio.create_task(tick())
    try:
        yield
    finally:
        ticker.cancel()
        try:
            await asyncio.gather(ticker, return_exceptions=True)
        finally:
            connections.close()
