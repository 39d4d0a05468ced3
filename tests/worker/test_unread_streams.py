"""Streams that nobody reads, in an executor of this process: they hold up nobody, and not for ever."""

import numpy as np
import pytest

from modelhostd.core.errors import Reason
from modelhostd.worker import jobs
from modelhostd.worker.backends.identity import IdentityBackend
from tests.support import wait_until
from tests.worker.executor_scene import Channel, StepBackend, executor, hosted, job


class EndlessBackend(IdentityBackend):
    """Answers each request again and again."""

    concurrency = 3

    def infer_stream(self, inputs, context):
        """Never end."""
        while True:
            yield self.infer(inputs, context)


class RestingBackend(StepBackend):
    """Answers one piece of each request, and rests until it is read."""

    def step(self):
        """Send where there is room."""
        for answer in list(self._answers):
            if answer.unwanted:
                self._answers.remove(answer)
                answer.fail(jobs.Cancelled())
            elif answer.ready:
                answer.send({"y": np.zeros(1, np.float32)}, last=False)
        return any(answer.ready for answer in self._answers)


def answered(channel, number):
    """Return what one request was answered."""
    return [answer for request, answer in channel.answers if request == number]


def test_streams_that_are_not_read_leave_the_threads_to_others():
    """More streams than there are threads wait for their readers, and another model answers."""
    channel, made = Channel(), executor(threads=1)
    made.add(hosted(EndlessBackend()))
    made.add(hosted(IdentityBackend(), "other"))
    made.start()
    for number in (1, 2, 3, 4):
        made.submit(job(channel, number, credit=2))
    wait_until(lambda: sum(answer == "answered" for _, answer in channel.answers) == 6)
    made.submit(job(channel, 9, "other"))
    wait_until(lambda: answered(channel, 9) == ["answered"])
    assert len([a for a in made.activities if a.name.startswith("stream")]) == 3
    for number in (1, 2, 3, 4):
        made.cancel(number)
    made.drain()
    wait_until(lambda: not [a for a in made.activities if a.name.startswith("stream")])
    assert {answered(channel, number)[-1] for number in (1, 2, 3, 4)} == {Reason.CANCELLED}


@pytest.mark.parametrize("backend", [EndlessBackend, RestingBackend])
def test_a_stream_that_is_not_read_is_ended(backend, monkeypatch):
    """After a time its reader is told so, and its place is free; who reads in time is not concerned."""
    channel, made = Channel(), executor()
    made.add(hosted(backend()))
    made.start()
    one = job(channel, 1, credit=1)
    made.submit(one)
    wait_until(lambda: answered(channel, 1) == ["answered"])
    made.add_credit(1, 1)
    wait_until(lambda: answered(channel, 1) == ["answered"] * 2)
    assert not one.unread
    monkeypatch.setattr(jobs, "UNREAD_S", 0.0)
    made.look_again()
    wait_until(lambda: answered(channel, 1)[-1] is Reason.QUEUE_FULL)
    made.drain()
