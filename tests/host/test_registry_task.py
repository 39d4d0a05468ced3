"""The registry task by itself: what is decided, committed, published, undone and carried over."""

import asyncio
import math
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace

import pytest

from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.resources import (
    Event,
    InstanceState,
    Kind,
    Model,
)
from modelhostd.core.state import Edit
from modelhostd.host.registry import Request
from tests.fakes.clock import FakeClock, settle
from tests.fakes.database import FakeDisk, disk_full
from tests.host.registry_desk import Desk, gone, instance, model
from tests.support import DEADLINE_S, wait_until_async


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
async def desk(clock: FakeClock) -> AsyncIterator[Desk]:
    made = Desk(FakeDisk(), clock)
    await made.registry.open()
    yield made
    await made.database.release_commits()
    await made.registry.close()


async def test_nothing_is_readable_before_its_commit(desk: Desk) -> None:
    """A staged change is decided at once, but neither readable, published nor done before its commit."""
    desk.database.hold_commits()
    done = desk.registry.stage([model("a")])
    await desk.database.wait_for_waiting(1)
    assert "a" in desk.registry.decided.models
    assert not desk.models
    assert not desk.published
    assert not done.done()
    await desk.database.release_commits()
    assert await done == 1
    assert desk.models == ["a"]


async def test_what_is_staged_during_a_commit_shares_the_next_one(desk: Desk) -> None:
    """Changes that come while a commit is in flight are one transaction, in their order."""
    desk.database.hold_commits()
    desk.registry.stage([model("a")])
    await desk.database.wait_for_waiting(1)
    last = [desk.registry.stage([model(key)]) for key in "bcd"][-1]
    await desk.database.release_commits()
    await last
    assert [[c.key for c in b.changes] for b in desk.database.committed] == [["a"], ["b", "c", "d"]]


async def test_a_failed_commit_undoes_what_waits_behind_it(desk: Desk) -> None:
    """Changes decided on the ground of one that failed are undone with it, and their callers told."""
    desk.database.hold_commits()
    desk.database.fail_commits()
    first = desk.registry.stage([model("a", "one")])
    await desk.database.wait_for_waiting(1)
    second = desk.registry.stage([model("a", "two"), model("b")])
    await desk.database.release_commits()
    with pytest.raises(ModelhostError) as caught:
        await first
    assert caught.value.reason is Reason.INSUFFICIENT_DISK_SPACE
    with pytest.raises(ModelhostError) as caught:
        await second
    assert caught.value.reason is Reason.STORAGE_ERROR
    assert not desk.registry.decided.models
    assert await desk.registry.stage([model("c")]) == 1
    assert desk.models == ["c"]


async def test_what_happened_stands_when_a_commit_fails(desk: Desk, clock: FakeClock) -> None:
    """Recorded changes survive a failed commit, as their last value, and are logged with the next."""
    desk.database.fail_commits()
    desk.registry.record([instance("a")])
    desk.registry.record([instance("a", InstanceState.LOADING)])
    failed = desk.registry.stage([model("m")])
    with pytest.raises(ModelhostError):
        await failed
    assert desk.registry.decided.instances["a/1"].state is InstanceState.LOADING
    await clock.advance(2.0)
    assert [(e.sequence, e.reason, e.created) for e in desk.published] == [(1, "LOADING", True)]


async def test_what_came_and_went_unseen_is_not_mentioned(desk: Desk, clock: FakeClock) -> None:
    """An instance that ended before any commit told of it leaves no event of its end."""
    desk.database.fail_commits()
    desk.registry.record([instance("a")])
    desk.registry.record([gone("a"), instance("b")])
    await clock.advance(2.0)
    assert [e.key for e in desk.published] == ["b/1"]


async def test_staged_and_recorded_edits_of_one_resource(desk: Desk, clock: FakeClock) -> None:
    """When a commit fails, a record made on top of an undone change stands alone."""
    desk.database.fail_commits()
    staged = desk.registry.stage([instance("a"), model("m")])
    desk.registry.record([instance("a", InstanceState.LOADING)])
    with pytest.raises(ModelhostError):
        await staged
    await clock.advance(2.0)
    assert [e.reason for e in desk.published] == ["LOADING"]


