"""Uploads: a client's stream of files, from its first message to the artifact.

Rules:
1. An upload is an operation, but the bytes are the caller's: it ends with the stream that brings them.
2. Only a stream that ended with ``commit`` is published; what came of another is kept in staging.
3. Once everything is verified and published a cancellation comes too late.
"""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable, Sequence

import structlog

from modelhostd.core import artifacts
from modelhostd.core import operations as op_rules
from modelhostd.core.errors import ModelhostError, Reason, invalid
from modelhostd.core.resources import (
    FINAL_STATES,
    ArtifactState,
    Model,
    ModelFile,
    Operation,
    OperationKind,
    OperationState,
    Phase,
)
from modelhostd.core.state import Edit
from modelhostd.core.uploads import (
    UPLOAD,
    Steps,
    UploadChunk,
    UploadFile,
    UploadStart,
    UploadStep,
    check_files,
    check_start,
)
from modelhostd.host.fetching import Fetching, job_of
from modelhostd.host.operations import Operations
from modelhostd.host.registry import Registry, Request
from modelhostd.ports import Files
from modelhostd.ports.uploads import Incoming
from modelhostd.ports.uploads import Uploads as UploadsPort

log = structlog.get_logger(__name__)

UPLOAD_S = 86_400.0
"""The longest that one may take: a drip would keep the model from any other download for ever."""
END_S = 10.0
"""How long a caller that is gone holds its stream: until its last write is over."""


class Uploads:
    """Takes files from clients."""

    def __init__(
        self,
        registry: Registry,
        operations: Operations,
        uploads: UploadsPort,
        fetching: Fetching,
        files: Files,
    ) -> None:
        self._registry = registry
        self._operations = operations
        self._uploads = uploads
        self._files = files
        self._fetching = fetching

    async def have(self, model_id: str, files: Sequence[UploadFile]) -> Sequence[int]:
        """Return how many first bytes of each file need not be sent.

        Raises what an upload of these files would be refused with before its first byte.
        """
        artifacts.refuse_other_work(self._registry.decided.model(model_id))
        check_files(files)
        return await self._uploads.have(files)

    async def upload(
        self,
        model_id: str,
        start: UploadStart,
        steps: AsyncIterator[UploadStep],
        principal: str = "",
        request: Request | None = None,
    ) -> tuple[Model, int]:
        """Take a whole upload; return the model and the version that it is now.

        Raises the reasons of UploadModelFiles. Cancelled, it keeps what can be gone on with.
        """
        check_start(start)
        answered = await self._registry.answered(request)
        if answered is not None:
            return self._outcome(self._operations.get(answered))
        model = self._registry.decided.model(model_id)
        op_rules.refuse_while_deleted(self._registry.decided.operations.values(), model_id)
        work = _Work(self, start, steps)
        try:
            operation = await self._operations.start(
                OperationKind.UPLOAD,
                model=model_id,
                principal=principal,
                edits=lambda operation: artifacts.wanted_upload(model, operation),
                begun=work.begin,
            )
            await work.wait()
        except asyncio.CancelledError:
            await work.abandon()
            raise
        if request is not None:
            # Only now: an upload that broke is to be made again, under the same id.
            await self._registry.stage((), principal, request, operation.id)
        return self._outcome(self._operations.get(operation.id))

    async def abandon(self, model_id: str) -> None:
        """Cancel the model's uploads and wait for their ends."""
        for operation in list(self._registry.decided.operations.values()):
            if (
                operation.kind is OperationKind.UPLOAD
                and operation.model == model_id
                and operation.state not in FINAL_STATES
            ):
                await self._operations.cancel(operation.id)

    def _outcome(self, operation: Operation) -> tuple[Model, int]:
        if operation.error is not None:
            raise op_rules.raised(operation.error)
        assert operation.state is OperationState.SUCCEEDED, operation
        model = self._registry.committed.model(operation.model)
        version = operation.result["version"] if operation.result else 0
        return model, int(version)

    # --- the work of one, called by its task ----------------------------------------------------

    async def run(self, key: str, work: "_Work") -> None:
        """Carry out an upload to its end, which is committed; a cancellation is raised again."""
        try:
            await self._operations.settle(lambda: self._begun(key))
            async with asyncio.timeout(UPLOAD_S):
                await self._take(key, work)
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

    async def _take(self, key: str, work: "_Work") -> None:
        found = artifacts.artifact_of(self._registry.decided, key)
        assert found is not None
        job = job_of(*found, key)
        steps = Steps(work.start.total_bytes)
        opened = self._uploads.open(
            job, work.start.total_bytes, lambda p: self._operations.report(key, p)
        )
        async with opened as incoming:
            async for step in work.steps:
                await _take_step(step, steps, incoming)
            if not steps.committed:
                # A caller that is gone looks like this, too, before its cancellation is noticed.
                work.broken = steps.unfinished()
                await self._operations.settle(lambda: self._cancelled(key))
                return
            files = await incoming.end()
            revision = work.start.revision or _content_of(files)
            have = found[0].newest
            if have is not None and have.source == UPLOAD and have.revision == revision:
                await self._same(key, found[0], have.version, files)
                return
            fetched = await incoming.publish(revision)
            work.whole = True
            await self._fetching.finish(key, fetched)

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

    def on_cancel(self, key: str, stop: Callable[[], None]) -> None:
        """Let CancelOperation end an upload."""
        self._operations.on_cancel(key, stop)

    def cancelled_error(self, key: str) -> ModelhostError:
        """Return what the caller of a cancelled upload is told."""
        return op_rules.cancelled_error(self._registry.decided.operation(key))


