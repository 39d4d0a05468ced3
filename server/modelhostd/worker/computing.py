"""The one thread of a worker that runs models on the CPU with torch's threads (:mod:`modelhostd.worker.team`).

It runs the jobs of models that compute there. While it is busy other threads prepare and answer such jobs, and hand
their passes over to it: between two passes of its own job it runs those.
"""

import threading
import time
from collections.abc import Callable
from typing import TypeVar, cast

from modelhostd.worker.entries import Entry
from modelhostd.worker.jobs import Activity
from modelhostd.worker.own_threads import start_thread
from modelhostd.worker.schedule import Job, Schedule
from modelhostd.worker.team import Team

Result = TypeVar("Result")


class Handed:
    """A pass that another thread waits for."""

    def __init__(self, model: str, run: Callable[[], object]) -> None:
        self.model = model
        self._run: Callable[[], object] | None = run
        self._done = threading.Event()
        self._made: object = None
        self._error: BaseException | None = None

    def run(self) -> None:
        """Run it; who waits goes on."""
        assert self._run is not None
        try:
            self._made = self._run()
        except BaseException as error:
            self._error = error
        # It holds a request's tensors, and who runs it may then wait for long.
        self._run = None
        self._done.set()

    def wait(self) -> object:
        """Return what it made, or raise what it raised."""
        self._done.wait()
        if self._error is None:
            return self._made
        try:
            raise self._error
        finally:
            # The traceback holds this frame, which else would hold the error: a cycle around tensors.
            self._error = None


class Computing:
    """What the thread with the team runs: passes that were handed over, and jobs. ``take`` and ``run_job`` are for these."""

    def __init__(
        self,
        schedule: Schedule,
        activity: Activity,
        threads: int,
        take: Callable[[Callable[[Entry], bool]], tuple[Entry, Job] | None],
        run_job: Callable[[Entry, Job, Activity], list[Job]],
    ) -> None:
        self._schedule = schedule
        self._activity = activity
        self._team = Team(threads)
        self._take = take
        self._run_job = run_job
        self._ready = threading.Event()
        activity.give_way = self._give_way

    def hand_over(self, activity: Activity, run: Callable[[], Result]) -> Result:
        """Run a pass of the job of another thread, whose ``activity`` rests meanwhile: what hangs is not its doing."""
        schedule = self._schedule
        handed = Handed(activity.model, run)
        activity.end()
        with schedule.lock:
            schedule.handed_passes.append(handed)
            schedule.compute.notify()
        try:
            return cast(Result, handed.wait())
        finally:
            activity.begin(handed.model)

    def start(self) -> None:
        """Start the thread; it lives as long as the process. When this returns it takes jobs, and torch has one thread in all others."""
        start_thread(self._loop, name=self._activity.name)
        self._ready.wait()

    def _loop(self) -> None:
        self._team.take()
        schedule = self._schedule
        with schedule.lock:
            schedule.compute_busy = False
        self._ready.set()
        ended: tuple[Entry, list[Job]] | None = None
        while True:
            with schedule.lock:
                schedule.compute_busy = False
                if ended is not None:
                    schedule.end(*ended)
                ended = None
                while (taken := self._take(_can_compute)) is None and not schedule.handed_passes:
                    schedule.compute.wait(schedule.next_due_s(_is_to_compute))
                schedule.compute_busy = True
                schedule.call_beside()
            self._team.take()
            begin_ns = time.monotonic_ns()
            self._give_way()
            if taken is not None:
                ended = taken[0], self._run_job(*taken, self._activity)
            self._team.worked(time.monotonic_ns() - begin_ns)
            # Held longer, it would keep a request's tensors alive while the thread is idle, and a backend that has gone.
            del taken

    def _give_way(self) -> None:
        """Run the passes that were handed over until now."""
        schedule, activity = self._schedule, self._activity
        if not schedule.handed_passes:
            return
        with schedule.lock:
            waiting = list(schedule.handed_passes)
            schedule.handed_passes.clear()
        own = activity.model
        for handed in waiting:
            activity.begin(handed.model)
            handed.run()
        activity.end()
        if own:
            activity.begin(own)


def _is_to_compute(entry: Entry) -> bool:
    return entry.computes


def _can_compute(entry: Entry) -> bool:
    return entry.computes and entry.free
