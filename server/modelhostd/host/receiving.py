"""One upload from its first byte to its artifact, as ``fetching`` is of one download.

Rules:
1. Only a stream that ended with ``commit`` is published; what came of another is kept in staging.
2. Room on disk is made for it as for a download: the bytes that nobody promised wait at the sender's.
3. What its sender was told need not be sent does not go for it: it would have to be sent after all.
"""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack

import structlog

from modelhostd.core import artifacts
from modelhostd.core import operations as op_rules
from modelhostd.core.errors import ModelhostError, Reason, invalid
from modelhostd.core.resources import FINAL_STATES, ArtifactState, Model, ModelFile, Phase
from modelhostd.core.state import Edit
from modelhostd.core.uploads import UPLOAD, Steps, UploadChunk, UploadFile, UploadStart, UploadStep
from modelhostd.core.values import dataclass
from modelhostd.host.fetching import Fetching, job_of
from modelhostd.host.operations import Operations
from modelhostd.host.registry import Registry
from modelhostd.host.space import Space
from modelhostd.ports import DownloadJob, Files
from modelhostd.ports.uploads import Incoming, Uploads

log = structlog.get_logger(__name__)

UPLOAD_S = 86_400.0
"""The longest that one may take: a drip would keep the model from any other download for ever."""


ASKED_MAX = 8
"""Questions whose uploads have not begun, of which is known what was there: there may be 100,000 files in one."""


@dataclass
class Upload:
    """What a caller brings, and what is to be known of it."""

    start: UploadStart
    steps: AsyncIterator[UploadStep]
    broken: ModelhostError | None = None
    """What a caller is told whose stream ended too early."""
    whole: bool = False
    """Published: it is too late to stop."""