class _Work:
    """One upload: what the caller waits for, and who may end it."""

    def __init__(
        self, uploads: Uploads, start: UploadStart, steps: AsyncIterator[UploadStep]
    ) -> None:
        self.start = start
        self.steps = steps
        self.broken: ModelhostError | None = None
        """What a caller is told whose stream ended too early."""
        self.whole = False
        """Published: it is too late to stop."""
        self._uploads = uploads
        self._key = ""
        self._task: asyncio.Task[None] | None = None
        self._stopped = False

    def begin(self, operation: Operation) -> None:
        """Begin, whether or not the caller still waits: an operation that is stored must end."""
        self._key = operation.id
        work = self._uploads.run(operation.id, self)
        self._task = asyncio.create_task(work, name=f"upload {operation.model}")
        self._uploads.on_cancel(operation.id, self.stop)
        if self._stopped:
            # Not before its first step: a task that never ran cleans nothing up.
            asyncio.get_running_loop().call_soon(self._task.cancel)

    def stop(self) -> None:
        """End it and keep what came, unless all of it is published."""
        self._stopped = True
        if self._task is not None and not self.whole and not self._task.cancelling():
            self._task.cancel()

    async def abandon(self) -> None:
        """End it, and give it time to: it reads from the caller's stream."""
        self.stop()
        if self._task is not None:
            await asyncio.wait([self._task], timeout=END_S)

    async def wait(self) -> None:
        """Wait for the end. Raises CANCELLED where somebody else cancelled it."""
        assert self._task is not None
        await asyncio.wait([self._task])
        if self.broken is not None:
            raise self.broken
        if self._task.cancelled():
            raise self._uploads.cancelled_error(self._key)


async def _take_step(step: UploadStep, steps: Steps, incoming: Incoming) -> None:
    """Judge a step, then do it: nothing that is refused is written."""
    if isinstance(step, UploadFile):
        steps.file(step)
        await incoming.begin(step)
    elif isinstance(step, UploadChunk):
        steps.chunk(len(step.data))
        await incoming.write(step.data)
    else:
        steps.commit()


def _content_of(files: Sequence[ModelFile]) -> str:
    """Return a digest of what files are called and hold."""
    told = sorted((file.path, file.sha256) for file in files)
    return hashlib.sha256(repr(told).encode()).hexdigest()
