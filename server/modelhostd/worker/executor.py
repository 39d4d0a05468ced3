"""The threads that run jobs: fair between instances, each instance in as many as it allows.

A job runs in a thread of the executor, or, where its instance has been quick, in the one that read it
(:mod:`modelhostd.worker.readers`).
"""

import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence

from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.worker import batches, failures, stepping
from modelhostd.worker.entries import TURN_NS, Entry, is_free, is_quick
from modelhostd.worker.fairqueue import FairQueue
from modelhostd.worker.jobs import Activity, CheckJob, Hosted, InferJob
from modelhostd.worker.stepping import JobAnswer, StepJob
from modelhostd.worker.wire.blackbox import BlackBox

log = logging.getLogger("modelhostd.worker")

POISONED_EXIT = 70

Key = tuple[str, int]
Job = InferJob | CheckJob | StepJob


class Executor:
    """Hosted instances, the jobs that wait for them, and the threads in between."""

    def __init__(
        self, threads: int, queue_limit: int, box: BlackBox, exit: Callable[[int], None]
    ) -> None:
        """Prepare; ``exit`` ends the process, for a device fault that nothing survives."""
        self._threads = [Activity(f"executor-{index}", box, index) for index in range(threads)]
        self.readers = [Activity(f"reader-{index}", box, threads + index) for index in range(2)]
        self.activities = [*self._threads, *self.readers]
        self._exit = exit
        self._queue: FairQueue[Key, Job] = FairQueue(queue_limit)
        self._handed: tuple[Entry, Job] | None = None
        self._entries: dict[Key, Entry] = {}
        self._live: dict[int, InferJob] = {}
        self._early: dict[int, None] = {}
        self._idle = threads
        self._draining = False
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)
        self._ended = threading.Condition(self._lock)
        self._awaited = 0
        self._running = 0

    def start(self) -> None:
        """Start the threads; they live as long as the process."""
        for activity in self._threads:
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
            self._entries[hosted.key] = Entry(hosted)

    def remove(self, key: Key) -> Hosted | None:
        """Take no more requests for an instance, refuse those that wait, wait for those that run."""
        with self._lock:
            entry = self._entries.pop(key, None)
            if entry is None:
                return None
            waiting = self._queue.discard(key)
            for job in waiting:
                self._live.pop(job.ticket, None)
            for running in self._live.values():
                if running.key == key:
                    running.unload()
        for job in waiting:
            job.refuse(failures.not_loaded(entry.hosted.model))
        self._wait(lambda: entry.running == 0)
        stepping.finish(entry.hosted, entry.answers)
        return entry.hosted

    def submit(self, job: Job, *, here: bool = False) -> bool:
        """Queue a job, or refuse it at once. True: its instance is quick and the caller, who said ``here``,
        is to call :meth:`serve`.
        """
        with self._lock:
            if here and self._hand_over(job):
                return True
            error = self._admit(job)
            if error is None:
                entry = self._entries[job.key]
                if here and entry.quick:
                    return True
                # Also where it waits for company: somebody has to look when its time is up.
                if self._idle and (entry.free or entry.due_ns):
                    self._work.notify()
                return False
        job.refuse(error)
        return False

    def serve(self, activity: Activity) -> bool:
        """Run waiting jobs of quick instances in this thread, for a turn; whether some may be left."""
        end_ns = time.monotonic_ns() + TURN_NS
        with self._lock:
            taken, self._handed = self._handed or self._take(is_quick), None
        while taken is not None:
            entry, job = taken
            jobs = self._run(entry, job, activity)
            more = time.monotonic_ns() < end_ns
            with self._lock:
                self._end(entry, jobs)
                if not len(self._queue):
                    return False
                taken = self._take(is_quick) if more else None
                if not more and len(self._queue):
                    return True
        with self._lock:
            # What was left to this thread and has become slow since.
            if len(self._queue) and self._idle:
                self._work.notify()
        return False

    def wake(self) -> None:
        """Have the executor's own threads look for work: who was to do it is busy."""
        with self._lock:
            self._work.notify_all()

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
            entry = self._entries.get(job.key)
            if waited:
                del self._live[request]
                if job.streaming and entry is not None:
                    entry.streams -= 1
            elif entry is not None:
                self._call_step(entry)
        if waited:
            job.refuse(failures.cancelled())

    def add_credit(self, request: int, responses: int) -> None:
        """Allow more responses of a streaming request."""
        job = self._live.get(request)
        if job is not None:
            job.add_credit(responses)
            with self._lock:
                entry = self._entries.get(job.key)
                if entry is not None:
                    self._call_step(entry)

    def look_again(self) -> None:
        """Have requests that rest be looked at: a deadline may pass while nothing of theirs runs."""
        with self._lock:
            for entry in self._entries.values():
                self._call_step(entry)

    def drain(self) -> None:
        """Refuse what comes from now on, and return when all that was accepted is answered."""
        with self._lock:
            self._draining = True
        self._wait(lambda: not self._live and not self._running)

    def _wait(self, done: Callable[[], bool]) -> None:
        with self._lock:
            self._awaited += 1
            self._ended.wait_for(done)
            self._awaited -= 1

    def _hand_over(self, job: Job) -> bool:
        """Leave a quick job to the next ``serve``, past the queue where nothing waits; the lock is held.

        For one request at a time: with caches gone cold, the queue would take 15 us of its 90.
        """
        entry = self._entries.get(job.key)
        if (
            entry is None
            or self._handed is not None
            or len(self._queue)
            or self._draining
            or not batches.joinable(job)
            or job.request in self._early
            or entry.hosted.batch_delay_ns
            or not entry.quick
        ):
            return False
        self._live[job.request] = job
        self._handed = self._begin(entry, job)
        return True

    def _admit(self, job: Job) -> ModelhostError | None:
        if self._draining:
            return ModelhostError(Reason.SHUTTING_DOWN, "The worker is shutting down.")
        entry = self._entries.get(job.key)
        if entry is None:
            return failures.not_loaded(job.instance)
        if isinstance(job, InferJob) and self._early and job.request in self._early:
            del self._early[job.request]
            return failures.cancelled()
        if not self._queue.push(job.key, job.ticket, job.priority, job):
            return ModelhostError(
                Reason.QUEUE_FULL,
                f"{self._queue.limit} requests wait in the worker of devices/{entry.hosted.device}; "
                "retry later or send fewer at a time.",
                {"model": entry.hosted.model, "queue": "worker", "limit": str(self._queue.limit)},
                retry_delay_s=1.0,
            )
        if isinstance(job, InferJob):
            self._live[job.request] = job
        if job.streaming:
            entry.streams += 1
        self._hold(entry, job)
        return None

    def _call_step(self, entry: Entry) -> None:
        """Have the requests that were begun get on, or be looked at; the lock is held."""
        if entry.step is None or entry.step_waits or not entry.answers:
            return
        entry.step_waits = True
        step = entry.step
        self._queue.push(step.key, step.ticket, step.priority, step, forced=True)
        if self._idle and entry.free:
            self._work.notify()

    def _hold(self, entry: Entry, job: Job) -> None:
        """Have a request wait for company, where it is to, or call off that others wait; the lock is held."""
        hosted = entry.hosted
        if not hosted.batch_delay_ns:
            return
        count = self._queue.count(job.key)
        if count >= hosted.batch_limit or not batches.joinable(job):
            entry.due_ns = 0
        elif count == 1:
            entry.due_ns = time.monotonic_ns() + hosted.batch_delay_ns

    def _take(self, fit: Callable[[Entry], bool]) -> "tuple[Entry, Job] | None":
        """Take the next job of an instance that is ``fit``, as one that runs; the lock is held."""
        entries = self._entries
        found = self._queue.pop(lambda key: fit(entries[key]))
        if found is None:
            return None
        key, job = found
        return self._begin(entries[key], job)

    def _begin(self, entry: Entry, job: Job) -> "tuple[Entry, Job]":
        """Count a job in; the lock is held."""
        entry.due_ns = 0
        if job is entry.step:
            entry.step_waits = False
        entry.running += 1
        self._running += 1
        return entry, job

    def _end(self, entry: Entry, jobs: Sequence[Job]) -> None:
        """Count out what ran together; the lock is held."""
        entry.running -= 1
        self._running -= 1
        for job in jobs:
            self._forget(entry, job)
        if self._awaited:
            self._ended.notify_all()

    def _forget(self, entry: Entry, job: Job) -> None:
        """Count out what was answered; the lock is held."""
        self._live.pop(job.ticket, None)
        if job.streaming:
            entry.streams -= 1

    def _run(self, entry: Entry, job: Job, activity: Activity) -> list[Job]:
        """Run a job, and those that fit to it; return all that are answered."""
        hosted = entry.hosted
        begin_ns = activity.begin(hosted.model)
        jobs: list[Job] = [job]
        try:
            if isinstance(job, StepJob):
                error = self._step(entry, job, activity)
            elif entry.step is not None and isinstance(job, InferJob):
                error = None
                if self._open(entry, job, activity):
                    jobs = []
            elif hosted.batch_limit > 1 and len(self._queue) and batches.joinable(job):
                together, refused = self._gather(entry, job)
                jobs = [*together, *refused]
                error = batches.run(together, hosted, activity)
            else:
                error = job.run(hosted, activity)
        except OSError:
            # The daemon's end of the socket is gone, and this process is about to be.
            log.debug("an answer was not sent", exc_info=True)
            error = None
        if error is not None and hosted.backend.is_poisoned(error):
            log.error("the device is in an undefined state; this worker ends", exc_info=error)
            sys.stderr.flush()
            self._exit(POISONED_EXIT)
        activity.end()
        entry.note_pace(begin_ns)
        return jobs

    def _open(self, entry: Entry, job: InferJob, activity: Activity) -> bool:
        """Begin a request that steps will answer; whether it is not answered yet."""
        if not job.prepare(entry.hosted):
            return False

        def ended(answer: JobAnswer) -> None:
            with self._lock:
                del entry.answers[answer.job.ticket]
                self._forget(entry, answer.job)
                if self._awaited:
                    self._ended.notify_all()

        answer = JobAnswer(job, entry.hosted, ended)
        entry.answers[job.ticket] = answer
        if answer.begin(activity):
            with self._lock:
                self._call_step(entry)
            return True
        del entry.answers[job.ticket]
        return False

    def _step(self, entry: Entry, step: StepJob, activity: Activity) -> BaseException | None:
        """Get the requests that were begun on by one step."""
        error = step.run(entry.hosted, activity)
        if error is not None:
            # Of the step itself: what became of each request nobody can tell.
            for answer in list(entry.answers.values()):
                answer.fail(error)
        elif step.again:
            with self._lock:
                if self._entries.get(step.key) is entry:
                    self._call_step(entry)
        return error

    def _gather(self, entry: Entry, first: InferJob) -> tuple[list[InferJob], list[InferJob]]:
        """Return the requests that run now, ``first`` among them, and those that were refused on the way.

        What waits and does not fit goes back to its place.
        """
        hosted = entry.hosted
        with self._lock:
            others = self._queue.more(
                first.key, min(hosted.batch_limit, batches.LOOK) - 1, batches.joinable
            )
        if not others:
            return [first], []
        batch = batches.form([(None, first), *others], hosted)
        gone: list[InferJob] = []
        with self._lock:
            if self._entries.get(first.key) is entry:
                self._queue.put_back(first.key, batch.left)
                if batch.left and self._idle:
                    self._work.notify()
            else:
                gone = [job for _, job in batch.left]
        for job in gone:
            job.refuse(failures.not_loaded(hosted.model))
        return batch.together, [*batch.refused, *gone]

    def _loop(self, activity: Activity) -> None:
        while True:
            with self._lock:
                while (taken := self._take(is_free)) is None:
                    self._work.wait(self._next_due_s())
                self._idle -= 1
            entry, job = taken
            jobs = self._run(entry, job, activity)
            with self._lock:
                self._end(entry, jobs)
                self._idle += 1
            # Held longer, it would keep a request's tensors alive while the thread is idle.
            del taken, job, jobs

    def _next_due_s(self) -> float | None:
        """Return the seconds until some request has waited for company long enough; None = none waits."""
        due = [e.due_ns for key, e in self._entries.items() if e.due_ns and self._queue.count(key)]
        return max(0.0, (min(due) - time.monotonic_ns()) / 1e9) if due else None


def exit_now(code: int) -> None:
    """End the process without the interpreter's own shutdown, which libraries' threads can crash."""
    sys.stderr.flush()
    os._exit(code)
