"""The threads that run jobs: fair between instances, each instance in as many as it allows."""

import logging
import os
import sys
import threading
from collections.abc import Callable

from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.worker import failures
from modelhostd.worker.fairqueue import FairQueue
from modelhostd.worker.jobs import Activity, Hosted, InferJob, Job
from modelhostd.worker.wire.blackbox import BlackBox

log = logging.getLogger("modelhostd.worker")

POISONED_EXIT = 70

Key = tuple[str, int]


class Executor:
    """Hosted instances, the jobs that wait for them, and the threads in between."""

    def __init__(
        self, threads: int, queue_limit: int, box: BlackBox, exit: Callable[[int], None]
    ) -> None:
        """Prepare; ``exit`` ends the process, for a device fault that nothing survives."""
        self.activities = [Activity(f"executor-{index}", box, index) for index in range(threads)]
        self._exit = exit
        self._queue: FairQueue[Key, Job] = FairQueue(queue_limit)
        self._hosted: dict[Key, Hosted] = {}
        self._running: dict[Key, int] = {}
        self._live: dict[int, InferJob] = {}
        self._early: dict[int, None] = {}
        self._idle = threads
        self._draining = False
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)
        self._ended = threading.Condition(self._lock)

    def start(self) -> None:
        """Start the threads; they live as long as the process."""
        for activity in self.activities:
            threading.Thread(
                target=self._loop, args=(activity,), name=activity.name, daemon=True
            ).start()

    @property
    def queued(self) -> int:
        """Jobs that wait."""
        return len(self._queue)

    def add(self, hosted: Hosted) -> None:
        """Take requests for an instance from now on."""
        with self._lock:
            self._hosted[hosted.key] = hosted
            self._running[hosted.key] = 0

    def remove(self, key: Key) -> Hosted | None:
        """Take no more requests for an instance, refuse those that wait, wait for those that run."""
        with self._lock:
            hosted = self._hosted.pop(key, None)
            if hosted is None:
                return None
            waiting = self._queue.discard(key)
            for job in waiting:
                self._live.pop(job.ticket, None)
            for running in self._live.values():
                if running.key == key:
                    running.unload()
        for job in waiting:
            job.refuse(failures.not_loaded(hosted.model))
        with self._lock:
            self._ended.wait_for(lambda: self._running[key] == 0)
            del self._running[key]
        return hosted

    def submit(self, job: Job) -> None:
        """Queue a job, or refuse it at once."""
        with self._lock:
            error = self._admit(job)
            if error is None:
                if self._idle and self._ready(job.key):
                    self._work.notify()
                return
        job.refuse(error)

    def cancel(self, request: int) -> None:
        """Stop a request: out of the queue, or at its next check. A later arrival is refused too.

        The control socket may carry a cancellation past its request, so unknown ids are remembered
        for a while; most of them belong to requests that were just answered.
        """
        with self._lock:
            job = self._live.get(request)
            if job is None:
                self._early[request] = None
                if len(self._early) > self._queue.limit:
                    del self._early[next(iter(self._early))]
                return
            job.cancel()
            waited = self._queue.remove(request) is not None
            if waited:
                del self._live[request]
        if waited:
            job.refuse(failures.cancelled())

    def add_credit(self, request: int, responses: int) -> None:
        """Allow more responses of a streaming request."""
        job = self._live.get(request)
        if job is not None:
            job.add_credit(responses)

    def drain(self) -> None:
        """Refuse what comes from now on, and return when all that was accepted is answered."""
        with self._lock:
            self._draining = True
            self._ended.wait_for(lambda: not self._live and not any(self._running.values()))

    def _admit(self, job: Job) -> ModelhostError | None:
        if self._draining:
            return ModelhostError(Reason.SHUTTING_DOWN, "The worker is shutting down.")
        hosted = self._hosted.get(job.key)
        if hosted is None:
            return failures.not_loaded(job.instance)
        if isinstance(job, InferJob) and self._early and job.request in self._early:
            del self._early[job.request]
            return failures.cancelled()
        if not self._queue.push(job.key, job.ticket, job.priority, job):
            return ModelhostError(
                Reason.QUEUE_FULL,
                f"{self._queue.limit} requests wait in the worker of devices/{hosted.device}; "
                "retry later or send fewer at a time.",
                {"model": hosted.model, "queue": "worker", "limit": str(self._queue.limit)},
                retry_delay_s=1.0,
            )
        if isinstance(job, InferJob):
            self._live[job.request] = job
        return None

    def _ready(self, key: Key) -> bool:
        hosted = self._hosted.get(key)
        return hosted is not None and self._running[key] < hosted.backend.concurrency

    def _loop(self, activity: Activity) -> None:
        while True:
            with self._lock:
                while (taken := self._queue.pop(self._ready)) is None:
                    self._work.wait()
                key, job = taken
                hosted = self._hosted[key]
                self._running[key] += 1
                self._idle -= 1
            activity.begin(hosted.model)
            try:
                error = job.run(hosted, activity)
            except OSError:
                # The daemon's end of the socket is gone, and this process is about to be.
                log.debug("an answer was not sent", exc_info=True)
                error = None
            if error is not None and hosted.backend.is_poisoned(error):
                log.error("the device is in an undefined state; this worker ends", exc_info=error)
                sys.stderr.flush()
                self._exit(POISONED_EXIT)
            # Held longer, these would keep a request's tensors alive while the thread is idle.
            del taken, error
            activity.end()
            with self._lock:
                self._running[key] -= 1
                self._idle += 1
                self._live.pop(job.ticket, None)
                self._ended.notify_all()
            del job, hosted


def exit_now(code: int) -> None:
    """End the process without the interpreter's own shutdown, which libraries' threads can crash."""
    sys.stderr.flush()
    os._exit(code)
