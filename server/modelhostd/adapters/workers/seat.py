"""One place for a worker: keeps a process there, with back-off, as long as it is wanted."""

import asyncio
import contextvars
import logging
import random
from collections.abc import Callable, Iterable

from modelhostd.adapters.workers import errors
from modelhostd.adapters.workers.config import WorkersConfig
from modelhostd.adapters.workers.images import ImageMemory
from modelhostd.adapters.workers.worker import Worker
from modelhostd.core.backoff import Backoff
from modelhostd.ports import WorkerExit
from modelhostd.worker.wire.frames import Key

log = logging.getLogger("modelhostd.workers")


class Seat:
    """The worker of a device (``model`` empty) or of one model with a process of its own.

    The first start is asked for by a load. After a crash a device's worker is replaced by itself; one of a single model is
    started again by the next load, since without its model nobody needs it. ``images`` goes from one worker to the next.
    """

    def __init__(
        self,
        config: WorkersConfig,
        device: str,
        model: str,
        on_ready: Callable[[Worker], None],
        on_exit: Callable[[Worker, WorkerExit], None],
        held_by: Callable[[Worker], Iterable[Key]],
    ) -> None:
        self._config = config
        self._loop = asyncio.get_running_loop()
        self._on_ready = on_ready
        self._on_exit = on_exit
        self._held_by = held_by
        self._backoff = Backoff()
        self._due = 0.0
        self._attempt: asyncio.Task[Worker] | None = None
        self._closed = False
        self._served = False
        self.device = device
        self.model = model
        self.worker: Worker | None = None
        self.images = ImageMemory(device)

    async def ready(self) -> Worker:
        """Return a worker that takes commands, starting one where needed.

        Raises WORKER_LOST where it cannot be started, or may not be for a while after crashes.
        Cancelling it leaves the start in progress to others.
        """
        if self._closed:
            raise errors.shutting_down()
        if self.worker is not None and self.worker.ready:
            return self.worker
        wait_s = self._due - self._loop.time()
        if wait_s > self._config.patience_s and (self.worker is None or not self.worker.ready):
            raise errors.lost(
                self.device, self.model, "it ended too often; its next start is delayed", wait_s
            )
        return await asyncio.shield(self._start())

    def close(self) -> None:
        """Start nothing more. A worker that runs is left to its owner."""
        self._closed = True
        if self._attempt is not None:
            self._attempt.cancel()

    def _start(self) -> "asyncio.Task[Worker]":
        if self._attempt is None:
            # Not in the context of the call that happened to be first: all that is logged of the worker would name it.
            context = contextvars.Context()
            self._attempt = self._loop.create_task(self._try(), context=context)
            self._attempt.add_done_callback(self._tried, context=context)
        return self._attempt

    async def _try(self) -> Worker:
        if (previous := self.worker) is not None:
            # Its memory counts until it is reaped, and so does its place.
            await asyncio.wait((previous.exited,))
        delay_s = self._due - self._loop.time()
        if delay_s > 0:
            await asyncio.sleep(delay_s)
        self.worker = worker = Worker(self._config, self.device, self.images, self.model)
        worker.exited.add_done_callback(lambda exited: self._exited(worker, exited.result()))
        try:
            await worker.launch()
        except BaseException:
            if not worker.running:
                self.worker = None
                self._note_failure(0.0)
            raise
        await worker.greet()
        return worker

    def _tried(self, attempt: "asyncio.Task[Worker]") -> None:
        self._attempt = None
        if attempt.cancelled():
            return
        error = attempt.exception()
        if error is None:
            self._served = True
            self._on_ready(attempt.result())
            return
        log.error("no worker on %s: %s", self.device, error)
        if self.worker is None:
            self._replace()

    def _exited(self, worker: Worker, exit: WorkerExit) -> None:
        if self.worker is worker:
            self.worker = None
        if worker.stopping:
            self.images.close()
            return
        self._leave(worker)
        self._note_failure(self._loop.time() - worker.started_at)
        log.error(
            "the worker of %s ended: %s; model at work: %s; next start in %.1f s at the earliest",
            self.device,
            exit.exit,
            exit.blamed or "none",
            max(0.0, self._due - self._loop.time()),
        )
        if worker.was_ready:
            self._on_exit(worker, exit)
        self._replace()

    def _leave(self, worker: Worker) -> None:
        """Keep what the worker leaves behind, and what it did not take over of the one before; free the rest."""
        held = self._held_by(worker)
        kept = {} if worker.for_memory else worker.leavings.of(held, self.images.kept)
        self.images.keep(kept)
        self.close_images()

    def close_images(self) -> None:
        """Let go of the memory of a single model where nobody has anything in it: it may never be loaded again."""
        if self.model and self.worker is None and not self.images.kept:
            self.images.close()

    def _note_failure(self, alive_s: float) -> None:
        self._backoff = self._backoff.failed(alive_s)
        self._due = self._loop.time() + self._backoff.delay_s(random.random())  # noqa: S311 - jitter

    def _replace(self) -> None:
        # What never ran is started again when somebody asks, not for ever by itself.
        wanted = self._served and not self.model and not self._closed
        if wanted and self._attempt is None:
            self._start()
