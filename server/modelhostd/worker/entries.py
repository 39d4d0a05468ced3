"""An instance that takes requests, as the executor sees it: what runs of it, and whether more may start."""

import time

from modelhostd.worker.jobs import Hosted
from modelhostd.worker.stepping import JobAnswer, StepJob

QUICK_NS = 500_000
"""What an instance's requests take, answer included, to be served by the thread that reads."""
TURN_NS = 1_000_000
"""How long that thread serves before it looks for more to read."""
COMPANY_SHARE = 8
"""The part of what the last batch took, for which the next one may wait for those who were in it."""
COMPANY_FROM_NS, COMPANY_MOST_NS = 1_000_000, 4_000_000


class Entry:
    """Read and written with the executor's lock held."""

    __slots__ = (
        "answers",
        "apart",
        "begun",
        "company",
        "computes",
        "due_ns",
        "hosted",
        "pace_ns",
        "running",
        "step",
        "step_waits",
        "streams",
        "took_ns",
    )

    def __init__(self, hosted: Hosted, *, computes: bool = False) -> None:
        self.hosted = hosted
        self.computes = computes
        """Whether its work is for the thread that computes."""
        self.due_ns = 0
        """Until when its requests wait for company; 0 = they do not."""
        self.company = 0
        """How many requests a batch is worth waiting for: those of the last and those that waited meanwhile."""
        self.took_ns = 0
        """What the last job took."""
        self.apart = False
        """Whether of those that waited last some could not run with the others, so that waiting is in vain."""
        self.running = 0
        self.streams = 0
        """Streaming requests, running or not: each may take for ever."""
        self.pace_ns = float(TURN_NS)
        """What its requests took of late. It begins as not quick: nobody knows yet."""
        self.answers: dict[int, JobAnswer] = {}
        """Requests that were begun and are answered by steps."""
        self.step = StepJob(hosted.instance, hosted.generation) if hosted.backend.stepwise else None
        self.begun = 0
        """Requests that were begun since the last step."""
        self.step_waits = False
        """Whether the step is in the queue."""

    @property
    def free(self) -> bool:
        """Whether one more of its requests may start."""
        if self.due_ns and time.monotonic_ns() < self.due_ns:
            return False
        return self.has_room

    @property
    def has_room(self) -> bool:
        """Whether fewer run than may at a time: one where they are begun and stepped."""
        return self.running < (self.hosted.backend.concurrency if self.step is None else 1)

    @property
    def divided(self) -> bool:
        """Whether another thread than the one that computes may run its jobs and hand over what they compute."""
        return self.step is not None or self.hosted.backend.hands_over

    @property
    def quick(self) -> bool:
        """Whether one more may start in the thread that reads."""
        if self.streams or self.step is not None:
            return False
        return self.pace_ns < QUICK_NS and self.free

    def note_pace(self, begin_ns: int) -> None:
        """Note how long a job took. One slow request makes it slow for the next ones, several quick ones undo it."""
        self.took_ns = time.monotonic_ns() - begin_ns
        self.pace_ns += (self.took_ns - self.pace_ns) / 4

    @property
    def company_ns(self) -> int:
        """How long the next ones may wait for those that ran last."""
        return int(min(COMPANY_MOST_NS, self.took_ns / COMPANY_SHARE))

    def expect(self, together: int, waiting: int) -> None:
        """After so many requests ran together, have those that wait do so for them too, for a part of what they took.

        Who was answered often asks again at once. Else who waited meanwhile runs without them, they without
        those, and several clients take turns where they could share one.
        """
        self.company = min(together + waiting, self.hosted.batch_limit)
        if self.apart or self.hosted.batch_delay_ns or waiting >= self.company:
            return
        if self.company > 1 and self.took_ns >= COMPANY_FROM_NS:
            self.due_ns = time.monotonic_ns() + self.company_ns


def is_quick(entry: Entry) -> bool:
    """Whether one more may start in the thread that reads."""
    return entry.quick
