"""A downloads port without a network: repositories in memory, held, failed and stepped by the test.

``downloads.add(uri, files)`` puts a source there. ``hold = downloads.hold(uri)`` makes a fetch stop
half-way through its bytes: ``await hold.reached.wait()``, then ``hold.release()``.
"""

import asyncio
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.resources import ModelFile, Phase, Progress, Source
from modelhostd.core.selection import select
from modelhostd.ports import DownloadJob, Fetched, FileProgress, RemoteFile, SourceFacts
from tests.fakes.files import FakeFiles


@dataclass
class FakeRepo:
    """One source: its files now, and what it says of itself."""

    files: dict[str, bytes]
    revision: str
    task: str = ""
    licence: str = ""
    tags: Sequence[str] = ()
    gated: bool = False
    private: bool = False
    predicted_bytes: int = 0


@dataclass
class Hold:
    """Where a fetch stands still until the test lets it go on."""

    reached: asyncio.Event = field(default_factory=asyncio.Event)
    _go: asyncio.Event = field(default_factory=asyncio.Event)

    def release(self) -> None:
        """Let the fetch go on."""
        self._go.set()

    async def stop(self) -> None:
        """Tell that the fetch is here, and wait."""
        self.reached.set()
        await self._go.wait()


class FakeDownloads:
    """Sources in memory; satisfies ``modelhostd.ports.Downloads``."""

    def __init__(self, files: FakeFiles | None = None, *, steps: int = 4) -> None:
        self.files = files or FakeFiles()
        self.steps = steps
        """Progress samples per fetch while its bytes come."""
        self.repos: dict[str, FakeRepo] = {}
        self.jobs: list[DownloadJob] = []
        """Every fetch that was begun, in order."""
        self.inspected: list[Source] = []
        self.rate = 0
        self.rates: dict[str, int] = {}
        """The limits in force: of all, and of each running fetch by its operation."""
        self.active = 0
        self.active_max = 0
        self._holds: dict[tuple[str, Phase], Hold] = {}
        self._failures: dict[str, list[tuple[ModelhostError, Phase]]] = {}
        self._kept: dict[str, int] = {}
        self._running: dict[str, tuple[Mapping[str, bytes], float]] = {}

    # What tests do.

    def add(
        self, uri: str, files: Mapping[str, bytes], revision: str = "", **facts: object
    ) -> FakeRepo:
        """Put a source there, or a new revision of it; the revision defaults to a digest."""
        if not revision:
            seed = repr(sorted((path, data) for path, data in files.items())).encode()
            revision = hashlib.sha1(seed, usedforsecurity=False).hexdigest()
        repo = FakeRepo(dict(files), revision, **facts)  # type: ignore[arg-type]
        self.repos[uri] = repo
        return repo

    def hold(self, uri: str, phase: Phase = Phase.DOWNLOADING) -> Hold:
        """Make every fetch of ``uri`` stop in ``phase`` (DOWNLOADING: with half the bytes done)."""
        return self._holds.setdefault((uri, phase), Hold())

    def unhold(self, uri: str, phase: Phase = Phase.DOWNLOADING) -> None:
        """Let later fetches pass, and the held ones too."""
        self._holds.pop((uri, phase)).release()

    def fail(
        self, uri: str, error: ModelhostError, phase: Phase = Phase.PLANNING, times: int = 1
    ) -> None:
        """Make the next ``times`` fetches of ``uri`` fail in ``phase`` (PLANNING: inspect too)."""
        self._failures.setdefault(uri, []).extend([(error, phase)] * times)

    # The port.

    async def inspect(self, source: Source, *, allow_unsafe: bool = False) -> SourceFacts:
        """Answer from the repository in memory."""
        self.inspected.append(source)
        self._maybe_fail(source.uri, Phase.PLANNING)
        return self._facts(source, allow_unsafe=allow_unsafe)

    async def fetch(self, job: DownloadJob, report: Callable[[Progress], None]) -> Fetched:
        """Walk through the phases, then put the tree into the fake files in one step."""
        self.jobs.append(job)
        self.rates[job.operation] = job.rate_limit
        self.active += 1
        self.active_max = max(self.active_max, self.active)
        try:
            return await self._fetch(job, report)
        finally:
            self.active -= 1
            self.files.release(job.operation)
            self.rates.pop(job.operation)
            self._running.pop(job.operation, None)

    def limit(self, rate: int) -> None:
        """Remember the limit of all."""
        self.rate = rate

    def limit_one(self, operation: str, rate: int) -> None:
        """Remember the limit of one that runs."""
        if operation in self.rates:
            self.rates[operation] = rate

    def file_progress(self, operation: str) -> Sequence[FileProgress]:
        """Return each file as far along as the whole is."""
        content, share = self._running.get(operation, ({}, 0.0))
        return [
            FileProgress(path, int(len(data) * share), len(data))
            for path, data in sorted(content.items())
        ]

    async def _fetch(self, job: DownloadJob, report: Callable[[Progress], None]) -> Fetched:
        uri = job.source.uri
        report(Progress(Phase.PLANNING))
        await self._pass(uri, Phase.PLANNING)
        facts = self._facts(job.source, allow_unsafe=job.allow_unsafe)
        content = {file.path: self.repos[uri].files[file.path] for file in facts.files}
        total = sum(map(len, content.values()))
        reused = sum(
            len(data)
            for data in content.values()
            if hashlib.sha256(data).hexdigest() in self.files.blobs
        )
        kept = min(self._kept.get(facts.revision, 0), total - reused)
        sample = Progress(
            Phase.DOWNLOADING,
            done_bytes=reused + kept,
            total_bytes=total,
            total_files=len(content),
            reused_bytes=reused + kept,
        )
        start = sample.done_bytes
        digests = frozenset(hashlib.sha256(data).hexdigest() for data in content.values())
        self.files.promise(job.operation, total - start, digests)
        for step in range(self.steps + 1):
            done = start + (total - start) * step // self.steps
            sample = replace(
                sample,
                done_bytes=done,
                done_files=len(content) * step // self.steps,
                bytes_per_second=float(total - start),
                eta_s=(total - done) / (total - start) if total > start else 0.0,
            )
            report(sample)
            self._running[job.operation] = content, done / total if total else 1.0
            self._kept[facts.revision] = done - reused
            if step == self.steps // 2:
                await self._pass(uri, Phase.DOWNLOADING)
            await asyncio.sleep(0)
        for phase in (Phase.VERIFYING, Phase.COMMITTING):
            report(replace(sample, phase=phase))
            await self._pass(uri, phase)
        self._kept.pop(facts.revision, None)
        files: Sequence[ModelFile] = self.files.put(job.model, job.version, content, job.manifest)
        return Fetched(facts, files, reused + kept, facts.predicted_bytes)

    async def _pass(self, uri: str, phase: Phase) -> None:
        if (hold := self._holds.get((uri, phase))) is not None:
            await hold.stop()
        self._maybe_fail(uri, phase)

    def _maybe_fail(self, uri: str, phase: Phase) -> None:
        failures = self._failures.get(uri, [])
        if failures and failures[0][1] is phase:
            raise failures.pop(0)[0]

    def _facts(self, source: Source, *, allow_unsafe: bool = False) -> SourceFacts:
        if not source.uri.startswith("hf://"):
            scheme = source.uri.partition("://")[0]
            raise ModelhostError(
                Reason.UNIMPLEMENTED,
                f"fetching {scheme}:// sources is not implemented yet; use hf://org/name",
                {"method": "DownloadModel"},
            )
        repo = self.repos.get(source.uri)
        if repo is None or (source.revision and source.revision not in {"main", repo.revision}):
            missing = "repository" if repo is None else "revision"
            raise ModelhostError(
                Reason.SOURCE_NOT_FOUND,
                f"{source.uri}: {missing} not found",
                {"source": source.uri, "missing": missing},
            )
        selection = select(
            tuple(repo.files),
            source.allow_patterns,
            source.ignore_patterns,
            allow_unsafe=allow_unsafe,
            source=source.uri,
        )
        return SourceFacts(
            source=source,
            revision=repo.revision,
            files=tuple(
                RemoteFile(path, len(data), hashlib.sha256(data).hexdigest())
                for path, data in repo.files.items()
                if path in selection.chosen
            ),
            skipped=selection.skipped,
            task=repo.task,
            licence=repo.licence,
            tags=tuple(repo.tags),
            gated=repo.gated,
            private=repo.private,
            predicted_bytes=repo.predicted_bytes,
        )
