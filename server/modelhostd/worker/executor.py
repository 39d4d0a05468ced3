"""The threads that run jobs: fair between instances, each instance in as many as it allows.

A job runs in a thread of the executor, in the one that computes where its model does so on the CPU
(:mod:`modelhostd.worker.computing`), or, where its instance has been quick, in the one that read it
(:mod:`modelhostd.worker.readers`). A stream has a thread of its own: it waits for its reader, and the executor's threads
are for all instances.
"""

import itertools
import os
import sys
import time
from collections.abc import Callable
from functools import partial

from modelhostd.worker import failures, stepping
from modelhostd.worker.computing import Computing
from modelhostd.worker.entries import TURN_NS, Entry, is_quick
from modelhostd.worker.jobs import Activity, Hosted
from modelhostd.worker.own_threads import start_thread
from modelhostd.worker.runner import Runner
from modelhostd.worker.schedule import Job, Schedule
from modelhostd.worker.wire.blackbox import ENTRIES, BlackBox
from modelhostd.worker.wire.frames import Key


class Executor:
    """Takes jobs for hosted instances, and runs them in its threads and those of the readers."""

    def __init__(
        self,
        threads: int,
        queue_limit: int,
        box: BlackBox,
        exit: Callable[[int], None],
        compute_threads: int = 0,
    ) -> None:
        """Prepare; ``exit`` ends the process, for a device fault that nothing survives.

        ``compute_threads`` are what torch has in the one thread that runs its models; 0 = models compute elsewhere than
        on the CPU, and any thread runs them.
        """
        self.compute_threads = compute_threads
        self._threads = [Activity(f"executor-{index}", box, index) for index in range(threads)]
        self.readers = [Activity(f"reader-{index}", box, threads + index) for index in range(2)]
        self.activities = [*self._threads, *self.readers]
        self._computing: Computing | None = None
        self._box = box
        self._streams: set[int] = set()
        self.schedule = Schedule(threads, queue_limit)
        self._runner = Runner(self.schedule, exit)
        self._lock = self.schedule.lock
        if compute_threads:
            activity = Activity("compute", box, len(self.activities))
            self.activities.append(activity)
            self._computing = Computing(
                self.schedule, activity, compute_threads, self._take, self._runner.run
            )
            for other in self._threads:
                self._hand_over_from(other)

    def start(self) -> None:
        """Start the threads; they live as long as the process."""
        for activity in self._threads:
            start_thread(self._loop, activity, name=activity.name)
        if self._computing is not None:
            self._computing.start()

    @property
    def queued(self) -> int:
        """Jobs that wait."""
        return len(self.schedule.queue)

    def add(self, hosted: Hosted) -> None:
        """Take requests for an instance from now on."""
        with self._lock:
            computes = self._computing is not None and "torch" in hosted.backend.packages
            self.schedule.entries[hosted.key] = Entry(hosted, computes=computes)

    def remove(self, key: Key) -> Hosted | None:
        """Take no more requests for an instance, refuse those that wait, wait for those that run."""
        schedule = self.schedule
        with self._lock:
            entry = schedule.entries.pop(key, None)
            if entry is None:
                return None
            waiting = schedule.queue.discard(key)
            for job in waiting:
                schedule.live.pop(job.ticket, None)
            for running in schedule.live.values():
                if running.key == key:
                    running.unload()
        for job in waiting:
            job.refuse(failures.not_loaded(entry.hosted.model))
        schedule.wait(lambda: entry.running == 0)
        error = stepping.finish(entry.hosted, entry.answers)
        self._runner.end_if_poisoned(entry.hosted, error)
        return entry.hosted

    def submit(self, job: Job, *, here: bool = False) -> bool:
        """Queue a job, or refuse it at once. True: its instance is quick and the caller, who said ``here``,
        is to call :meth:`serve`.
        """
        schedule = self.schedule
        with self._lock:
            if here and schedule.hand_over(job):
                return True
            error = schedule.admit(job)
            if error is None:
                entry = schedule.entries[job.key]
                if here and entry.quick:
                    return True
                # Also where it waits for company: somebody has to look when its time is up.
                if entry.free or entry.due_ns:
                    schedule.call_thread(entry)
                return False
        job.refuse(error)
        return False

    def serve(self, activity: Activity) -> bool:
        """Run waiting jobs of quick instances in this thread, for a turn; whether some may be left."""
        schedule = self.schedule
        end_ns = time.monotonic_ns() + TURN_NS
        with self._lock:
            taken, schedule.handed = schedule.handed or schedule.take(is_quick), None
        while taken is not None:
            entry, job = taken
            jobs = self._runner.run(entry, job, activity)
            more = time.monotonic_ns() < end_ns
            with self._lock:
                schedule.end(entry, jobs)
                if not len(schedule.queue):
                    return False
                taken = schedule.take(is_quick) if more else None
                if not more and len(schedule.queue):
                    return True
        with self._lock:
            # What was left to this thread and has become slow since.
            if len(schedule.queue):
                schedule.call_threads()
        return False

    def wake(self) -> None:
        """Have the executor's own threads look for work: who was to do it is busy."""
        with self._lock:
            self.schedule.work.notify_all()
            self.schedule.compute.notify()

    def cancel(self, request: int) -> None:
        """Stop a request: out of the queue, or at its next check. A later arrival is refused too."""
        schedule = self.schedule
        with self._lock:
            job = schedule.live.get(request)
            if job is None:
                schedule.remember_cancelled(request)
                return
            job.cancel()
            waited = schedule.queue.remove(request) is not None
            entry = schedule.entries.get(job.key)
            if waited:
                del schedule.live[request]
                if job.streaming and entry is not None:
                    entry.streams -= 1
            elif entry is not None:
                schedule.call_step(entry)
        if waited:
            job.refuse(failures.cancelled())

    def add_credit(self, request: int, responses: int) -> None:
        """Allow more responses of a streaming request."""
        job = self.schedule.live.get(request)
        if job is not None:
            job.add_credit(responses)
            with self._lock:
                entry = self.schedule.entries.get(job.key)
                if entry is not None:
                    self.schedule.call_step(entry)

    def look_again(self) -> None:
        """Have requests that rest be looked at: a deadline may pass while nothing of theirs runs."""
        with self._lock:
            for entry in self.schedule.entries.values():
                self.schedule.call_step(entry)

    def drain(self) -> None:
        """Refuse what comes from now on, and return when all that was accepted is answered."""
        schedule = self.schedule
        with self._lock:
            schedule.draining = True
        schedule.wait(lambda: not schedule.live and not schedule.running)

    def _loop(self, activity: Activity) -> None:
        schedule = self.schedule
        while True:
            with self._lock:
                while (taken := self._take(self._may_run)) is None:
                    schedule.work.wait(schedule.next_due_s(schedule.is_for_others))
                schedule.idle -= 1
            entry, job = taken
            jobs = self._runner.run(entry, job, activity)
            with self._lock:
                schedule.idle += 1
                schedule.end(entry, jobs)
            # Held longer, it would keep a request's tensors alive while the thread is idle, and a backend that has gone.
            del taken, entry, job, jobs

    def _may_run(self, entry: Entry) -> bool:
        return entry.free and self.schedule.is_for_others(entry)

    def _take(self, fit: Callable[[Entry], bool]) -> tuple[Entry, Job] | None:
        """Take the next job of an instance that is ``fit``, and begin the streams before it; the lock is held."""
        while (taken := self.schedule.take(fit)) is not None:
            entry, job = taken
            if not job.streaming or entry.step is not None:
                return taken
            self._begin_stream(entry, job)
        return None

    def _hand_over_from(self, activity: Activity) -> None:
        """Have a thread of its own leave passes to the one that computes, where there is one."""
        if self._computing is not None:
            activity.elsewhere = partial(self._computing.hand_over, activity)

    def _begin_stream(self, entry: Entry, job: Job) -> None:
        """Start the thread of a stream; an instance has as many as its ``concurrency`` says."""
        number = next(n for n in itertools.count() if n not in self._streams)
        # From the end of the page, half of it at most: its beginning has the entries of other threads.
        place = ENTRIES - 1 - number if number < ENTRIES // 2 else ENTRIES
        activity = Activity(f"stream-{number}", self._box, place)
        self._hand_over_from(activity)
        self._streams.add(number)
        self.activities.append(activity)
        start_thread(self._run_stream, number, entry, job, activity, name=activity.name)

    def _run_stream(self, number: int, entry: Entry, job: Job, activity: Activity) -> None:
        jobs = self._runner.run(entry, job, activity)
        schedule = self.schedule
        with self._lock:
            schedule.end(entry, jobs)
            self.activities.remove(activity)
            self._streams.remove(number)
            if len(schedule.queue):
                schedule.call_threads()


def exit_now(code: int) -> None:
    """End the process without the interpreter's own shutdown, which libraries' threads can crash."""
    sys.stderr.flush()
    os._exit(code)
