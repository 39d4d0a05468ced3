"""Operations as values: made, moved, queued, forgotten, judged after a restart."""

import itertools
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelhostd.core import operations as rules
from modelhostd.core.errors import Code, ModelhostError, Reason
from modelhostd.core.resources import (
    FINAL_STATES,
    Operation,
    OperationKind,
    OperationState,
    Progress,
)

KINDS = st.sampled_from(OperationKind)
STATES = st.sampled_from(OperationState)
DOWNLOAD = OperationKind.DOWNLOAD


@st.composite
def operations(draw: st.DrawFn) -> list[Operation]:
    """Draw operations in the order they came."""
    made = []
    now = 0.0
    for number in range(draw(st.integers(0, 12))):
        now += draw(st.integers(0, 2))
        state = draw(STATES)
        made.append(
            Operation(
                id=f"o{number}",
                kind=draw(KINDS),
                state=state,
                create_time=now,
                end_time=now + draw(st.integers(0, 50)) if state in FINAL_STATES else 0.0,
                priority=draw(st.integers(-2, 2)),
                model="m",
                cancel_requested=draw(st.booleans()),
            )
        )
    return made


@pytest.mark.parametrize("priority", [-101, 101, 10**9])
def test_priorities_are_bounded(priority: int) -> None:
    """A priority beyond -100 to 100 is refused, naming the field."""
    with pytest.raises(ModelhostError) as caught:
        rules.new("o", DOWNLOAD, 1.0, priority=priority)
    assert caught.value.metadata["field"] == "priority"


def test_times_go_with_states() -> None:
    """An operation starts at its first RUNNING, also after a pause, and ends once."""
    queued = rules.new("o", DOWNLOAD, 1.0)
    running = rules.moved(queued, OperationState.RUNNING, 2.0)
    paused = rules.moved(running, OperationState.PAUSED, 3.0)
    again = rules.moved(
        rules.moved(paused, OperationState.QUEUED, 4.0), OperationState.RUNNING, 5.0
    )
    done = rules.succeeded(again, 6.0, {"a": 1}, Progress(done_bytes=3))
    assert (done.create_time, done.start_time, done.end_time) == (1.0, 2.0, 6.0)
    assert paused.end_time == 0.0
    assert (done.result, done.progress.done_bytes, done.error) == ({"a": 1}, 3, None)


@given(operations())
def test_what_has_ended_moves_no_more(made: list[Operation]) -> None:
    """No final state is left for another one."""
    for operation in made:
        for state in OperationState:
            if operation.state in FINAL_STATES and state is not operation.state:
                with pytest.raises(AssertionError):
                    rules.moved(operation, state, 1.0)


def test_the_reason_cancelled_cancels() -> None:
    """An operation that fails for having been cancelled is CANCELLED, any other is FAILED."""
    queued = rules.new("o", DOWNLOAD, 1.0, model="m")
    cancelled = rules.failed(queued, 2.0, rules.cancelled_error(queued), Progress())
    assert cancelled.state is OperationState.CANCELLED
    error = ModelhostError(Reason.OFFLINE, "no", {"source": "s"}, 1.5)
    failed = rules.failed(queued, 2.0, error, Progress())
    assert failed.state is OperationState.FAILED


@given(
    st.sampled_from(Reason),
    st.text(),
    st.dictionaries(st.text(), st.text()),
    st.none() | st.floats(0, 9),
)
def test_an_error_is_remembered_as_it_was(
    reason: Reason, message: str, metadata: dict[str, str], delay: float | None
) -> None:
    """A remembered error raises what the same failed call would have raised."""
    error = ModelhostError(reason, message, metadata, delay)
    again = rules.raised(rules.stored(error))
    assert (again.reason, again.message, again.metadata, again.retry_delay_s) == (
        reason,
        message,
        metadata,
        delay,
    )
    assert again.code is error.code
    assert isinstance(error.code, Code)


@given(operations(), KINDS)
def test_the_queue_is_by_priority_then_arrival(made: list[Operation], kind: OperationKind) -> None:
    """The queue has the waiting operations of a kind once; nobody passes an equal that came before."""
    queue = rules.queue(made, kind)
    waiting = [o for o in made if o.kind is kind and o.state is OperationState.QUEUED]
    assert sorted(o.id for o in queue) == sorted(o.id for o in waiting)
    places = {o.id: place for place, o in enumerate(made)}
    for before, after in itertools.pairwise(queue):
        assert before.priority >= after.priority
        if before.priority == after.priority:
            assert places[before.id] < places[after.id]


