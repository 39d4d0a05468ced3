"""Uploads as their callers see them: a stream of files, its operation and its answer.

Rules:
1. An upload is an operation, but the bytes are the caller's: it ends with the stream that brings them.
2. Once everything is verified and published a cancellation comes too late.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence

from modelhostd.core import artifacts
from modelhostd.core import operations as op_rules
from modelhostd.core.resources import FINAL_STATES, Model, Operation, OperationKind, OperationState
from modelhostd.core.uploads import UploadFile, UploadStart, UploadStep, check_files, check_start
from modelhostd.host.operations import Operations
from modelhostd.host.receiving import Receiving, Upload
from modelhostd.host.registry import Registry, Request

END_S = 10.0
"""How long a caller that is gone holds its stream: until its last write is over."""


class Uploads:
    """Takes files from clients."""

    def __init__(self, registry: Registry, operations: Operations, receiving: Receiving) -> None:
        self._registry = registry
        self._operations = operations
        self._receiving = receiving

    async def have(self, model_id: str, files: Sequence[UploadFile]) -> Sequence[int]:
        """Return how many first bytes of each file need not be sent.

        Raises what an upload of these files would be refused with before its first byte.
        """
        artifacts.refuse_other_work(self._registry.decided.model(model_id))
        check_files(files)
        return await self._receiving.have(model_id, files)

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
        work = _Work(self._operations, self._receiving, Upload(start, steps))
        try:
            operation = await self._operations.start(
                OperationKind.UPLOAD,
                model=model_id,
                principal=principal,
                edits=lambda operation: artifacts.wanted_upload(model, operation),
                begun=work.begin,
            )
            cancelled = await work.wait()
        except asyncio.CancelledError:
            await work.abandon()
            raise
        if cancelled:
            raise op_rules.cancelled_error(self._registry.decided.operation(operation.id))
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


class _Work:
    """The task of one upload: what the caller waits for, and who may end it."""

    def __init__(self, operations: Operations, receiving: Receiving, upload: Upload) -> None:
        self._operations = operations
        self._receiving = receiving
        self._upload = upload
        self._task: asyncio.Task[None] | None = None
        self._stopped = False

    def begin(self, operation: Operation) -> None:
        """Begin, whether or not the caller still waits: an operation that is stored must end."""
        work = self._receiving.run(operation.id, self._upload)
        self._task = asyncio.create_task(work, name=f"upload {operation.model}")
        self._operations.on_cancel(operation.id, self.stop)
        if self._stopped:
            # Not before its first step: a task that never ran cleans nothing up.
            asyncio.get_running_loop().call_soon(self._task.cancel)

    def stop(self) -> None:
        """End it and keep what came, unless all of it is published."""
        self._stopped = True
        if self._task is not None and not self._upload.whole and not self._task.cancelling():
            self._task.cancel()

    async def abandon(self) -> None:
        """End it, and give it time to: it reads from the caller's stream."""
        self.stop()
        if self._task is not None:
            await asyncio.wait([self._task], timeout=END_S)

    async def wait(self) -> bool:
        """Wait for the end; tell whether somebody else cancelled it. Raises what broke the stream."""
        assert self._task is not None
        await asyncio.wait([self._task])
        if self._upload.broken is not None:
            raise self._upload.broken
        return self._task.cancelled()