class Receiving:
    """Carries out uploads, and commits what comes of them."""

    def __init__(
        self,
        registry: Registry,
        operations: Operations,
        uploads: Uploads,
        fetching: Fetching,
        files: Files,
        space: Space,
    ) -> None:
        self._registry = registry
        self._operations = operations
        self._uploads = uploads
        self._fetching = fetching
        self._files = files
        self._space = space
        self._asked: dict[str, frozenset[str]] = {}
        """By model: the files that were there whole when its sender asked last."""

    async def have(self, model_id: str, files: Sequence[UploadFile]) -> Sequence[int]:
        """Return how many first bytes of each file are there; nothing is made or taken away.

        Raises INSUFFICIENT_DISK_SPACE where the rest would find no room, nor would any be made for it.
        """
        counts = await self._uploads.have(files)
        told = list(zip(files, counts, strict=True))
        missing = sum(file.size_bytes - n for file, n in told)
        there = frozenset(file.sha256 for file, n in told if file.sha256 and n == file.size_bytes)
        self._asked.pop(model_id, None)
        while len(self._asked) >= ASKED_MAX:
            self._asked.pop(next(iter(self._asked)))
        self._asked[model_id] = there
        with self._uploads.hold(there):
            try:
                await self._uploads.check_room(missing)
            except ModelhostError as error:
                if error.reason is not Reason.INSUFFICIENT_DISK_SPACE:
                    raise
                if not await self._space.could_make_room(missing, model_id):
                    raise
        return counts

    async def run(self, key: str, upload: Upload) -> None:
        """Carry out an upload to its end, which is committed; a cancellation is raised again."""
        try:
            await self._operations.settle(lambda: self._begun(key))
            async with asyncio.timeout(UPLOAD_S):
                await self._take(key, upload)
        except ModelhostError as error:
            await self._failed(key, error)
        except TimeoutError:
            await self._failed(
                key,
                ModelhostError(
                    Reason.DEADLINE_EXCEEDED,
                    f"the upload took longer than {UPLOAD_S:g} s and was ended; what came is kept, "
                    "begin again from there",
                    {"method": "UploadModelFiles"},
                ),
            )
        except asyncio.CancelledError:
            self._operations.conclude(lambda: self._cancelled(key))
            raise
        except Exception:
            log.exception("an upload failed unexpectedly", operation=key)
            text = f"upload '{key}' failed; the daemon's log has the cause under its id"
            await self._failed(key, ModelhostError(Reason.INTERNAL, text, {"errorId": key}))

    async def _take(self, key: str, upload: Upload) -> None:
        found = artifacts.artifact_of(self._registry.decided, key)
        assert found is not None
        job, steps = job_of(*found, key), Steps(upload.start.total_bytes)
        async with AsyncExitStack() as opened:
            opened.enter_context(self._uploads.hold(self._asked.pop(job.model, frozenset())))
            incoming = await self._opened(job, upload.start.total_bytes, opened)
            async for step in upload.steps:
                await self._take_step(step, steps, incoming, job.model)
            if not steps.committed:
                # A caller that is gone looks like this, too, before its cancellation is noticed.
                upload.broken = steps.unfinished()
                await self._operations.settle(lambda: self._cancelled(key))
                return
            files = await incoming.end()
            revision = upload.start.revision or _content_of(files)
            have = found[0].newest
            if have is not None and have.source == UPLOAD and have.revision == revision:
                await self._same(key, found[0], have.version, files)
                return
            fetched = await incoming.publish(revision)
            upload.whole = True
            await self._fetching.finish(key, fetched)

    async def _opened(self, job: DownloadJob, total_bytes: int, opened: AsyncExitStack) -> Incoming:
        """Begin, with room for all that will come."""

        async def open_one() -> Incoming:
            return await opened.enter_async_context(
                self._uploads.open(
                    job, total_bytes, lambda p: self._operations.report(job.operation, p)
                )
            )

        return await self._space.with_room(open_one, job.model, lambda: total_bytes)

    async def _take_step(
        self, step: UploadStep, steps: Steps, incoming: Incoming, model_id: str
    ) -> None:
        """Judge a step, then do it: nothing that is refused is written."""
        if isinstance(step, UploadFile):
            file = step
            steps.file(file)
            await self._space.with_room(
                lambda: incoming.begin(file), model_id, lambda: file.size_bytes - file.offset
            )
        elif isinstance(step, UploadChunk):
            steps.chunk(len(step.data))
            await incoming.write(step.data)
        else:
            steps.commit()

    async def _same(self, key: str, model: Model, version: int, files: Sequence[ModelFile]) -> None:
        """End with the artifact that is there already. Raises INVALID_ARGUMENT if it is another one."""
        have = await self._files.list_files(model.id, version)
        if _content_of(have) != _content_of(files):
            expected = f"another one than version {version} has, since the files are others"
            raise invalid("start.revision", expected, "the same")
        size = sum(file.size_bytes for file in files)
        result = {"model": model.id, "version": version, "file_count": len(files)}
        await self._operations.settle(
            lambda: [
                *artifacts.dropped(self._registry.decided, key, "UPLOAD_SAME"),
                *self._operations.succeeded(
                    key, {**result, "size_bytes": size, "reused_bytes": size}
                ),
            ]
        )

    def _begun(self, key: str) -> Sequence[Edit]:
        decided = self._registry.decided
        return [
            *self._operations.running(key, Phase.DOWNLOADING),
            *artifacts.moved(decided, key, ArtifactState.DOWNLOADING, "UPLOADING"),
        ]

    async def _failed(self, key: str, error: ModelhostError) -> None:
        await self._operations.settle(
            lambda: [
                *self._operations.failed(key, error),
                *artifacts.failed(self._registry.decided, key, error, "UPLOAD_FAILED"),
            ]
        )

    def _cancelled(self, key: str) -> Sequence[Edit]:
        decided = self._registry.decided
        operation = decided.operations.get(key)
        if operation is None or operation.state in FINAL_STATES:
            return ()
        return [
            *self._operations.failed(key, op_rules.cancelled_error(operation)),
            *artifacts.dropped(decided, key, "UPLOAD_CANCELLED"),
        ]


def _content_of(files: Sequence[ModelFile]) -> str:
    """Return a digest of what files are called and hold."""
    told = sorted((file.path, file.sha256) for file in files)
    return hashlib.sha256(repr(told).encode()).hexdigest()
