"""Loads of models whose files are not there yet: a download first, then the load, as one operation.

The download is an operation of its own, which others may have begun and may join; the LOAD shows its
progress, and ends with its error. Cancelling the LOAD leaves the download alone.
"""

import asyncio

import structlog

from modelhostd.core import operations as op_rules
from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.resources import (
    FINAL_STATES,
    Operation,
    OperationKind,
    Phase,
)
from modelhostd.host.operations import Operations
from modelhostd.host.registry import Registry, Request
from modelhostd.host.residency import Residency
from modelhostd.host.transfers import Transfers

log = structlog.get_logger(__name__)


class FetchedLoads:
    """Runs one task for each load that waits for its model's files."""

    def __init__(
        self,
        registry: Registry,
        operations: Operations,
        transfers: Transfers,
        residency: Residency,
    ) -> None:
        self._registry = registry
        self._operations = operations
        self._transfers = transfers
        self._residency = residency
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._stopping = False

    async def load(
        self,
        model_id: str,
        *,
        device: str = "",
        priority: int | None = None,
        principal: str = "",
        request: Request | None = None,
    ) -> Operation:
        """Return the operation that brings a model to READY, by way of a download where it must be.

        Raises what ``Residency.load`` raises, but for MODEL_NOT_DOWNLOADED.
        """
        answered = await self._registry.answered(request)
        if answered is not None:
            return self._operations.get(answered)
        model = self._registry.decided.model(model_id)
        if model.available is not None:
            return await self._residency.load(
                model_id, device=device, priority=priority, principal=principal, request=request
            )
        if device:
            self._registry.decided.device(device)
        op_rules.refuse_while_deleted(self._registry.decided.operations.values(), model_id)
        return await self._operations.start(
            OperationKind.LOAD,
            model=model_id,
            join_key=f"load:{model_id}",
            priority=priority or 0,
            principal=principal,
            request=request,
            begun=lambda operation: self._begun(operation, device, priority, principal),
        )

    def _begun(
        self, operation: Operation, device: str, priority: int | None, principal: str
    ) -> None:
        task = asyncio.create_task(
            self._run(operation, device, priority, principal), name=f"fetch {operation.model}"
        )
        self._tasks[operation.id] = task
        task.add_done_callback(lambda t: self._ended(operation, t))
        self._operations.on_cancel(operation.id, lambda: _cancel(task))

    async def stop(self) -> None:
        """End the waits; their operations end with the daemon."""
        self._stopping = True
        for task in self._tasks.values():
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks.values())

    async def _run(
        self, operation: Operation, device: str, priority: int | None, principal: str
    ) -> None:
        self._registry.record(self._operations.running(operation.id, Phase.WAITING))
        try:
            download = await self._transfers.download(
                operation.model, priority=priority or 0, principal=principal
            )
            await self._operations.follow(download.id, operation.id)
            if self._registry.decided.operation(operation.id).state not in FINAL_STATES:
                self._residency.loads.want_for(
                    operation.model, operation.id, device=device, priority=priority
                )
        except ModelhostError as error:
            failure = error
            await self._operations.settle(lambda: self._operations.failed(operation.id, failure))

    def _ended(self, operation: Operation, task: "asyncio.Task[None]") -> None:
        del self._tasks[operation.id]
        if task.cancelled() and not self._stopping:
            cancelled = op_rules.cancelled_error(operation)
            self._registry.record(self._operations.failed(operation.id, cancelled))
        elif not task.cancelled() and task.exception() is not None:
            log.error(
                "a load failed unexpectedly", operation=operation.id, exc_info=task.exception()
            )
            self._registry.record(self._operations.failed(operation.id, _unexpected(operation)))


def _unexpected(operation: Operation) -> ModelhostError:
    return ModelhostError(
        Reason.LOAD_FAILED,
        f"loading model '{operation.model}' failed; the daemon's log has the cause",
        {"model": operation.model},
    )


def _cancel(task: "asyncio.Task[None]") -> None:
    task.cancel()
