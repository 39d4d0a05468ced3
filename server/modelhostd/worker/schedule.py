"""What waits in a worker, what runs, and what may run next: the books of the executor, under one lock."""

import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol, TypeGuard

from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.worker import batches, failures
from modelhostd.worker.checks import CHECK_PRIORITY, CheckJob
from modelhostd.worker.entries import Entry
from modelhostd.worker.fairqueue import FairQueue
from modelhostd.worker.jobs import InferJob
from modelhostd.worker.stepping import JobAnswer, StepJob
from modelhostd.worker.wire.frames import Key


class HandedPass(Protocol):
    """A pass of a model that another thread waits for."""

    model: str

    def run(self) -> None:
        """Run it; who waits goes on."""


Job = InferJob | CheckJob | StepJob

MOST_BEGUN = 16
"""Requests that are begun between two steps of an instance, however many wait. One of a long prompt takes some
milliseconds, and those who read wait for the step."""
OVERDUE_PRIORITY = CHECK_PRIORITY - 1
"""Of a step that has let so many pass."""


class Schedule:
    """Hosted instances and their jobs. All but :meth:`wait` is called with ``lock`` held."""

    def __init__(self, threads: int, queue_limit: int) -> None:
        """Prepare for so many threads, all of them idle, and so many jobs that wait."""
        self.lock = threading.Lock()
        self.work = threading.Condition(self.lock)
        """Told when a thread is to look for work."""
        self.queue: FairQueue[Key, Job] = FairQueue(queue_limit)
        self.handed: tuple[Entry, Job] | None = None
        """The job that its reader is to run, past the queue."""
        self.entries: dict[Key, Entry] = {}
        self.live: dict[int, InferJob] = {}
        """Requests that are not answered yet, by their ids."""
        self.idle = threads
        self.compute = threading.Condition(self.lock)
        """Told when the thread that computes is to look for work."""
        self.compute_busy = True
        """Whether that thread is at work, or there is none."""
        self.handed_passes: list[HandedPass] = []
        """What other threads have that one run for their jobs."""
        self.draining = False
        self.awaited = 0
        """How many threads wait for something to end."""
        self.running = 0
        self._early: dict[int, None] = {}
        self._ended = threading.Condition(self.lock)

    def wait(self, done: Callable[[], bool]) -> None:
        """Wait until ``done``, looking whenever something has ended."""
        with self.lock:
            self.awaited += 1
            self._ended.wait_for(done)
            self.awaited -= 1

    def has_idle(self, entry: Entry) -> bool:
        """Whether a thread that could run an instance's jobs has nothing to do."""
        if entry.computes and not self.compute_busy:
            return True
        return self.idle > 0 and (not entry.computes or entry.divided)

    def call_thread(self, entry: Entry) -> None:
        """Have a thread look for work of an instance, where one is idle."""
        if entry.computes and not self.compute_busy:
            self.compute.notify()
        elif self.idle and (not entry.computes or entry.divided):
            self.work.notify()

    def call_threads(self) -> None:
        """Have a thread of each kind look for work."""
        if self.idle:
            self.work.notify()
        self.compute.notify()

    def call_beside(self) -> None:
        """Have another thread look for what waits while the one that computes runs a job."""
        if self.idle and any(
            entry.computes and entry.divided and entry.has_room and self.queue.count(key)
            for key, entry in self.entries.items()
        ):
            self.work.notify()

    def is_for_others(self, entry: Entry) -> bool:
        """Whether a thread that does not compute may run an instance's next job."""
        return not entry.computes or (entry.divided and self.compute_busy)

    def hand_over(self, job: Job) -> bool:
        """Leave a quick job to the reader that brought it, past the queue where nothing waits.

        For one request at a time: with caches gone cold, the queue would take 15 us of its 90.
        """
        entry = self.entries.get(job.key)
        if (
            entry is None
            or self.handed is not None
            or len(self.queue)
            or self.draining
            or not batches.joinable(job)
            or job.request in self._early
            or entry.hosted.batch_delay_ns
            or not entry.quick
        ):
            return False
        self.live[job.request] = job
        self.handed = self._begin(entry, job)
        return True

    def admit(self, job: Job) -> ModelhostError | None:
        """Queue a job; return why it is refused instead."""
        if self.draining:
            return ModelhostError(Reason.SHUTTING_DOWN, "The worker is shutting down.")
        entry = self.entries.get(job.key)
        if entry is None:
            return failures.not_loaded(job.instance)
        if isinstance(job, InferJob) and self._early and job.request in self._early:
            del self._early[job.request]
            return failures.cancelled()
        if not self.queue.push(job.key, job.ticket, job.priority, job):
            return ModelhostError(
                Reason.QUEUE_FULL,
                f"{self.queue.limit} requests wait in the worker of devices/{entry.hosted.device}; "
                "retry later or send fewer at a time.",
                {"model": entry.hosted.model, "queue": "worker", "limit": str(self.queue.limit)},
                retry_delay_s=1.0,
            )
        if isinstance(job, InferJob):
            self.live[job.request] = job
        if job.streaming:
            entry.streams += 1
        self._hold(entry, job)
        return None

    def remember_cancelled(self, request: int) -> None:
        """Refuse a request that may be still to come.

        The control socket may carry a cancellation past its request, so unknown ids are remembered
        for a while; most of them belong to requests that were just answered.
        """
        self._early[request] = None
        if len(self._early) > self.queue.limit:
            del self._early[next(iter(self._early))]

    def call_step(self, entry: Entry) -> None:
        """Have the requests that were begun get on, or be looked at."""
        step = entry.step
        if step is None or entry.step_waits or not entry.answers:
            return
        if self.entries.get(step.key) is not entry:
            # It goes: who removes it makes its last steps.
            return
        entry.step_waits = True
        self.queue.push(step.key, step.ticket, step.priority, step, forced=True)
        if entry.free:
            self.call_thread(entry)

    def count_begun(self, entry: Entry) -> None:
        """Note that a request was begun that steps will answer, and see to it that they get their turn."""
        entry.begun += 1
        self.call_step(entry)
        step = entry.step
        if entry.begun == MOST_BEGUN and step is not None and self.queue.remove(step.ticket):
            self.queue.push(step.key, step.ticket, OVERDUE_PRIORITY, step, forced=True)

    def take(self, fit: Callable[[Entry], bool]) -> tuple[Entry, Job] | None:
        """Take the next job of an instance that is ``fit``, as one that runs."""
        entries = self.entries
        found = self.queue.pop(lambda key: fit(entries[key]))
        if found is None:
            return None
        key, job = found
        return self._begin(entries[key], job)

    def end(self, entry: Entry, jobs: Sequence[Job]) -> None:
        """Count out what ran together."""
        entry.running -= 1
        self.running -= 1
        for job in jobs:
            self._forget(entry, job)
        together = entry.hosted.batch_limit > 1 and (len(jobs) > 1 or len(self.queue))
        if together and self.has_idle(entry):
            entry.expect(len(jobs), self.queue.count(entry.hosted.key))
        if entry.computes and not self.compute_busy and self.queue.count(entry.hosted.key):
            # It was no call for that thread while this ran, and who ran it here leaves it to that one now.
            self.compute.notify()
        if self.awaited:
            self._ended.notify_all()

    def take_shorter(self, entry: Entry, long: InferJob) -> InferJob | CheckJob | None:
        """Take what waits for an instance and need not wait for all of a ``long`` request that runs."""
        key = entry.hosted.key
        if self.entries.get(key) is not entry:
            return None
        waiting = self.queue.more(key, batches.LOOK, _no_step)
        found = next((place for place, job in waiting if batches.passes(job, long)), None)
        self.queue.put_back(key, [one for one in waiting if one[0] is not found])
        return next((job for place, job in waiting if place is found), None)

    def end_passed(self, entry: Entry, jobs: Sequence[Job]) -> None:
        """Count out what ran while a long request waited."""
        for job in jobs:
            self._forget(entry, job)
        if self.awaited:
            self._ended.notify_all()

    def end_answer(self, entry: Entry, answer: JobAnswer) -> None:
        """Count out a request that steps have answered."""
        del entry.answers[answer.job.ticket]
        self._forget(entry, answer.job)
        if self.awaited:
            self._ended.notify_all()

    def next_due_s(self, fit: Callable[[Entry], bool]) -> float | None:
        """Return the seconds until a request of an instance that is ``fit`` has waited for company long enough; None = none waits."""
        due = [
            entry.due_ns
            for key, entry in self.entries.items()
            # Where all that may run do, who ends one of them looks again.
            if entry.due_ns and entry.has_room and fit(entry) and self.queue.count(key)
        ]
        return max(0.0, (min(due) - time.monotonic_ns()) / 1e9) if due else None

    def _hold(self, entry: Entry, job: Job) -> None:
        """Have a request wait for company, where it is to, or call off that others wait."""
        hosted = entry.hosted
        if not hosted.batch_delay_ns and not entry.due_ns:
            return
        count = self.queue.count(job.key)
        enough = hosted.batch_limit if hosted.batch_delay_ns else entry.company
        if not hosted.batch_delay_ns and not self.has_idle(entry):
            # Nobody would look when the time is up, but who reads can run it if it is quick.
            enough = 0
        if count >= enough or not batches.joinable(job):
            entry.due_ns = 0
        elif count == 1 and hosted.batch_delay_ns:
            entry.due_ns = time.monotonic_ns() + hosted.batch_delay_ns

    def _begin(self, entry: Entry, job: Job) -> tuple[Entry, Job]:
        entry.due_ns = 0
        if job is entry.step:
            entry.step_waits = False
            entry.begun = 0
        entry.running += 1
        self.running += 1
        return entry, job

    def _forget(self, entry: Entry, job: Job) -> None:
        self.live.pop(job.ticket, None)
        if job.streaming:
            entry.streams -= 1


def _no_step(job: Job) -> TypeGuard[InferJob | CheckJob]:
    """Whether a job is one that came from outside."""
    return not isinstance(job, StepJob)
