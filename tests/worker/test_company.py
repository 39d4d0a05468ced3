"""After a batch the next one waits a little for those who were answered, and for nobody else."""

import pytest

from modelhostd.worker import entries
from modelhostd.worker.checks import CheckJob
from modelhostd.worker.entries import Entry
from tests.worker.executor_scene import KEY, Channel, executor, hosted, job
from tests.worker.test_executor import GateBackend

SLOW_NS = 10**9


@pytest.fixture
def made(monkeypatch):
    """An executor without threads whose instance takes as long as a test says; who waits does so for ever."""
    monkeypatch.setattr(entries, "COMPANY_MOST_NS", 10**15)
    monkeypatch.setattr(entries, "COMPANY_SHARE", 1e-6)
    one = executor()
    one.add(hosted(GateBackend(), batch_limit=4))
    return one


def ran(made, together, took_ns=SLOW_NS):
    """Have so many run together; return their instance."""
    entry = made.schedule.entries[KEY]
    entry.took_ns = took_ns
    entry.running += 1
    made.schedule.running += 1
    made.schedule.end(entry, [job(Channel()) for _ in range(together)])
    return entry


def test_who_comes_back_first_does_not_run_alone(made):
    """After three that ran together the next one waits until there are three again."""
    entry = ran(made, 3)
    made.submit(job(Channel()))
    made.submit(job(Channel()))
    assert not entry.free
    assert made.schedule.next_due_s(made.schedule.is_for_others) > 0
    made.submit(job(Channel()))
    assert entry.free


def test_a_health_check_calls_the_waiting_off(made):
    """What cannot run with others is not held up by them."""
    entry = ran(made, 3)
    made.submit(job(Channel()))
    made.submit(CheckJob(Channel(), 1, 1, "m-1"))
    assert entry.free


def test_two_that_take_turns_find_together(made):
    """Who waited while another ran alone waits for that one to come back."""
    made.submit(job(Channel()))
    entry = ran(made, 1)
    assert not entry.free
    made.submit(job(Channel()))
    assert entry.free


def test_nobody_waits_for_those_that_could_not_join(made):
    """Where some of those that waited last were of another kind, or too many, waiting is in vain."""
    made.schedule.entries[KEY].apart = True
    made.submit(job(Channel()))
    assert ran(made, 3).free


@pytest.mark.parametrize(("together", "took_ns"), [(1, SLOW_NS), (3, 1000)])
def test_nobody_waits_after_one_alone_or_what_was_quick(made, together, took_ns):
    """An idle model answers at once, and where a batch takes no time there is nothing to be saved."""
    entry = ran(made, together, took_ns)
    made.submit(job(Channel()))
    assert entry.free


def test_nobody_waits_where_a_whole_batch_is_there_already(made):
    """As many as may run together are company enough."""
    for _ in range(4):
        made.submit(job(Channel()))
    assert ran(made, 3).free


@pytest.mark.parametrize("before", [True, False])
def test_nobody_waits_while_no_thread_could_end_the_wait(made, before):
    """Where all threads are at work for others who reads serves what is quick, as if there were no company."""
    made.schedule.entries[KEY].pace_ns = 0
    made.schedule.idle = 0 if before else 1
    entry = ran(made, 3)
    assert entry.free == before
    made.schedule.idle = 0
    assert made.submit(job(Channel()), here=True)


def test_the_wait_is_a_small_part_of_what_the_batch_took():
    """It is at most an eighth, and at most four milliseconds."""
    entry = Entry(hosted(GateBackend(), batch_limit=4))
    entry.took_ns = SLOW_NS
    assert entry.company_ns == 4_000_000
    entry.took_ns = 8_000_000
    assert entry.company_ns == 1_000_000
