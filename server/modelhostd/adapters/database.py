"""The database port on SQLite: one thread of its own owns the one connection.

The loop hands over a job and awaits a future. Commits go before reads; both are bounded by a semaphore,
so that whoever asks too much waits. After a second without work the thread copies the write-ahead log
into the database, so that this does not fall into a commit.
"""

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from modelhostd.adapters import database_errors
from modelhostd.adapters.database_file import DatabaseFile
from modelhostd.core.resources import Event
from modelhostd.ports import Batch, Stored

T = TypeVar("T")

FILE_NAME = "modelhost.db"
IDLE_S = 1.0
MAX_WAITING_COMMITS = 1024
MAX_WAITING_READS = 256


class _Job:
    """One call for the thread, and the future of the loop that waits for it."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self.call = call
        self.loop = asyncio.get_running_loop()
        self.future: asyncio.Future[Any] = self.loop.create_future()

    def run(self) -> None:
        try:
            result, error = self.call(), None
        except BaseException as raised:
            result, error = None, raised
        # A loop that is closed has nobody left to tell.
        with contextlib.suppress(RuntimeError):
            self.loop.call_soon_threadsafe(self._settle, result, error)

    def _settle(self, result: Any, error: BaseException | None) -> None:
        if self.future.cancelled():
            return
        if error is None:
            self.future.set_result(result)
        else:
            self.future.set_exception(error)


class SqliteDatabase:
    """A :class:`modelhostd.ports.Database` at ``path``; opened once, closed once."""

    def __init__(self, path: Path, *, idle_s: float = IDLE_S) -> None:
        self.path = path
        self._file = DatabaseFile(path)
        self._idle_s = idle_s
        self._wake = threading.Condition()
        self._commits: deque[_Job] = deque()
        self._reads: deque[_Job] = deque()
        self._ending = False
        self._thread: threading.Thread | None = None
        self._commit_slots = asyncio.Semaphore(MAX_WAITING_COMMITS)
        self._read_slots = asyncio.Semaphore(MAX_WAITING_READS)

    async def open(self) -> Stored:
        """Open or create, migrate, and read everything; see the port."""
        if self._thread is not None:
            raise database_errors.closed(self.path)
        self._thread = threading.Thread(target=self._run, name="modelhost-database", daemon=True)
        self._thread.start()
        try:
            return await self._put(self._commits, self._file.open)
        except BaseException:
            self._put(self._reads, self._file.close)
            self._end()
            raise

    async def commit(self, batch: Batch) -> None:
        """Write one batch durably, after those asked for before it; see the port.

        It is written even if the caller is cancelled while it waits for the thread.
        """
        await self._within(self._commit_slots, self._commits, lambda: self._file.commit(batch))

    async def read_events(self, start_sequence: int, limit: int) -> Sequence[Event]:
        """Return a page of the log; see the port. ``limit`` 0 tells whether the thread answers."""
        return await self._within(
            self._read_slots,
            self._reads,
            lambda: self._file.read_events(start_sequence, limit),
        )

    async def close(self) -> None:
        """Finish what was asked for, checkpoint and close. Idempotent; waits for the disk."""
        if self._thread is None or self._ending:
            return
        closed = self._put(self._reads, self._file.close)
        self._end()
        await closed

    async def _within(
        self, slots: asyncio.Semaphore, queue: deque[_Job], call: Callable[[], T]
    ) -> T:
        """Run ``call`` in the thread; its slot is taken until it ran, whoever still waits for it."""
        await slots.acquire()
        try:
            future = self._put(queue, call)
        except BaseException:
            slots.release()
            raise
        future.add_done_callback(lambda _: slots.release())
        return await asyncio.shield(future)

    def _put(self, queue: deque[_Job], call: Callable[[], T]) -> "asyncio.Future[T]":
        with self._wake:
            if self._thread is None or self._ending:
                raise database_errors.closed(self.path)
            job = _Job(call)
            queue.append(job)
            self._wake.notify()
        return job.future

    def _end(self) -> None:
        with self._wake:
            self._ending = True
            self._wake.notify()

    def _run(self) -> None:
        while (job := self._next()) is not None:
            job.run()

    def _next(self) -> _Job | None:
        """Return the job that is due; copies the log when there is none for a while."""
        while True:
            with self._wake:
                if self._commits:
                    return self._commits.popleft()
                if self._reads:
                    return self._reads.popleft()
                if self._ending:
                    return None
                if self._wake.wait(self._idle_s if self._file.dirty else None):
                    continue
            self._file.checkpoint()
