"""Downloads: the queue, the tasks that fetch, and how they are interrupted.

Rules:
1. Only what is committed as QUEUED is started, higher priority first, then first come.
2. An interruption (cancel, pause) is an intent until it is committed; nothing starts meanwhile.
3. What has been fetched whole is kept: from then on an interruption comes too late.
"""

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial

import structlog

from modelhostd.core import artifacts, sources
from modelhostd.core import operations as op_rules
from modelhostd.core.errors import ModelhostError, Reason, invalid
from modelhostd.core.resources import (
    FINAL_STATES,
    Artifact,
    ArtifactState,
    Model,
    Operation,
    OperationKind,
    OperationState,
    Phase,
    Progress,
)
from modelhostd.core.state import Edit
from modelhostd.host.fetching import Fetching, download_result
from modelhostd.host.operations import Operations
from modelhostd.host.registry import Registry, Request
from modelhostd.host.room_waits import RoomWaits
from modelhostd.host.space import Space
from modelhostd.ports import Downloads, FileProgress

log = structlog.get_logger(__name__)

CANCEL, PAUSE = "cancel", "pause"
PAUSE_WAIT_S = 10.0
ABANDON_WAIT_S = 60.0
CANCELLED_S = 1.0


class Transfers:
    """Runs at most ``max_concurrent_downloads`` downloads at a time, and ``per_host`` from one host."""

    def __init__(
        self,
        registry: Registry,
        operations: Operations,
        downloads: Downloads,
        fetching: Fetching,
        space: Space,
        *,
        per_host: int = 0,
    ) -> None:
        self._registry = registry
        self._operations = operations
        self._downloads = downloads
        self._per_host = per_host
        self._fetching = fetching
        self.waits = RoomWaits(registry, space.make_room, self.resume)
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._hosts: dict[str, str] = {}
        self._started: set[str] = set()
        self._finishing: set[str] = set()
        self._intents: dict[str, str] = {}
        self._asides: dict[str, asyncio.Task[None]] = {}
        self._stopping = False

    # --- commands -------------------------------------------------------------------------------

    async def download(
        self,
        model_id: str,
        *,
        priority: int = 0,
        rate_limit: int = 0,
        refresh: bool = False,
        allow_unsafe: bool = False,
        principal: str = "",
        request: Request | None = None,
    ) -> Operation:
        """Return the operation that brings a model's files to disk, joined if it runs already.

        Files that are on disk from the model's source are left alone and the operation has SUCCEEDED,
        unless ``refresh`` asks the source for a newer revision. With ``allow_unsafe`` files that can
        run code when loaded may come, too; one that runs without them is not joined.
        """
        answered = await self._registry.answered(request)
        if answered is not None:
            return self._operations.get(answered)
        decided = self._registry.decided
        model = decided.model(model_id)
        op_rules.refuse_while_deleted(decided.operations.values(), model_id)
        have = None if refresh else artifacts.fetched_already(model)
        if have is not None:
            return await self._done_already(model, have, principal, request)
        if allow_unsafe:
            self._refuse_a_safe_one(model_id)
        return await self._operations.start(
            OperationKind.DOWNLOAD,
            model=model_id,
            join_key=_join_key(model_id),
            priority=priority,
            rate_limit=rate_limit,
            principal=principal,
            request=request,
            edits=lambda operation: artifacts.wanted(model, operation, allow_unsafe=allow_unsafe),
            begun=lambda operation: self._begun(operation.id),
        )

    def _refuse_a_safe_one(self, model_id: str) -> None:
        running = self._registry.decided.active_operation(_join_key(model_id))
        found = running and artifacts.artifact_of(self._registry.decided, running.id)
        if running is not None and found and not found[1].allow_unsafe:
            raise ModelhostError(
                Reason.CONFLICTING_OPERATION,
                f"a download of model '{model_id}' without allow_unsafe is under way; wait for it or "
                "cancel it, then ask again",
                {"model": model_id, "operation": running.id},
            )

    async def pause(self, key: str) -> Operation:
        """Stop a download's bytes and keep what is there; PAUSED until ResumeOperation."""
        operation = self._download(key, "paused")
        if operation.state is not OperationState.PAUSED or self._waits_for_room(key):
            self._interrupt(key, PAUSE)
            await self._quiet([key], PAUSE_WAIT_S)
        return self._operations.get(key)

    async def resume(self, key: str) -> Operation:
        """Put a paused download back into the queue."""
        operation = self._download(key, "resumed")
        if operation.state is OperationState.PAUSED:
            now = self._registry.clock.time()
            queued = op_rules.moved(operation, OperationState.QUEUED, now)
            # Whatever it waited for: what it is told next is what it does then.
            progress = replace(self._operations.progress(key), phase=Phase.NONE, retry=None)
            self._operations.report(key, progress)
            edits = [
                op_rules.edit(replace(queued, progress=progress)),
                *artifacts.moved(
                    self._registry.decided, key, ArtifactState.QUEUED, "DOWNLOAD_QUEUED"
                ),
            ]
            await self._registry.stage(edits, stored=lambda: self._begun(key))
        return self._operations.get(key)

    async def update(
        self, key: str, *, priority: int | None = None, rate_limit: int | None = None
    ) -> Operation:
        """Change the priority of a waiting or running operation, or a download's bytes a second."""
        operation = self._registry.decided.operation(key)
        if operation.state in FINAL_STATES:
            raise _wrong_state(operation, "changed")
        changed, reason = operation, "PRIORITY_CHANGED"
        if priority is not None:
            low, high = op_rules.PRIORITY_MIN, op_rules.PRIORITY_MAX
            if not low <= priority <= high:
                raise invalid("operation.priority", f"{low} to {high}", priority)
            changed = replace(changed, priority=priority)
        if rate_limit is not None:
            op_rules.check_rate_limit(rate_limit, "operation.rate_limit_bytes_per_second")
            if operation.kind is not OperationKind.DOWNLOAD:
                raise _wrong_state(operation, "limited to a rate")
            changed = replace(changed, rate_limit_bytes_per_second=rate_limit)
            reason = "RATE_LIMIT_CHANGED"
        await self._registry.stage(
            [op_rules.edit(changed, reason)], stored=lambda: self._limit_one(key)
        )
        return self._operations.get(key)

    def _limit_one(self, key: str) -> None:
        operation = self._registry.committed.operations.get(key)
        if operation is not None and operation.kind is OperationKind.DOWNLOAD:
            self._downloads.limit_one(key, operation.rate_limit_bytes_per_second)

    def settings_changed(self) -> None:
        """Act on what the settings say of downloads now."""
        settings = self._registry.committed.settings
        self._downloads.limit(settings.download_rate_limit_bytes_per_second)
        self.pump()

    async def abandon(self, model_id: str) -> None:
        """Cancel the model's unfinished downloads and wait until nothing works on them any more.

        Raises CONFLICTING_OPERATION when one does not end.
        """
        keys = [
            o.id
            for o in self._registry.decided.operations.values()
            if o.kind is OperationKind.DOWNLOAD
            and o.model == model_id
            and o.state not in FINAL_STATES
        ]
        for key in keys:
            self._interrupt(key, CANCEL)
        if not await self._quiet(keys, ABANDON_WAIT_S):
            raise ModelhostError(
                Reason.CONFLICTING_OPERATION,
                f"a download of model '{model_id}' does not end; cancel it, then try again",
                {"model": model_id, "operation": keys[0]},
            )

    def start(self) -> None:
        """Make the recovered queue cancellable and start what may run."""
        for operation in self._registry.decided.operations.values():
            if operation.kind is OperationKind.DOWNLOAD and operation.state not in FINAL_STATES:
                self._cancellable(operation.id)
        self.settings_changed()

    async def stop(self, timeout_s: float) -> None:
        """Stop every byte; unfinished downloads go on when the daemon starts again.

        What is whole already is recorded, and what it replaces deleted, if that takes no longer than
        ``timeout_s``.
        """
        self._stopping = True
        whole = {self._tasks[key] for key in self._finishing if key in self._tasks}
        work = {*self._tasks.values(), *self._asides.values()}
        for task in work - whole:
            task.cancel()
        if work:
            _, late = await asyncio.wait(work, timeout=timeout_s)
            for task in late:
                task.cancel()
            if late:
                await asyncio.wait(late, timeout=CANCELLED_S)

    # --- running --------------------------------------------------------------------------------

    async def _done_already(
        self, model: Model, have: Artifact, principal: str, request: Request | None
    ) -> Operation:
        """Return an operation that says so: nothing was left to do."""
        total = Progress(
            done_bytes=have.size_bytes,
            total_bytes=have.size_bytes,
            done_files=have.file_count,
            total_files=have.file_count,
            reused_bytes=have.size_bytes,
        )
        key, done = self._operations.done_already(
            OperationKind.DOWNLOAD,
            model.id,
            download_result(model, have, have.size_bytes),
            total,
            principal=principal,
            request=request,
        )
        await done
        return self._operations.get(key)

    def _begun(self, key: str) -> None:
        self._cancellable(key)
        self.pump()

    def pump(self) -> None:
        """Start waiting downloads while there are free places."""
        if self._stopping:
            return
        queue = op_rules.queue(self._registry.committed.operations.values(), OperationKind.DOWNLOAD)
        found = op_rules.startable(
            [o for o in queue if o.id not in self._tasks and o.id not in self._intents],
            (self._hosts[key] for key in self._tasks),
            self._host_of,
            limit=self._registry.decided.settings.max_concurrent_downloads,
            per_host=self._per_host,
        )
        for operation in found:
            key = operation.id
            task = asyncio.create_task(self._run(key), name=f"download {operation.model}")
            self._tasks[key], self._hosts[key] = task, self._host_of(operation)
            task.add_done_callback(partial(self._ended, key))

    def _host_of(self, operation: Operation) -> str:
        """Return whose limits a download falls under; its model may be gone already."""
        found = artifacts.artifact_of(self._registry.decided, operation.id)
        return sources.host_of(found[1].source or found[0].source) if found is not None else ""

    def files(self, key: str) -> Sequence[FileProgress]:
        """Return how far each file of a running download is, by path; none for any other operation."""
        return self._downloads.file_progress(key)

    def _ended(self, key: str, task: "asyncio.Task[None]") -> None:
        del self._tasks[key], self._hosts[key]
        self._started.discard(key)
        self._finishing.discard(key)
        if not task.cancelled() and task.exception() is not None:
            log.error("download task failed", operation=key, exc_info=task.exception())
        if key in self._intents:
            self._set_aside(key)
        self.pump()

    async def _run(self, key: str) -> None:
        self._started.add(key)
        if key not in self._intents:
            await self._fetching.run(key, lambda: self._finishing.add(key), self.waits)

    # --- interrupting ---------------------------------------------------------------------------

    def _cancellable(self, key: str) -> None:
        self._operations.on_cancel(key, lambda: self._interrupt(key, CANCEL))

    def _interrupt(self, key: str, intent: str) -> None:
        if key in self._finishing:
            return
        if self._intents.get(key) != CANCEL:
            self._intents[key] = intent
        task = self._tasks.get(key)
        if task is None:
            self._set_aside(key)
        elif key in self._started and not task.cancelling():
            # One that has not begun yet sees the intent; a second cancel would hit its cleaning up.
            task.cancel()

    def _set_aside(self, key: str) -> None:
        """Commit the interruption of a download that no task works on."""
        if key not in self._asides and not self._stopping:
            self._asides[key] = asyncio.create_task(self._aside(key), name=f"interrupt {key}")

    async def _aside(self, key: str) -> None:
        done = ""
        try:
            # Again where a cancel came while the pause was on its way to the disk.
            while (intent := self._intents[key]) != done:
                await self._operations.settle(lambda: self._interrupted(key))
                done = intent
        except ModelhostError:
            log.exception("an interruption could not be stored", operation=key)
        finally:
            del self._intents[key]
            del self._asides[key]
        self.pump()

    def _interrupted(self, key: str) -> Sequence[Edit]:
        decided = self._registry.decided
        operation = decided.operations.get(key)
        if operation is None or operation.state in FINAL_STATES:
            return ()
        if self._intents[key] == CANCEL:
            return [
                *self._operations.failed(key, op_rules.cancelled_error(operation)),
                *artifacts.dropped(decided, key, "DOWNLOAD_CANCELLED"),
            ]
        now = self._registry.clock.time()
        paused = op_rules.moved(operation, OperationState.PAUSED, now)
        progress = replace(
            self._operations.progress(key), bytes_per_second=0.0, eta_s=None, retry=None
        )
        self._operations.report(key, progress)
        return [
            op_rules.edit(replace(paused, progress=progress)),
            *artifacts.moved(decided, key, ArtifactState.PAUSED, "PAUSED"),
        ]

    async def _quiet(self, keys: Iterable[str], timeout_s: float) -> bool:
        """Wait until nothing works on these downloads; returns whether it came to that."""
        keys = list(keys)
        loop = asyncio.get_running_loop()
        end = loop.time() + timeout_s
        while work := [
            task for key in keys for task in (self._tasks.get(key), self._asides.get(key)) if task
        ]:
            left = end - loop.time()
            if left <= 0:
                return False
            await asyncio.wait(work, timeout=left)
        return True

    def _waits_for_room(self, key: str) -> bool:
        found = artifacts.artifact_of(self._registry.decided, key)
        return found is not None and found[1].error is not None

    def _download(self, key: str, verb: str) -> Operation:
        operation = self._registry.decided.operation(key)
        if operation.kind is not OperationKind.DOWNLOAD or operation.state in FINAL_STATES:
            raise _wrong_state(operation, verb)
        return operation


def _join_key(model_id: str) -> str:
    return f"download:{model_id}"


def _wrong_state(operation: Operation, verb: str) -> ModelhostError:
    return ModelhostError(
        Reason.WRONG_STATE,
        f"operation '{operation.id}' ({operation.kind.value}, {operation.state.value}) "
        f"cannot be {verb}",
        {"name": f"operations/{operation.id}", "state": operation.state.value},
    )