async def test_one_of_stored_and_undone_is_called(desk: Desk) -> None:
    """The staged callbacks tell of the outcome even when the caller has gone away."""
    said: list[str] = []

    def stage(key: str) -> "asyncio.Future[int]":
        return desk.registry.stage(
            [model(key)],
            stored=lambda: said.append(f"{key} stored"),
            undone=lambda: said.append(f"{key} undone"),
        )

    stage("a").cancel()
    await desk.registry.flush()
    desk.database.fail_commits()
    stage("b").cancel()
    await desk.registry.flush()
    assert said == ["a stored", "b undone"]
    assert desk.models == ["a"]


async def test_a_cancelled_caller_does_not_end_the_waits_of_others(desk: Desk) -> None:
    """A replayed request id waits for the commit, though the first caller has given up."""
    request = Request("r", "create a")
    desk.database.hold_commits()
    first = asyncio.ensure_future(_create(desk, request))
    await desk.database.wait_for_waiting(1)
    first.cancel()
    again = asyncio.ensure_future(desk.registry.answered(request))
    await settle()
    assert not again.done()
    await desk.database.release_commits()
    assert await again == "a"
    assert desk.models == ["a"]


async def _create(desk: Desk, request: Request) -> None:
    await desk.registry.stage([model("a")], "", request, "a")


async def test_a_request_id_may_be_used_again_after_a_failed_commit(desk: Desk) -> None:
    """What was not stored was not answered: the same request does the work anew."""
    request = Request("r", "create a")
    desk.database.fail_commits()
    with pytest.raises(ModelhostError):
        await _create(desk, request)
    assert await desk.registry.answered(request) is None
    await _create(desk, request)
    assert await desk.registry.answered(request) == "a"


async def test_a_replay_during_a_failing_commit_is_no_answer(desk: Desk) -> None:
    """A replay that waits for a commit which then fails gets no answer that never was."""
    request = Request("r", "create a")
    desk.database.hold_commits()
    desk.database.fail_commits()
    first = asyncio.ensure_future(_create(desk, request))
    await desk.database.wait_for_waiting(1)
    again = asyncio.ensure_future(desk.registry.answered(request))
    await settle()
    await desk.database.release_commits()
    assert await again is None
    with pytest.raises(ModelhostError):
        await first


async def test_a_request_id_outlives_a_restart_and_an_hour(desk: Desk, clock: FakeClock) -> None:
    """Answers are found by the next daemon, told apart by content, and forgotten after an hour."""
    request = Request("r", "create a")
    await _create(desk, request)
    await desk.database.crash()
    after = Desk(desk.database.disk, clock)
    await after.registry.open()
    assert await after.registry.answered(request) == "a"
    with pytest.raises(ModelhostError) as caught:
        await after.registry.answered(Request("r", "create b"))
    assert caught.value.reason is Reason.REQUEST_ID_REUSED
    clock.jump(3601.0)
    assert await after.registry.answered(request) is None
    await after.registry.close()


async def test_a_barrier_tells_of_what_was_before_it(desk: Desk) -> None:
    """A stage without edits is done when all before it is durable, and fails when that failed."""
    commits = desk.registry.commit_count
    await desk.registry.stage(())
    assert desk.registry.commit_count == commits
    desk.database.hold_commits()
    desk.database.fail_commits()
    desk.registry.stage([model("a")])
    barrier = desk.registry.stage(())
    await desk.database.wait_for_waiting(1)
    await desk.database.release_commits()
    with pytest.raises(ModelhostError):
        await barrier


async def test_a_flush_ends_under_endless_traffic(desk: Desk) -> None:
    """Flush waits for what was staged before it, not for what others go on staging."""
    desk.database.hold_commits()
    desk.registry.stage([model("a")])
    await desk.database.wait_for_waiting(1)
    flushed = asyncio.ensure_future(desk.registry.flush())
    await settle()
    desk.registry.stage([model("b")])
    await desk.database.release_commits(1)
    await asyncio.wait_for(flushed, DEADLINE_S)
    assert desk.models == ["a"]


async def test_a_change_that_cannot_be_stored_harms_no_other(desk: Desk, clock: FakeClock) -> None:
    """One unstorable record is dropped; what was recorded beside it and comes after it is stored."""
    desk.registry.record([instance("bad", load_s=math.nan), instance("good")])
    await clock.advance(3.0)
    assert [e.key for e in desk.published] == ["good/1"]
    await desk.registry.stage([model("a")])
    assert desk.models == ["a"]


