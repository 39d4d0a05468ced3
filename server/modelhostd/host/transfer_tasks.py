"""Downloads that run: one task each, started from the queue, interrupted by intents.

Rules:
1. Only what is committed as QUEUED is started, higher priority first, then first come.
2. An interruption (cancel, pause) is an intent until it is committed; nothing starts meanwhile.
3. What has been fetched whole is kept: from then on an interruption comes too late.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial

import structlog

from modelhostd.core import artifacts, sources
from modelhostd.core import operations as op_rules
from modelhostd.core.errors import ModelhostError
from modelhostd.core.resources import (
    FINAL_STATES,
    ArtifactState,
    Operation,
    OperationKind,
    OperationState,
)
from modelhostd.core.state import Edit
from modelhostd.host.fetching import Fetching
from modelhostd.host.operations import Operations
from modelhostd.host.registry import Registry
from modelhostd.host.room_waits import RoomWaits
from modelhostd.host.space import Space
from modelhostd.ports import Downloads, FileProgress

log = structlog.get_logger(__name__)

CANCEL, PAUSE = "cancel", "pause"
CANCELLED_S = 1.0


class TransferTasks:
    """At most ``max_concurrent_downloads`` downloads run at a time, and ``per_host`` from one host."""

    def __init__(
        self,
        registry: Registry,
        operations: Operations,
        downloads: Downloads,
        fetching: Fetching,
        space: Space,
        resume: Callable[[str], Awaitable[Operation]],
        per_host: int,
    ) -> None:
        self._registry = registry
        self._operations = operations
        self._downloads = downloads
        self._per_host = per_host
        self._fetching = fetching
        self.waits = RoomWaits(registry, space.make_room, resume)
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._hosts: dict[str, str] = {}
        self._started: set[str] = set()
        self._finishing: set[str] = set()
        self._intents: dict[str, str] = {}
        self._asides: dict[str, asyncio.Task[None]] = {}
        self._stopping = False

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
