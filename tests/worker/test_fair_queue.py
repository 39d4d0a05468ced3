"""Which waiting request runs next."""

from hypothesis import given
from hypothesis import strategies as st

from modelhostd.worker.fairqueue import FairQueue


def always(_):
    """Every instance may run."""
    return True


def drain(queue, ready=always):
    """Take everything that can be taken."""
    taken = []
    while (entry := queue.pop(ready)) is not None:
        taken.append(entry)
    return taken


def test_instances_take_turns():
    """A long queue of one instance delays another's request by one, not by all."""
    queue = FairQueue(100)
    for request in range(10):
        queue.push("long", request, 0, request)
    queue.push("short", 99, 0, 99)
    assert drain(queue)[:3] == [("long", 0), ("short", 99), ("long", 1)]


def test_priority_counts_within_an_instance_only():
    """A high priority passes its own instance's requests, and no other's turn."""
    queue = FairQueue(100)
    for request, instance, priority in ((1, "a", 0), (2, "b", 0), (3, "a", 9), (4, "a", 9)):
        queue.push(instance, request, priority, request)
    assert [item for _, item in drain(queue)] == [3, 2, 4, 1]


def test_an_instance_that_is_not_ready_is_passed_over():
    """What cannot run now keeps its place and does not block the rest."""
    queue = FairQueue(100)
    queue.push("busy", 1, 0, 1)
    queue.push("free", 2, 0, 2)
    assert drain(queue, lambda instance: instance == "free") == [("free", 2)]
    assert len(queue) == 1
    assert drain(queue) == [("busy", 1)]


def test_a_full_queue_takes_nothing_until_something_leaves():
    """The limit counts what waits, whoever it is for; removed requests make room at once."""
    queue = FairQueue(2)
    assert [queue.push(str(number), number, 0, number) for number in range(3)] == [
        True,
        True,
        False,
    ]
    assert queue.remove(0) == 0
    assert queue.remove(0) is None
    assert queue.push("3", 3, 0, 3)
    assert queue.discard("1") == [1]
    assert drain(queue) == [("3", 3)]


def test_cancellation_storms_do_not_pile_up():
    """Requests that come and are removed again leave nothing behind, however many."""
    queue = FairQueue(10)
    for request in range(10_000):
        queue.push("a", request, 0, request)
        queue.remove(request)
    assert sum(map(len, queue._waiting.values())) <= 21


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["push", "pop", "remove", "discard"]),
            st.sampled_from("abc"),
            st.integers(-2, 2),
            st.integers(0, 40),
        ),
        max_size=80,
    )
)
def test_everything_pushed_leaves_exactly_once(steps):
    """Over any sequence of steps nothing is lost, doubled, or taken in the wrong order within an instance."""
    queue = FairQueue(12)
    waiting = {}
    for number, (what, instance, priority, other) in enumerate(steps):
        if what == "push" and queue.push(instance, number, priority, number):
            waiting[number] = (instance, priority)
        elif what == "pop":
            taken = queue.pop(always)
            assert (taken is None) == (not waiting)
            if taken is not None:
                key, item = taken
                same = [n for n, (i, _) in waiting.items() if i == key]
                assert item == min(same, key=lambda n: (-waiting[n][1], n))
                del waiting[item]
        elif what == "remove":
            assert (queue.remove(other) is None) == (other not in waiting)
            waiting.pop(other, None)
        elif what == "discard":
            gone = {n for n, (i, _) in waiting.items() if i == instance}
            assert set(queue.discard(instance)) == gone
            waiting = {n: entry for n, entry in waiting.items() if n not in gone}
        assert len(queue) == len(waiting)


def test_more_of_an_instance_come_in_its_order_and_go_back_to_their_places():
    """What is taken for a batch and does not fit stands where it stood, also behind a higher priority."""
    queue = FairQueue(100)
    for request, priority in ((1, 0), (2, 5), (3, 0), (4, 0)):
        queue.push("a", request, priority, request)
    queue.push("b", 9, 0, 9)
    assert queue.pop(always) == ("a", 2)
    taken = queue.more("a", 2, lambda item: True)
    assert [item for _, item in taken] == [1, 3]
    queue.push("a", 5, 0, 5)
    queue.push("a", 6, 1, 6)
    queue.put_back("a", taken)
    assert [item for _, item in drain(queue)] == [9, 6, 1, 3, 4, 5]


def test_more_stops_at_what_does_not_fit_and_skips_what_was_removed():
    """The first item that is of another kind ends the search; requests that are gone do not."""
    queue = FairQueue(100)
    for request in range(6):
        queue.push("a", request, 0, request)
    queue.remove(1)
    assert [item for _, item in queue.more("a", 9, lambda item: item < 3)] == [0, 2]
    assert len(queue) == 3
    assert queue.more("nobody", 9, lambda item: True) == []