async def test_a_commit_that_fails_as_none_should_is_an_error(desk: Desk) -> None:
    """An exception that the port does not promise is a STORAGE_ERROR for the caller, not the end."""

    async def broken(batch: object) -> None:
        raise RuntimeError("bug")

    works, desk.database.commit = desk.database.commit, broken  # type: ignore[method-assign]
    with pytest.raises(ModelhostError) as caught:
        await desk.registry.stage([model("a")])
    assert caught.value.reason is Reason.STORAGE_ERROR
    desk.database.commit = works  # type: ignore[method-assign]
    await desk.registry.stage([model("a")])


async def test_a_listener_that_fails_stops_nobody(desk: Desk) -> None:
    """A listener's exception is logged; the others are told and the next commit happens."""

    def broken(events: Sequence[Event]) -> None:
        raise RuntimeError("bug")

    desk.registry._listeners.insert(0, broken)
    await desk.registry.stage([model("a")])
    await desk.registry.stage([model("b")])
    assert [e.key for e in desk.published] == ["a", "b"]


async def test_close_tries_once_more_and_ends(clock: FakeClock) -> None:
    """Closing logs what a failed commit left over; with a disk that stays full it ends all the same."""
    for failures, expected in ((1, ["a/1"]), (100, [])):
        desk = Desk(FakeDisk(), clock)
        await desk.registry.open()
        desk.database.fail_commits(*[disk_full() for _ in range(failures)])
        desk.registry.record([instance("a")])
        await desk.registry.flush()
        await asyncio.wait_for(desk.registry.close(), 5.0)
        assert [e.key for e in desk.published] == expected


async def test_after_the_end_nothing_waits(clock: FakeClock) -> None:
    """What comes after close is refused; nobody who asks for it waits for ever."""
    desk = Desk(FakeDisk(), clock)
    await desk.registry.open()
    await desk.registry.close()
    with pytest.raises(ModelhostError):
        desk.registry.stage([model("a")])
    desk.registry.record([instance("a")])
    await asyncio.wait_for(desk.registry.flush(), 5.0)


async def test_the_queue_is_bounded(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the disk does not answer, changes beyond the queue's bound are refused, records taken."""
    monkeypatch.setattr("modelhostd.host.registry.PENDING_MAX", 3)
    desk.database.hold_commits()
    desk.registry.stage([model("a")])
    await desk.database.wait_for_waiting(1)
    for key in "bcd":
        desk.registry.stage([model(key)])
    with pytest.raises(ModelhostError) as caught:
        desk.registry.stage([model("e")])
    assert caught.value.reason is Reason.STORAGE_ERROR
    assert "e" not in desk.registry.decided.models
    desk.registry.record([instance("a")])
    await desk.database.release_commits()
    await desk.registry.flush()
    assert desk.models == list("abcd")


async def test_events_say_whether_a_resource_is_new(desk: Desk) -> None:
    """``created`` is true for the first event of a resource, also within a batch, and after its end."""
    edit = model("a")
    last = Edit(Kind.MODEL, "a", None, "DELETED")
    await desk.registry.stage([edit, edit, last, edit])
    assert [e.created for e in desk.published] == [True, False, False, True]
    assert isinstance(desk.published[0].resource, Model)
    assert desk.published[2].resource is None


async def test_a_commit_in_flight_at_a_crash_is_whole_or_nothing(clock: FakeClock) -> None:
    """After a crash the rows are those of the last commit, and the next sequence follows it."""
    desk = Desk(FakeDisk(), clock)
    await desk.registry.open()
    await desk.registry.stage([model("a")])
    desk.database.hold_commits()
    desk.registry.stage([model("b"), replace(model("a"), resource=None)])
    await desk.database.wait_for_waiting(1)
    await desk.database.crash()
    after = Desk(desk.database.disk, clock)
    stored = await after.registry.open()
    assert (after.models, stored.last_sequence) == (["a"], 1)
    assert await after.registry.stage([model("b")]) == 2
    await after.registry.close()


async def test_a_long_list_of_edits_is_split_between_commits(desk: Desk) -> None:
    """Many changes that wait go to the disk in several transactions, none of them torn."""
    desk.database.hold_commits()
    desk.registry.stage([model("first")])
    await desk.database.wait_for_waiting(1)
    for group in range(4):
        desk.registry.stage([model(f"m{group}-{i}") for i in range(300)])
    await desk.database.release_commits()
    await desk.registry.flush()
    sizes = [len(batch.changes) for batch in desk.database.committed]
    assert sizes == [1, 300, 300, 300, 300]
    await wait_until_async(lambda: len(desk.models) == 1201)
