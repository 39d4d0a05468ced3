"""Runs what was taken from the queue: a request and those that join it, one that is begun, a step, or a check."""

import logging
import sys
from collections.abc import Callable
from functools import partial

from modelhostd.worker import batches, failures
from modelhostd.worker.backend import compute_here
from modelhostd.worker.checks import CheckJob
from modelhostd.worker.entries import Entry
from modelhostd.worker.jobs import Activity, Hosted, InferJob
from modelhostd.worker.schedule import Job, Schedule
from modelhostd.worker.stepping import JobAnswer, StepJob

log = logging.getLogger("modelhostd.worker")

POISONED_EXIT = 70


class Runner:
    """What a thread does with a job, without the schedule's lock but where it says so."""

    def __init__(self, schedule: Schedule, exit: Callable[[int], None]) -> None:
        """``exit`` ends the process, for a device fault that nothing survives."""
        self._schedule = schedule
        self._exit = exit

    def run(self, entry: Entry, job: Job, activity: Activity) -> list[Job]:
        """Run a job, and those that fit to it; return all that are answered."""
        hosted = entry.hosted
        begin_ns = activity.begin(hosted.model)
        jobs: list[Job] = [job]
        activity.compute = (entry.computes and activity.elsewhere) or compute_here
        activity.let_pass = activity.give_way
        if hosted.batch_limit > 1 and isinstance(job, InferJob):
            activity.let_pass = partial(self._let_pass, entry, job, activity)
        try:
            if isinstance(job, StepJob):
                error = self._step(entry, job, activity)
            elif entry.step is not None and isinstance(job, InferJob):
                opened, error = self._open(entry, job, activity)
                if opened:
                    jobs = []
            else:
                jobs, error = self._together(entry, job, activity)
        except OSError:
            # The daemon's end of the socket is gone, and this process is about to be.
            log.debug("an answer was not sent", exc_info=True)
            error = None
        # An idle thread would else hold the request, and a backend that has gone.
        activity.let_pass = activity.give_way
        self.end_if_poisoned(hosted, error)
        # Its traceback has this frame, and those with what was computed: a cycle around the memory that it lacked.
        del error
        activity.end()
        entry.note_pace(begin_ns)
        return jobs

    def _together(
        self, entry: Entry, job: InferJob | CheckJob, activity: Activity
    ) -> tuple[list[Job], BaseException | None]:
        """Run a job and those that fit to it; return all that are answered, and what the backend raised."""
        hosted = entry.hosted
        if hosted.batch_limit > 1 and len(self._schedule.queue) and batches.joinable(job):
            together, refused = self._gather(entry, job)
            return [*together, *refused], batches.run(together, hosted, activity)
        return [job], job.run(hosted, activity)

    def _let_pass(self, entry: Entry, long: InferJob, activity: Activity) -> None:
        """Between two batches of a long request run a much shorter one of the same instance, and those that join it.

        One batch at a time, so that the long one gets on whatever comes.
        """
        activity.give_way()
        schedule = self._schedule
        if not len(schedule.queue):
            return
        with schedule.lock:
            job = schedule.take_shorter(entry, long)
        if job is None:
            return
        again, activity.let_pass = activity.let_pass, activity.give_way
        jobs: list[Job] = [job]
        try:
            jobs, error = self._together(entry, job, activity)
            self.end_if_poisoned(entry.hosted, error)
            del error  # as in `run`
        except OSError:
            log.debug("an answer was not sent", exc_info=True)
        finally:
            with schedule.lock:
                schedule.end_passed(entry, jobs)
            activity.let_pass = again
            activity.begin(entry.hosted.model)

    def end_if_poisoned(self, hosted: Hosted, error: BaseException | None) -> None:
        """End the process where nothing in it can be trusted after what a backend raised."""
        if error is not None and hosted.is_poisoned(error):
            log.error("the device is in an undefined state; this worker ends", exc_info=error)
            sys.stderr.flush()
            self._exit(POISONED_EXIT)

    def _open(
        self, entry: Entry, job: InferJob, activity: Activity
    ) -> tuple[bool, BaseException | None]:
        """Begin a request that steps will answer; whether it is not answered yet, and what the backend raised."""
        if not job.prepare(entry.hosted):
            return False, None

        def ended(answer: JobAnswer) -> None:
            with self._schedule.lock:
                self._schedule.end_answer(entry, answer)

        answer = JobAnswer(job, entry.hosted, ended)
        entry.answers[job.ticket] = answer
        error = answer.begin(activity)
        if not answer.ended:
            with self._schedule.lock:
                self._schedule.count_begun(entry)
            return True, None
        del entry.answers[job.ticket]
        try:
            return False, error
        finally:
            del error  # as in `run`

    def _step(self, entry: Entry, step: StepJob, activity: Activity) -> BaseException | None:
        """Get the requests that were begun on by one step."""
        error = step.run(entry.hosted, activity)
        if error is not None:
            # Of the step itself: what became of each request nobody can tell.
            for answer in list(entry.answers.values()):
                answer.fail(error)
        elif step.again:
            with self._schedule.lock:
                self._schedule.call_step(entry)
        try:
            return error
        finally:
            del error  # as in `run`

    def _gather(self, entry: Entry, first: InferJob) -> tuple[list[InferJob], list[InferJob]]:
        """Return the requests that run now, ``first`` among them, and those that were refused on the way.

        What waits and does not fit goes back to its place.
        """
        hosted, schedule = entry.hosted, self._schedule
        with schedule.lock:
            others = schedule.queue.more(
                first.key, min(hosted.batch_limit, batches.LOOK) - 1, batches.joinable
            )
        if not others:
            return [first], []
        batch = batches.form([(None, first), *others], hosted)
        gone: list[InferJob] = []
        with schedule.lock:
            entry.apart = bool(batch.left)
            if schedule.entries.get(first.key) is entry:
                schedule.queue.put_back(first.key, batch.left)
                if batch.left:
                    schedule.call_thread(entry)
            else:
                gone = [job for _, job in batch.left]
        for job in gone:
            job.refuse(failures.not_loaded(hosted.model))
        return batch.together, [*batch.refused, *gone]