@given(operations(), st.integers(0, 5), st.integers(0, 60))
def test_only_finished_operations_are_forgotten(
    made: list[Operation], count: int, age: int
) -> None:
    """What is kept is unfinished, or among the newest finished and young; it is that bounded."""
    now = 60.0
    edits = rules.forgettable(made, now, count, age)
    forgotten = {e.key for e in edits}
    assert all(e.resource is None and e.reason == "FORGOTTEN" for e in edits)
    finished = [o for o in made if o.state in FINAL_STATES]
    kept = [o for o in finished if o.id not in forgotten]
    assert forgotten <= {o.id for o in finished}
    assert len(kept) <= count
    assert all(now - o.end_time <= age for o in kept)
    for gone in (o for o in finished if o.id in forgotten):
        newer = [o for o in finished if o.end_time >= gone.end_time and o is not gone]
        assert len(newer) >= count or now - gone.end_time > age


@given(operations())
def test_a_restart_leaves_downloads_or_ends(made: list[Operation]) -> None:
    """After a restart what had ended is untouched, downloads wait or are paused, the rest has failed."""
    for operation in made:
        after = rules.after_restart(operation, 100.0)
        if operation.state in FINAL_STATES:
            assert after is operation
        elif operation.kind is not DOWNLOAD:
            assert after.state is OperationState.FAILED
            assert after.error is not None
            assert after.error.reason == Reason.DAEMON_RESTARTED
        elif operation.cancel_requested:
            assert after.state is OperationState.CANCELLED
        elif operation.state is OperationState.PAUSED:
            assert after is operation
        else:
            assert after.state is OperationState.QUEUED
        assert rules.after_restart(after, 200.0) == after


@pytest.mark.parametrize(
    ("deletion", "version", "in_the_way"),
    [
        (("a", False, 0), 1, True),
        (("a", False, 0), None, True),
        (("a", True, 0), 2, True),
        (("a", True, 1), 1, True),
        (("a", True, 1), 2, False),
        (("a", True, 1), None, True),
        (("b", False, 0), None, False),
        (("1:a", True, 0), None, False),
    ],
)
def test_what_is_being_deleted_takes_nothing_new(
    deletion: tuple[str, bool, int], version: int | None, in_the_way: bool
) -> None:
    """A deletion is in the way of what it takes away, and of nothing else; an ended one of nothing."""
    model, keep_entry, deleted = deletion
    key = rules.delete_key(model, keep_entry, deleted)
    operation = rules.new("o", OperationKind.DELETE, 1.0, model=model, join_key=key)
    if in_the_way:
        with pytest.raises(ModelhostError) as caught:
            rules.refuse_while_deleted([operation], "a", version)
        assert caught.value.metadata == {"model": "a", "operation": "o"}
    else:
        rules.refuse_while_deleted([operation], "a", version)
    done = replace(operation, state=OperationState.SUCCEEDED)
    rules.refuse_while_deleted([done], "a", version)


@given(
    waiting=st.lists(st.sampled_from("abc"), max_size=12),
    running=st.lists(st.sampled_from("abc"), max_size=6),
    limit=st.integers(1, 8),
    per_host=st.integers(0, 4),
)
def test_what_may_start_keeps_both_limits(
    waiting: list[str], running: list[str], limit: int, per_host: int
) -> None:
    """In order; one whose host is full lets others pass; nothing that could start is left waiting."""
    queue = [rules.new(str(n), OperationKind.DOWNLOAD, 0.0, model=h) for n, h in enumerate(waiting)]
    found = rules.startable(queue, running, lambda o: o.model, limit=limit, per_host=per_host)
    assert [o.id for o in found] == [o.id for o in queue if o in found]
    hosts = Counter(running) + Counter(o.model for o in found)
    assert not found or hosts.total() <= limit
    for host in {o.model for o in found} if per_host else ():
        assert hosts[host] <= per_host
    if hosts.total() < limit:
        for operation in queue:
            if operation not in found:
                assert per_host
                assert hosts[operation.model] >= per_host
    # The first in line with a free host is never passed over.
    free = [o for o in queue if not per_host or Counter(running)[o.model] < per_host]
    assert found[:1] == (free[:1] if len(running) < limit else [])


@pytest.mark.parametrize("rate", [-1, rules.RATE_LIMIT_MAX + 1])
def test_a_rate_out_of_its_range_is_refused(rate: int) -> None:
    """With the range in the message."""
    with pytest.raises(ModelhostError, match="0 to"):
        rules.new("x", OperationKind.DOWNLOAD, 0.0, rate_limit=rate)
